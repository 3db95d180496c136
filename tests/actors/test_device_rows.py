"""Rows that stay on a device between a router's dispatcher and expert actors, each in a process of its own."""

from __future__ import annotations

import logging
import threading
from ctypes import c_uint64
from dataclasses import replace

import pytest
import torch

from moeray.actors.expert import ExpertActor
from moeray.errors import ChannelClosedError
from moeray.model.kernels import available
from moeray.wire.channel import connect
from moeray.wire.device_memory import DeviceMemoryError
from moeray.wire.device_rows import KEY, place_tokens
from moeray.wire.device_side import device_side
from moeray.wire.frame import Frame, Op
from moeray.wire.host_memory import HostMemory
from tests.checkpoints import make_tiny
from tests.device_peers import (
    MEMORIES,
    NODE,
    Routing,
    all_experts,
    experts,
    memory_of,
    problem,
    ring_bytes,
    spec_of,
    start_router,
)
from tests.systems import tiny_config
from tests.wire.support import eventually

pytestmark = pytest.mark.skipif(not available(), reason="of torch's products a row's bits depend on the rows beside it")

CPU = torch.device("cpu")
RING, SMALL = 64 << 10, 4 << 10
SIZES = [1, 3, 16, 200, 64, 200, 5, 3000, 7, 200]
"""Tokens of layers, which go around a ring many times."""
TOTAL = 2 * sum(SIZES)
"""Their rows."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("mixtral", tmp_path_factory.mktemp("device") / "m")


@pytest.fixture(scope="module", params=MEMORIES)
def pair(request, model):
    """A kind of memory, and two expert actors that have it."""
    with experts(config_of(model), [request.param] * 2) as running:
        yield request.param, running


def config_of(model, device_rows="on", ring=RING):
    return tiny_config(model, dtype="bfloat16", wire__device_rows=device_rows, wire__shared_memory_bytes=ring)


def all_layers(config, running, kind, memory=None):
    """Each layer's outputs, and the rows by device and by socket."""
    routing = Routing(config, [expert.address for expert in running], kind, memory)
    try:
        outs = [layer(routing, n, kind) for n in range(len(SIZES))]
        return outs, routing.rows("device"), routing.rows("unix")
    finally:
        routing.close()


def layer(routing, n, kind):
    x_TD, ids_TK = problem(SIZES[n % len(SIZES)], kind)
    return routing.dispatcher(n % 2, x_TD, ids_TK).cpu().clone()


def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_outputs_are_those_of_the_way_through_the_hosts_memory_bit_by_bit(model, pair):
    kind, running = pair
    wanted, none, all_of_them = all_layers(config_of(model, "off"), running, kind)
    assert (none, all_of_them) == (0, TOTAL)
    got, by_device, by_socket = all_layers(config_of(model), running, kind)
    assert same(got, wanted)
    assert (by_device, by_socket) == (TOTAL, 0)
    assert eventually(lambda: [expert.held_bytes() for expert in running] == [0, 0])


@pytest.mark.parametrize("kind", MEMORIES)
def test_outputs_that_find_no_room_come_through_the_hosts_memory(model, kind):
    """The actor's ring takes 16 rows, a router's piece has 64."""
    with experts(config_of(model, ring=SMALL), [kind]) as running:
        wanted, *_ = all_layers(config_of(model, "off"), running, kind)
        got, by_device, _ = all_layers(config_of(model), running, kind)
        assert same(got, wanted)
        assert by_device == TOTAL


def test_rows_that_find_no_room_go_through_the_hosts_memory(model, pair):
    kind, running = pair
    wanted, *_ = all_layers(config_of(model, "off"), running[:1], kind)
    routing = Routing(config_of(model), [running[0].address], kind)
    try:
        rings = routing.channels["experts-0"].device
        rings.commit(rings.reserve(RING), RING)  # as if the actor had read none of it
        assert same([layer(routing, n, kind) for n in range(len(SIZES))], wanted)
        assert (routing.rows("device"), routing.rows("unix")) == (0, TOTAL)
    finally:
        routing.close()


@pytest.mark.parametrize("kind", MEMORIES)
def test_actors_that_share_no_memory_serve_beside_those_that_do(model, kind):
    """As CPU actors beside GPU actors; `on` is no matter of theirs."""
    with experts(config_of(model), [kind, "none"]) as running:
        wanted, *_ = all_layers(config_of(model, "off"), running, kind)
        got, by_device, by_socket = all_layers(config_of(model), running, kind)
        assert by_device > 0
        assert by_socket > 0
        assert by_device + by_socket == TOTAL
        if kind == "host":
            assert same(got, wanted)
        else:  # of another processor's kernels
            assert all(torch.allclose(a, b, atol=0.02, rtol=0.05) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("kind", MEMORIES)
def test_an_actor_that_is_killed_costs_no_row_and_its_memory_comes_back(model, kind):
    with experts(config_of(model), [kind, kind]) as running:
        wanted, *_ = all_layers(config_of(model, "off"), running, kind)
        routing = Routing(config_of(model), [expert.address for expert in running], kind)
        begun, done = threading.Event(), []

        def go_on():
            for n in range(20 * len(SIZES)):
                done.append(torch.equal(layer(routing, n, kind), wanted[n % len(SIZES)]))
                if n == 2:
                    begun.set()

        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            assert begun.wait(30)
            running[0].process.kill()
            thread.join(120)
            assert done == [True] * 20 * len(SIZES)
            assert [actor for actor, _ in routing.losses] == ["experts-0"]
            assert eventually(lambda: routing.side.held_bytes == RING)  # the other actor's
        finally:
            routing.close()
        assert eventually(lambda: routing.side.held_bytes == 0)


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_router_that_is_killed_costs_the_actor_nothing(model, kind):
    config = config_of(model)
    actor = ExpertActor(spec_of(config, "experts-0", kind), NODE, memory=memory_of(kind))
    try:
        _, address = actor.start()
        actor.host(all_experts())
        process, by_device = start_router(config, address, kind)
        try:
            assert by_device == 2 * 16
            assert ring_bytes(actor) == RING
        finally:
            process.kill()
            process.join()
        assert eventually(lambda: ring_bytes(actor) == 0)
        routing = Routing(config, [address], kind)
        try:
            layer(routing, 3, kind)
            assert routing.rows("device") == 2 * SIZES[3]
            assert ring_bytes(actor) == RING
        finally:
            routing.close()
    finally:
        actor.stop()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda rings, name: setattr(progress(rings), "value", 1 << 40), "never written"),
        (lambda rings, name: name.__setitem__(0, 3 * RING), "outside its ring"),
        (lambda rings, name: name.__setitem__(1, 1), "do not fit"),
        (lambda rings, name: name.__setitem__(3, 6), "cannot be"),
        (lambda rings, name: name.append(0), "another way"),
    ],
    ids=["progress", "position", "rows", "dtype", "name"],
)
def test_a_router_that_says_what_cannot_be_is_told_so_and_others_are_served(model, spoil, words):
    config = config_of(model)
    spec = spec_of(config, "experts-0", "host")
    actor = ExpertActor(spec, NODE, memory=HostMemory())
    try:
        _, address = actor.start()
        actor.host(all_experts())
        side = device_side(CPU, config.wire, HostMemory())
        identity = replace(spec.identity(NODE), actor_id="router-1")
        channel = connect(address, identity, config.wire, timeout=20.0, side=side)
        x_TD, _ = problem(4, "host")
        rings = channel.device
        name = list(place_tokens(rings, x_TD, torch.arange(4).numpy().tobytes()))
        spoil(rings, name)
        meta = {"experts": [0], "counts": [4], KEY: name}
        channel.send(Frame(Op.FORWARD, 9, 0, 1, meta, (torch.arange(4),)))
        answer = channel.recv(20.0)
        assert (answer.op, answer.id, answer.meta["kind"]) == (Op.ERROR, 9, "failed")
        assert words in answer.meta["message"]
        routing = Routing(config, [address], "host")
        layer(routing, 3, "host")
        assert routing.rows("device") == 2 * SIZES[3]
        routing.close()
        channel.close()
    finally:
        actor.stop()


def progress(rings):
    """What this side says of how far it has read the actor's ring."""
    return c_uint64.from_address(rings._peers.ring.progress)


class Blind(HostMemory):
    """A device that reads no other process's memory, as a GPU that is not visible here."""

    def open(self, handle, device_name, nbytes):
        raise DeviceMemoryError("the peer's GPU is not visible here")


def test_where_the_self_check_fails_rows_go_through_the_hosts_memory_with_a_warning(model, pair, caplog):
    kind, running = pair
    if kind != "host":
        pytest.skip("the router's memory is the host's here")
    with caplog.at_level(logging.WARNING):
        wanted, *_ = all_layers(config_of(model, "off"), running[:1], kind)
        got, by_device, by_socket = all_layers(config_of(model, "auto"), running[:1], kind, memory=Blind())
    assert same(got, wanted)
    assert (by_device, by_socket) == (0, TOTAL)
    assert caplog.messages == [
        "rows to experts-0 and back go through the host's memory: the peer's GPU is not visible here"
    ]
    assert eventually(lambda: running[0].held_bytes() == 0)


def test_a_closed_channels_rings_are_used_no_more(model, pair):
    kind, running = pair
    routing = Routing(config_of(model), [running[0].address], kind)
    channel = routing.channels["experts-0"]
    rings = channel.device
    with rings.use():
        channel.close()
        assert routing.side.held_bytes == RING  # whoever is at it goes on
    with pytest.raises(ChannelClosedError), rings.use():
        raise AssertionError
    assert eventually(lambda: routing.side.held_bytes == 0)
    routing.close()
