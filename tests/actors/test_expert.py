"""An expert actor by itself, over its real channel."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from moeray.actors.expert import ExpertActor
from moeray.actors.spec import ActorSpec, model_fingerprint
from moeray.actors.tally import SAMPLES, Reservoir
from moeray.control.reports import ExpertReport, report_from
from moeray.errors import PlacementError
from moeray.model.experts import ExpertBank
from moeray.model.loading import open_model
from moeray.types import Address, ExpertId
from moeray.wire.channel import Channel, connect
from moeray.wire.frame import Frame, Op
from moeray.wire.identity import Identity
from tests.checkpoints import make_tiny
from tests.pages import CAN_FAULT_IN, in_page_table
from tests.systems import tiny_config

NODE = "expert-test"
MANY = 300_000
"""Rows that take the tiny experts some tenths of a second."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("mixtral", tmp_path_factory.mktemp("expert") / "m")


class Started:
    def __init__(self, model, **kwargs) -> None:
        actor = {key: kwargs.pop(key) for key in ("on_stop", "clock") if key in kwargs}
        self.config = tiny_config(model, control__orphan_s=kwargs.pop("orphan_s", 600.0), **kwargs)
        spec = ActorSpec("experts-0", "experts", "cpu", 1, self.config, b"token", "e5t")
        self.actor = ExpertActor(spec, NODE, **actor)
        self.report, self.address = self.actor.start()

    @contextmanager
    def channel(self, name: str = "router-0") -> Iterator[Channel]:
        me = Identity(name, NODE, model_fingerprint(self.config), b"token")
        channel = connect(self.address, me, self.config.wire, timeout=5.0)
        try:
            yield channel
        finally:
            channel.close()


@pytest.fixture
def started(model):
    started = Started(model)
    yield started
    started.actor.stop()


def forward(channel, x_TD, experts, counts=None, layer=0):
    counts = counts or [len(x_TD)] * len(experts)
    index = torch.arange(len(x_TD)).repeat(len(experts)) if len(x_TD) > 1 else torch.zeros(sum(counts)).long()
    channel.send(Frame(Op.FORWARD, 7, layer, meta={"experts": experts, "counts": counts}, tensors=(x_TD, index)))


def ask(channel, *args, **kwargs) -> Frame:
    forward(channel, *args, **kwargs)
    return channel.recv(20.0)


def stats(channel) -> ExpertReport:
    channel.send(Frame(Op.STATS, 3))
    frame = channel.recv(10.0)
    assert (frame.op, frame.id) == (Op.STATS, 3)
    return report_from(frame.meta)


def test_a_warm_actor_is_ready_and_hosts_nothing(started):
    started.actor.prepare()
    status = started.actor.status()
    assert (status["state"], status["experts"], status["weight_bytes"]) == ("ready", 0, 0)
    with started.channel() as channel:
        answer = ask(channel, torch.randn(2, 64), [0, 1])
        assert answer.op is Op.ERROR
        assert answer.meta["kind"] == "not_hosted"
        assert answer.meta["experts"] == [0, 1]
        started.actor.host([(0, 0), (0, 1)])
        assert ask(channel, torch.randn(2, 64), [0, 1]).op is Op.RESULT


@pytest.mark.skipif(not CAN_FAULT_IN, reason="the kernel does not know how")
def test_what_an_actor_hosts_is_in_its_page_table(tmp_path):
    started = Started(make_tiny("mixtral", tmp_path / "m"))
    try:
        started.actor.prepare()
        before = in_page_table(tmp_path)
        held = started.actor.host([(0, 0), (0, 1)])
        assert in_page_table(tmp_path) >= before + held
    finally:
        started.actor.stop()


def test_rows_come_back_as_the_bank_computes_them(started, model):
    started.actor.host([(0, 0), (0, 1)])
    files = open_model(str(model), None, node="here")
    bank = ExpertBank(files.family, files.weights, torch.float32, torch.device("cpu"))
    bank.load([ExpertId(0, 0), ExpertId(0, 1)])
    x_TD = torch.randn(5, 64)
    with started.channel() as channel:
        answer = ask(channel, x_TD, [0, 1])
        assert torch.equal(answer.tensors[0], bank.forward(0, torch.cat([x_TD, x_TD]), [0, 1], [5, 5]))


def test_unhosted_experts_are_refused_by_name_and_the_others_served(started):
    two = started.actor.host([(0, 0), (0, 1)])
    assert started.actor.unhost([(0, 1), (2, 5)]) == two // 2
    with started.channel() as channel:
        answer = ask(channel, torch.randn(2, 64), [0, 1])
        assert (answer.meta["kind"], answer.meta["experts"]) == ("not_hosted", [1])
        assert ask(channel, torch.randn(2, 64), [0]).op is Op.RESULT
        assert started.actor.host([(0, 1)]) == two
        assert ask(channel, torch.randn(2, 64), [0, 1]).op is Op.RESULT


def test_rows_being_computed_finish_after_an_unhost(model):
    files = open_model(str(model), None, node="here")
    bank = ExpertBank(files.family, files.weights, torch.float32, torch.device("cpu"))
    bank.load([ExpertId(0, 0)])
    x_TD = torch.randn(3, 64)
    before = bank.forward(0, x_TD, [0], [3])
    held = bank.hold(0, [0])
    bank.forget([ExpertId(0, 0)])
    assert torch.equal(held(x_TD, [3]), before)
    assert (bank.nbytes, bank.hosted) == (0, frozenset())


def test_an_actor_that_was_never_prepared_forgets_nothing(started):
    assert started.actor.unhost([(0, 0)]) == 0


def test_reports_are_answered_while_a_forward_computes(started):
    started.actor.host([(0, 0)])
    with started.channel() as rows, started.channel("controller") as control:
        forward(rows, torch.randn(1, 64), [0], [MANY])
        while not (report := stats(control)).in_flight:
            assert report.forwards == 0  # it has not begun
        assert report.forwards == 0
        assert rows.recv(30.0).tensors[0].shape == (MANY, 64)
        assert started.actor.drain(10.0)
        assert (report := stats(control)).in_flight == 0
        assert report.forwards == 1


def test_a_report_counts_from_the_start_and_its_quantiles_since_the_last(started):
    nbytes = started.actor.host([(0, 0), (0, 1), (2, 3)])
    with started.channel() as channel:
        for _ in range(3):
            ask(channel, torch.randn(2, 64), [0, 1])
        ask(channel, torch.randn(4, 64), [3], layer=2)
        first = stats(channel)
        assert first.rows == {ExpertId(0, 0): 6, ExpertId(0, 1): 6, ExpertId(2, 3): 4}
        assert (first.actor_id, first.forwards, first.memory_bytes) == ("experts-0", 4, nbytes)
        assert 0 < first.service_p50_s <= first.service_p99_s <= first.busy_s
        assert 0 <= first.queue_wait_p50_s <= first.queue_wait_p99_s
        second = stats(channel)
        assert (second.rows, second.busy_s) == (first.rows, first.busy_s)
        assert (second.service_p99_s, second.queue_wait_p99_s) == (0.0, 0.0)
        assert second.incarnation == first.incarnation


def test_each_start_is_another_incarnation(model, started):
    assert len({started.actor.describe()["incarnation"], described_once(model)["incarnation"]}) == 2


def described_once(model):
    config = tiny_config(model)
    actor = ExpertActor(ActorSpec("experts-1", "experts", "cpu", 1, config, b"token", "e5t"), NODE)
    try:
        return actor.describe()
    finally:
        actor.stop()


def test_a_controller_that_starts_again_learns_all_it_needs(started):
    started.actor.host([(2, 1), (0, 3)])
    told = started.actor.describe()
    assert Address(**told["address"]) == started.address
    assert told["experts"] == [[0, 3], [2, 1]]
    assert (told["actor_id"], told["kind"], told["group"]) == ("experts-0", "expert", "experts")
    assert (told["system"], told["token"], told["node"], told["pid"]) == ("e5t", b"token", NODE, started.report.pid)
    assert (told["device"], told["state"], told["leaving"], told["revision"]) == ("cpu", "ready", False, None)
    assert told["free_bytes"] > 0


def test_an_actor_that_leaves_says_so_and_serves_on(started):
    started.actor.host([(0, 0)])
    with started.channel() as channel:
        assert not stats(channel).leaving
        started.actor.leave()
        assert stats(channel).leaving
        assert ask(channel, torch.randn(2, 64), [0]).op is Op.RESULT


def test_a_drained_actor_hosts_nothing_more(started):
    started.actor.host([(0, 0)])
    assert started.actor.drain(5.0)
    with pytest.raises(PlacementError, match="experts-0 is draining; host elsewhere"):
        started.actor.host([(0, 1)])
    with started.channel() as channel:
        assert ask(channel, torch.randn(2, 64), [0]).op is Op.RESULT


def test_an_actor_holds_one_revision(started):
    started.actor.prepare()
    with pytest.raises(PlacementError, match="start another actor"):
        started.actor.host([(0, 0)], "other")


def test_a_failed_allocation_is_told_from_other_failures(started):
    started.actor.host([(0, 0)])
    with started.channel() as channel:
        # 2 ** 22 rows of 2 ** 23 numbers are more than a process can address
        wide = ask(channel, torch.zeros(1, 1 << 23), [0], [1 << 22])
        assert (wide.op, wide.meta["kind"]) == (Op.ERROR, "out_of_memory")
        assert ask(channel, torch.zeros(1, 65), [0], [1]).meta["kind"] == "failed"
        assert ask(channel, torch.zeros(1, 64), [0], [1]).op is Op.RESULT


@pytest.mark.parametrize(
    "meta", [{}, {"experts": 3, "counts": 1}, {"experts": [0], "counts": [-1]}, {"experts": [[0]], "counts": [1]}]
)
def test_a_forward_that_is_none_is_answered(started, meta):
    started.actor.host([(0, 0)])
    with started.channel() as channel:
        channel.send(Frame(Op.FORWARD, 1, 0, meta=meta, tensors=(torch.zeros(1, 64), torch.zeros(1).long())))
        assert channel.recv(10.0).meta["kind"] == "failed"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_actor_that_hears_of_no_controller_stops_itself(model):
    clock, stopped = Clock(), threading.Event()
    started = Started(model, orphan_s=0.02, clock=clock, on_stop=stopped.set)
    with started.channel("controller") as channel:
        for _ in range(5):
            clock.now += 0.015
            stats(channel)
        assert not stopped.is_set()
        clock.now += 0.021
        assert stopped.wait(10)
    assert started.actor.status()["state"] == "stopped"
    started.actor.stop()


def test_no_thread_outlives_the_actor(model):
    before = set(threading.enumerate())
    started = Started(model)
    with started.channel() as channel:
        stats(channel)
    started.actor.stop()
    started.actor.stop()
    assert set(threading.enumerate()) <= before


def test_a_reservoir_is_a_fair_sample():
    reservoir = Reservoir()
    assert reservoir.quantiles() == (0.0, 0.0)
    reservoir.add(3.0)
    assert reservoir.quantiles() == (3.0, 3.0)
    reservoir = Reservoir()
    for i in range(20 * SAMPLES):
        reservoir.add(i / (20 * SAMPLES))
    p50, p99 = reservoir.quantiles()
    assert p50 == pytest.approx(0.5, abs=0.1)
    assert p99 == pytest.approx(0.99, abs=0.02)


def test_an_actor_keeps_its_experts_as_the_config_says(tmp_path):
    """int8 experts take about half the memory, and answer almost as the others do."""
    model = make_tiny("mixtral", tmp_path / "m", dtype=torch.bfloat16)
    x_TD = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    answers, sizes = [], []
    for quantization in ("none", "int8"):
        started = Started(
            model, dtype="bfloat16", experts__quantization=quantization, cache_dir=str(tmp_path / "cache")
        )
        sizes.append(started.actor.host([(0, 0), (0, 1)]))
        with started.channel() as channel:
            answers.append(ask(channel, x_TD, [0, 1]).tensors[0].float().clone())
        started.actor.stop()
    assert 0.4 < sizes[1] / sizes[0] < 0.7
    error = float((answers[1] - answers[0]).norm() / answers[0].norm())
    assert 0.004 < error < 0.05
