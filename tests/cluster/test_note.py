"""A note with Ray's head: an actor's next life finds it, and nobody else does; a head that is away holds nobody up."""

from __future__ import annotations

import logging
import signal
import threading
import time

import psutil
import pytest
import ray

from moeray.cluster import ray_note
from moeray.cluster.ray_note import RayNote
from moeray.errors import MoerayError

pytestmark = pytest.mark.ray


@pytest.fixture
def ray_here():
    ray.init("local", num_cpus=2, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    yield
    ray.shutdown()


def until_read(note: RayNote, wanted: bytes | None) -> None:
    end = time.monotonic() + 30.0
    while (found := note.read()) != wanted:
        assert time.monotonic() < end, found


def test_a_note_is_there_until_it_is_closed(ray_here, monkeypatch, caplog):
    one, other = RayNote("one"), RayNote("other")
    assert one.read() is None
    for text in (b"first", b"second"):
        one.write(text)
        until_read(one, text)
    assert other.read() is None
    next_life = RayNote("one")
    assert next_life.read() == b"second"
    one.close()
    assert next_life.read() is None
    other.close()
    next_life.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "ray-note"]


def test_a_head_that_hangs_gets_the_newest_note_when_it_is_back(ray_here, monkeypatch, caplog):
    monkeypatch.setattr(ray_note, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(ray_note, "RETRY_S", 0.1)
    (head,) = [child for child in psutil.Process().children() if child.name() == "gcs_server"]
    note = RayNote("one")
    note.write(b"first")
    until_read(note, b"first")
    head.send_signal(signal.SIGSTOP)
    try:
        with caplog.at_level(logging.WARNING, "moeray.cluster.ray_note"):
            for text in (b"second", b"third"):
                note.write(text)
            with pytest.raises(MoerayError, match="see whether it runs"):
                note.read()
            while "does not keep what is wanted" not in caplog.text:
                with pytest.raises(MoerayError):
                    note.read()
    finally:
        head.send_signal(signal.SIGCONT)
    until_read(note, b"third")
    note.close()
