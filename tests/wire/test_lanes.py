"""A layer's messages on channels' ends: what the part in C sends and takes, and what it leaves to the channel."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import numpy as np
import pytest
import torch

from moeray.errors import ChannelClosedError
from moeray.wire import row_message
from moeray.wire.frame import Frame, Limits, Op, encode
from moeray.wire.rows import Result
from moeray.wire.socket_channel import RING_THRESHOLD, SocketChannel
from moeray.wire.tensors import CODES
from moeray.wire.unix_dial import UNIX
from tests.wire.support import admitted_pair

pytestmark = pytest.mark.skipif(row_message.native is None, reason="the part in C was not compiled on this machine")

LIMITS = Limits(1 << 12, 1 << 22)
RING = 1 << 20
SOON = 5.0


@pytest.fixture
def ends():
    """A router's and an expert actor's end of a channel."""
    a, b = admitted_pair(LIMITS, RING, soon_full=True)
    yield a, b
    a.close()
    b.close()


def ints(*values):
    return np.array(values, np.int64).tobytes()


def x_of(tokens, width=8):
    return torch.arange(tokens * width, dtype=torch.float32).view(tokens, width)


def take(wanted, out_TKD, timeout=SOON):
    tokens, top_k, width = out_TKD.shape
    code, row_bytes = CODES[out_TKD.dtype], width * out_TKD.itemsize
    asked = [(channel.lane, frame_id, to) for channel, frame_id, to in wanted]
    return row_message.native.take_result(asked, code, width, row_bytes, out_TKD.data_ptr(), tokens * top_k, timeout)


def answer(channel, frame_id, y_RD, compute_s=0.5):
    channel.send(Frame(Op.RESULT, frame_id, 3, 9, {"compute_s": compute_s, "queue_s": 0.25}, (y_RD,)))


@pytest.mark.parametrize("width", [8, RING_THRESHOLD // 8], ids=["through the socket", "in the ring"])
def test_answers_are_taken_as_they_come(ends, width):
    a, b = ends
    out_TKD = torch.zeros(2, 2, width)
    y_RD = x_of(2, width)
    answer(b, 8, y_RD)
    assert take([(a, 7, ints(0, 3)), (a, 8, ints(2, 1))], out_TKD) == (0, None, None), "one channel's come in order"
    assert take([(a, 8, ints(2, 1))], out_TKD) == (0, 0.5, 0.25)
    flat_RD = out_TKD.view(4, width)
    assert torch.equal(flat_RD[[2, 1]], y_RD)
    assert not flat_RD[[0, 3]].any()
    assert take([(a, 9, ints(0))], out_TKD, timeout=0.0) is None


def test_whoever_answers_first_is_taken_first(ends):
    a, b = ends
    other, silent = socket.socketpair()
    idle = SocketChannel(other, SOON, UNIX)
    peer = SocketChannel(silent, SOON, UNIX)
    admit = threading.Thread(target=idle.admit, args=("slow", LIMITS, 0, monotonic() + SOON))
    admit.start()
    peer.admit("router", LIMITS, 0, monotonic() + SOON)
    admit.join()
    out_TKD = torch.zeros(1, 2, 8)
    timer = threading.Thread(target=answer, args=(b, 7, x_of(1)))
    timer.start()
    assert take([(idle, 6, ints(0)), (a, 7, ints(1))], out_TKD) == (1, 0.5, 0.25)
    timer.join()
    assert torch.equal(out_TKD[0, 1], x_of(1)[0])
    peer.close()
    assert take([(idle, 6, ints(0))], out_TKD) == (0, None, None)
    with pytest.raises(ChannelClosedError):
        idle.recv(SOON)
    idle.close()


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Op.ERROR, 7, 3, 9, {"kind": "failed", "message": "no"}),
        Frame(Op.RESULT, 6, 3, 9, {"compute_s": 0.5, "queue_s": 0.25}, (x_of(1),)),  # too late, of an earlier one
        Frame(Op.RESULT, 7, 3, 9, {"compute_s": 0.5, "queue_s": 0.25}, (x_of(2),)),
        Frame(Op.RESULT, 7, 3, 9, {"compute_s": 0.5, "queue_s": 0.25}, (x_of(1).half(),)),
        Frame(Op.RESULT, 7, 3, 9, {"compute_s": 0.5, "queue_s": 0.25}, (x_of(1), x_of(1))),
        Frame(Op.RESULT, 7, 3, 9, {"compute_s": 0.5}, (x_of(1),)),
        Frame(Op.RESULT, 7, 3, 9, {"compute_s": 1, "queue_s": 0.25}, (x_of(1),)),
        Frame(Op.RESULT, 7, 3, 9, {"compute_s": 0.5, "queue_s": 0.25}, (x_of(1, 1 << 19),)),  # long, so not for here
    ],
    ids=["error", "late", "rows", "dtype", "tensors", "meta", "time", "large"],
)
def test_anything_else_is_left_for_the_channel_to_read(ends, frame):
    a, b = ends
    out_TKD = torch.zeros(1, 1, 8)
    sender = threading.Thread(target=b.send, args=(frame,))
    sender.start()
    assert take([(a, 7, ints(0))], out_TKD) == (0, None, None)
    assert not out_TKD.any()
    read = a.recv(SOON)
    sender.join()
    assert (read.op, read.id, read.meta, len(read.tensors)) == (frame.op, frame.id, frame.meta, len(frame.tensors))
    assert all(torch.equal(mine, its) for mine, its in zip(read.tensors, frame.tensors, strict=True))


def test_rows_that_belong_nowhere_are_put_nowhere(ends):
    a, b = ends
    answer(b, 7, x_of(1))
    for place in (-1, 1, 1 << 60):
        with pytest.raises(TypeError):
            take([(a, 7, ints(place))], torch.zeros(1, 1, 8))


@pytest.mark.parametrize("nbytes", [RING_THRESHOLD, RING // 2])
def test_outputs_that_lie_in_the_ring_go_out_from_there(ends, nbytes):
    a, b = ends
    width = nbytes // 4
    for number in range(5):  # around the ring's end
        place = b.place_outputs(nbytes)
        out = torch.frombuffer(place.memory, dtype=torch.float32)
        out.copy_(x_of(1, width)[0] + number)
        b.send_rows(Result(number, 3, 9, 0.5, 0.25, torch.float32, place, 1, width))
        frame = a.recv(SOON)
        assert frame.id == number
        assert torch.equal(frame.tensors[0][0], out)


def test_a_place_that_is_never_sent_is_given_back_with_the_next(ends):
    a, b = ends
    for number in range(20):  # more than the ring holds at once
        assert b.place_outputs(RING // 4) is not None
        answer(b, number, x_of(1, RING // 16))
        assert a.recv(SOON).id == number


def test_few_outputs_have_no_place_in_the_ring(ends):
    assert ends[1].place_outputs(RING_THRESHOLD - 64) is None
    assert ends[1].place_outputs(RING + 64) is None


def test_an_answer_that_trickles_in_is_waited_for_no_longer_than_any_other(ends):
    a, b = ends
    message = b"".join(encode(Frame(Op.RESULT, 8, 3, 9, {"compute_s": 0.5, "queue_s": 0.25}, (x_of(500),)), LIMITS))
    ended = threading.Event()

    def trickle():
        for at in range(len(message) - 1):
            b._connection.sock.sendall(message[at : at + 1])
            if ended.wait(0.02):
                return

    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(trickle)
        assert take([(a, 8, ints(*range(500)))], torch.zeros(500, 1, 8), timeout=0.3) is None
        ended.set()
        sent.result(SOON)


def test_a_closed_channel_has_no_lane(ends):
    a, b = ends
    a.close()
    assert a.lane == 0
    assert take([(b, 7, ints(0))], torch.zeros(1, 1, 8)) == (0, None, None)
