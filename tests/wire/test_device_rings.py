"""A channel's rings on a device: wrap-around, a full ring, what a peer may not say, and what comes before what."""

from __future__ import annotations

import gc
import os
from ctypes import c_uint64

import pytest
import torch

from moeray.errors import ChannelClosedError, WireError
from moeray.wire.device_rings import DeviceRings, PeersRing
from moeray.wire.device_rows import (
    KEY,
    brought,
    held,
    index_on,
    named_in,
    place,
    place_tokens,
    take_outputs,
)
from moeray.wire.device_side import DeviceSide
from moeray.wire.frame import Frame, Op
from moeray.wire.host_memory import HostMemory
from moeray.wire.lifeline import take_hold
from moeray.wire.ring import RingReader, RingWriter

RING = 64 << 10
WIDTH = 64


class Ends:
    """Two sides in one process, each with its own memory. `a` and `b`: their rings."""

    def __init__(self, first=None, second=None):
        self.sides = [DeviceSide(memory or HostMemory(), RING, required=True) for memory in (first, second)]
        host = [RingWriter(4096), RingWriter(4096)]
        own = [side.new_ring(writer) for side, writer in zip(self.sides, host, strict=True)]
        self.a, self.b = (
            DeviceRings(side.memory, own[mine], self._opened(side, own[1 - mine], host[1 - mine]), side.retired)
            for mine, side in enumerate(self.sides)
        )
        for ring in own:
            ring.lifeline.handed_over()
        for writer in host:
            writer.handed_over()
        self.progress = c_uint64.from_address(host[0].second_progress)
        self.rings = own[0].ring

    def _opened(self, side, peers, host):
        region = peers.region
        opened = side.memory.open(region.handle, region.device_name, len(region.memory))
        return PeersRing(opened, take_hold(peers.lifeline.path), RingReader(host.fd))

    def held_bytes(self):
        return [side.held_bytes for side in self.sides]


@pytest.fixture
def ends():
    ends = Ends()
    yield ends
    ends.a.close()
    ends.b.close()


def tokens_of(*numbers):
    """Distinct, in order."""
    return torch.tensor(sorted(numbers)).numpy().tobytes()


def numbers_of(*numbers):
    return torch.tensor(numbers).numpy().tobytes()


def rows(count, seed=0, dtype=torch.float32):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_arrive_as_they_were_time_and_again(ends, dtype):
    """Of different sizes, around the ring many times."""
    wraps = 0
    for n in range(200):
        x_TD, chosen = rows(100, n, dtype), tokens_of(*torch.randperm(100)[: 1 + n * 7 % 100].tolist())
        placed = place_tokens(ends.a, x_TD, chosen)
        wraps = placed.position // RING
        assert torch.equal(held(ends.b, placed), x_TD[index_on(chosen, x_TD.device)])
        ends.b.release()
    assert wraps > 10


def test_a_full_ring_has_no_room_until_the_peer_has_read(ends):
    """A row takes 256 bytes, so that 256 fill it."""
    x_TD = rows(100)
    first, second = (place_tokens(ends.a, x_TD, tokens_of(*range(100))) for _ in range(2))
    assert place_tokens(ends.a, x_TD, tokens_of(*range(100))) is None
    few = place_tokens(ends.a, x_TD, tokens_of(*range(56)))  # the rest
    assert few.position == 2 * 100 * 256
    assert place_tokens(ends.a, x_TD, tokens_of(0)) is None
    assert torch.equal(held(ends.b, first), x_TD)
    assert place_tokens(ends.a, x_TD, tokens_of(0)) is None  # it is being read
    ends.b.release()
    again = place_tokens(ends.a, rows(100, 1), tokens_of(*range(100)))
    assert again.position == RING  # at the first byte
    assert torch.equal(held(ends.b, second), x_TD)
    assert torch.equal(held(ends.b, few), x_TD[:56])
    assert torch.equal(held(ends.b, again), rows(100, 1))


def test_more_than_the_ring_never_fits(ends):
    assert place_tokens(ends.a, rows(257), tokens_of(*range(257))) is None
    assert place_tokens(ends.a, rows(256), tokens_of(*range(256))) is not None


def test_a_dtype_that_the_wire_does_not_know_stays_away(ends):
    assert place_tokens(ends.a, rows(2, dtype=torch.float64), tokens_of(0)) is None


def test_outputs_go_to_their_places(ends):
    out_RD, out_TKD = rows(3), torch.full((2, 2, WIDTH), 7.0)
    placed = place(ends.a, 3, out_RD, lambda to_RD: to_RD.copy_(out_RD))
    assert take_outputs(ends.b, placed, numbers_of(2, 0, 1), out_TKD)
    assert torch.equal(out_TKD.view(4, WIDTH)[[2, 0, 1]], out_RD)
    assert (out_TKD.view(4, WIDTH)[3] == 7.0).all()


@pytest.mark.parametrize("wrong", [{"rows": 2}, {"width": 32}, {"code": 2}])
def test_outputs_that_do_not_fit_are_not_copied(ends, wrong):
    out_TKD = torch.full((2, 2, WIDTH), 7.0)
    placed = place(ends.a, 3, rows(3), lambda to_RD: to_RD.fill_(1.0))
    assert not take_outputs(ends.b, placed._replace(**wrong), tokens_of(0, 1, 2), out_TKD)
    assert (out_TKD == 7.0).all()


@pytest.mark.parametrize("claim", [64, 1 << 60])
def test_a_peer_that_claims_to_have_read_what_was_never_written_is_found_out(ends, claim):
    ends.progress.value = claim
    with pytest.raises(WireError, match="never written"):
        place_tokens(ends.a, rows(1), tokens_of(0))


@pytest.mark.parametrize(("position", "count"), [(32, 1), (3 * RING, 1), (RING - 64, 1), (0, 257), (1 << 60, 1)])
def test_rows_outside_the_ring_are_refused(ends, position, count):
    placed = place_tokens(ends.a, rows(1), tokens_of(0))
    with pytest.raises(WireError, match="outside its ring"):
        held(ends.b, placed._replace(position=position, rows=count))


@pytest.mark.parametrize(
    "name",
    [None, 7, [0, 1, 64], [0, 1, 64, "0"], [0, 1, 64, True], [-64, 1, 64, 0], [0, -1, 64, 0], [0, 1, 64, 99],
     [0, 1, 64, 6], [0, 1, 64, 8]],
)  # fmt: skip
def test_a_name_of_rows_that_is_none_is_refused(name):
    with pytest.raises(WireError, match="rows on a device"):
        named_in(Frame(Op.FORWARD, meta={KEY: name}))


def test_rows_named_on_a_channel_without_a_device_are_refused():
    class Plain:
        device = None

    with pytest.raises(WireError, match="never shared"), brought(Frame(Op.FORWARD, meta={KEY: [0, 1, 64, 0]}), Plain()):
        raise AssertionError


class Ordered(HostMemory):
    """Notes how far the peer had given its room back when this side waited for its device."""

    def __init__(self):
        self.seen = []
        self.look = lambda: None

    def settle(self):
        self.seen.append(self.look())


def test_room_is_given_back_only_once_the_device_has_read():
    """A router that takes outputs waits for its device first, and gives the room back then."""
    memory = Ordered()
    ends = Ends(None, memory)
    memory.look = lambda: ends.progress.value
    placed = place(ends.a, 3, rows(3), lambda to_RD: to_RD.fill_(1.0))
    assert take_outputs(ends.b, placed, tokens_of(0, 1, 2), torch.empty(2, 2, WIDTH))
    assert memory.seen == [0]
    assert ends.progress.value == 3 * 256
    ends.a.close()
    ends.b.close()


def test_tokens_are_there_before_a_message_may_name_them():
    memory = Ordered()
    ends = Ends(memory, None)
    region = ends.a._own.region.memory
    memory.look = lambda: region[:256].clone()
    x_TD = rows(2)
    assert place_tokens(ends.a, x_TD, tokens_of(1)) is not None
    assert torch.equal(memory.seen[0].view(torch.float32), x_TD[1])
    ends.a.close()
    ends.b.close()


def test_memory_goes_when_both_ends_are_closed_and_nobody_is_at_it(ends):
    placed = place_tokens(ends.a, rows(1), tokens_of(0))
    with ends.b.use():
        there = held(ends.b, placed)
        ends.b.close()
        ends.a.close()
        assert ends.held_bytes() == [RING, RING]  # b reads a's, and has its own still open
        assert torch.equal(there, rows(1))
    assert ends.held_bytes() == [0, 0]


def test_memory_of_a_peer_that_is_gone_is_not_read(ends):
    placed = place_tokens(ends.a, rows(1), tokens_of(0))
    ends.a.close()
    with ends.b.use(), pytest.raises(ChannelClosedError, match="peer is gone"):
        held(ends.b, placed)


@pytest.mark.parametrize("first", "ab")
def test_one_end_that_closes_leaves_the_other_its_own(ends, first):
    mine = getattr(ends, first)
    mine.close()
    mine.close()
    with pytest.raises(ChannelClosedError), mine.use():
        raise AssertionError
    assert ends.held_bytes() == [RING, RING]  # the peer has it open, and does not know yet
    (ends.b if first == "a" else ends.a).close()
    assert ends.held_bytes() == [0, 0]


def test_rings_leave_no_descriptor_behind():
    before = len(os.listdir("/proc/self/fd"))
    ends = Ends()
    ends.a.close()
    ends.b.close()
    assert ends.held_bytes() == [0, 0]
    del ends
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
