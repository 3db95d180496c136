"""What a sender leaves behind that did not come to its end: half a frame, and outputs that were placed for nothing."""

from __future__ import annotations

import select
import signal
import threading

import pytest
import torch

from moeray.errors import ChannelClosedError
from moeray.wire import row_message
from moeray.wire.frame import Frame, Limits, Op
from tests.wire.support import admitted_pair

LIMITS = Limits(1 << 12, 1 << 24)
RING = 1 << 20


def test_after_a_signal_in_the_middle_of_a_frame_nothing_follows_it():
    class Heeded(Exception):
        pass

    def heed(number, frame):
        raise Heeded

    a, b = admitted_pair(LIMITS, 0, soon_full=True)
    main = threading.main_thread().ident

    def interrupt() -> None:
        select.select([b._connection.sock], [], [])
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, heed)
    timer = threading.Thread(target=interrupt)
    try:
        timer.start()
        with pytest.raises(Heeded):
            a.send(Frame(Op.RESULT, 1, tensors=(torch.ones(1 << 20),)))
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    with pytest.raises(ChannelClosedError):
        a.send(Frame(Op.RESULT, 2, tensors=(torch.zeros(1 << 20),)))
    with pytest.raises(ChannelClosedError):
        b.recv(5.0)
    a.close()
    b.close()


@pytest.mark.skipif(row_message.native is None, reason="the part in C was not compiled on this machine")
@pytest.mark.parametrize("kib", [256, 1024])
def test_places_of_outputs_that_never_came_leave_the_ring_as_it_was(kib):
    a, b = admitted_pair(LIMITS, RING)
    for number in range(10):
        assert b.place_outputs(kib << 10) is not None
        b.send(Frame(Op.ERROR, number))
        assert a.recv(5.0).id == number
    large = torch.arange(kib << 8, dtype=torch.float32)
    for number in range(10):  # round the ring
        b.send(Frame(Op.RESULT, number, tensors=(large + number,)))
        assert torch.equal(a.recv(5.0).tensors[0], large + number)
        a.release()
    a.close()
    b.close()
