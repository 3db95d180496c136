import math
import threading

import pytest

from moeray.actors.vigil import Vigil


def test_silence_is_noticed_once_from_its_own_thread():
    called = []
    done = threading.Event()

    def on_orphan():
        called.append(threading.current_thread().name)
        vigil.close()
        done.set()

    vigil = Vigil(0.02, on_orphan)
    assert done.wait(10)
    vigil.close()
    assert called == ["vigil"]


def test_who_is_heard_of_is_not_given_up():
    now, asked, orphaned = 0.0, threading.Semaphore(0), threading.Event()

    def clock():
        asked.release()
        return now

    vigil = Vigil(0.02, orphaned.set, clock)
    for _ in range(5):
        assert asked.acquire(timeout=10)  # it looks again and again: by the clock, no time has passed
    now = 0.015
    vigil.heard()
    now = 0.03
    for _ in range(5):
        assert asked.acquire(timeout=10)
    assert not orphaned.is_set()
    now = 2.0
    assert orphaned.wait(10)
    vigil.close()


@pytest.mark.parametrize("orphan_s", [60.0, math.inf])
def test_a_closed_one_is_silent(orphan_s):
    orphaned = threading.Event()
    vigil = Vigil(orphan_s, orphaned.set)
    vigil.close()
    assert not orphaned.is_set()
    assert not [t for t in threading.enumerate() if t.name == "vigil"]
