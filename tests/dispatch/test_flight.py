"""Whose answer is taken next, over real channels."""

from __future__ import annotations

import time

import pytest
import torch

from moeray.dispatch.flight import Flight, Sent
from moeray.dispatch.plan import Share
from moeray.errors import ChannelTimeoutError
from moeray.wire.frame import Frame, Limits, Op
from moeray.wire.row_message import native
from tests.wire.support import admitted_pair

LIMITS = Limits(1 << 12, 1 << 20)
ROW = torch.zeros(1, dtype=torch.int64).numpy().tobytes()


@pytest.fixture
def pairs():
    ends = {name: admitted_pair(LIMITS, 1 << 20) for name in "ab"}
    yield ends
    for pair in ends.values():
        for channel in pair:
            channel.close()


def sent(name, channel, seconds):
    now = time.monotonic()
    return Sent(1, Share(name, [0], [1], ROW, ROW, ROW), channel, now, seconds, now + seconds, "unix")


def test_a_channel_that_is_closed_already_comes_before_one_that_is_silent(pairs):
    """Its rows go to another actor at once, instead of after the deadline of the silent one."""
    flight = Flight(0, None, 30.0, time.monotonic)
    silent, closed = sent("a", pairs["a"][0], 20.0), sent("b", pairs["b"][0], 30.0)
    flight.add(silent)
    flight.add(closed)
    pairs["b"][0].close()
    assert flight.first(torch.zeros(1, 1, 8)) == (closed, None)
    assert flight.sent == [silent]


def test_who_answers_everything_but_what_was_asked_is_waited_for_no_longer(pairs):
    ours, theirs = pairs["a"]
    flight = Flight(0, None, 30.0, time.monotonic)
    for _ in range(50):
        theirs.send(Frame(Op.RESULT, 7, meta={"compute_s": 0.0, "queue_s": 0.0}, tensors=(torch.zeros(1, 8),)))
    with pytest.raises(ChannelTimeoutError):
        flight.answer(sent("a", ours, 0.0))


@pytest.mark.skipif(native is None, reason="the compiled part is not there")
@pytest.mark.parametrize("meta", [{"device": [0, 1, 8, 0]}, {}], ids=["on a device", "through the host"])
def test_of_outputs_on_a_device_those_that_have_come_are_first_and_are_left_to_be_read(pairs, meta):
    """Whose deadline ends first is no matter, and nothing is taken by C, which knows no such memory."""
    flight = Flight(0, None, 30.0, time.monotonic)
    silent, answered = sent("a", pairs["a"][0], 20.0), sent("b", pairs["b"][0], 30.0)
    flight.add(silent)
    flight.add(answered)
    tensors = () if meta else (torch.ones(1, 8),)
    pairs["b"][1].send(Frame(Op.RESULT, 1, meta={"compute_s": 0.5, "queue_s": 0.0, **meta}, tensors=tensors))
    assert flight.first(None) == (answered, None)
    assert flight.sent == [silent]
    frame = flight.answer(answered)
    assert (frame.meta["compute_s"], len(frame.tensors)) == (0.5, len(tensors))
