"""A router's control: reports, drains, fences, and what it does when nobody is left to control it."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from moeray.actors.client import RouterClient
from moeray.actors.messages import error_from, output_from, request_tree
from moeray.actors.router import RouterActor
from moeray.config import overlay
from moeray.control.placement import Placement
from moeray.control.reports import RouterReport, report_from
from moeray.errors import ChannelClosedError, MoerayError, RouterLostError
from moeray.settings.engine import LEAST_CHUNK
from moeray.types import FinishReason, GenerationRequest, Lifecycle, SamplingParams, TokenOutput
from moeray.wire.channel import Channel
from moeray.wire.frame import Frame, Op
from tests.checkpoints import make_tiny
from tests.fleet import Fleet, generated


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("mixtral", tmp_path_factory.mktemp("router") / "m")


@pytest.fixture
def fleet(model) -> Iterator[Fleet]:
    with Fleet(model) as fleet:
        yield fleet


def request(request_id: str, attempt: int = 0, max_tokens: int = 300, output_ids=(), **sampling) -> GenerationRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, **{"ignore_eos": True} | sampling)
    return GenerationRequest(request_id, (5, 9, 33), params, tuple(output_ids), attempt)


def submit(channel: Channel, asked: GenerationRequest) -> None:
    channel.send(Frame(Op.SUBMIT, 1, meta=request_tree(asked)))


def frames(channel: Channel, *, timeout: float = 20.0) -> Iterator[Frame]:
    while True:
        yield channel.recv(timeout)


def outputs(channel: Channel) -> Iterator[TokenOutput]:
    for frame in frames(channel):
        if frame.op is Op.STEP:
            yield from map(output_from, frame.meta["outputs"])


def until_end(channel: Channel) -> list[TokenOutput]:
    taken = []
    for output in outputs(channel):
        taken.append(output)
        if output.finish_reason:
            return taken
    raise AssertionError("the channel ended before the request")


def stats(channel: Channel) -> RouterReport:
    channel.send(Frame(Op.STATS, 77))
    frame = next(frame for frame in frames(channel) if frame.op is Op.STATS and frame.id == 77)
    report = report_from(frame.meta)
    assert isinstance(report, RouterReport)
    return report


def in_thread(function, *args) -> tuple[threading.Thread, list]:
    results: list = []
    thread = threading.Thread(target=lambda: results.append(function(*args)))
    thread.start()
    return thread, results


# -- reports ----------------------------------------------------------------------------------------------------------


def test_a_report_has_the_counts_of_the_engine(fleet):
    router = fleet.add_router()
    channel = fleet.connect(router)
    before = stats(channel)
    assert (before.steps, before.epoch, before.leaving, before.lost) == (0, 1, False, ())
    submit(channel, request("a", max_tokens=10))
    until_end(channel)
    after = stats(channel)
    assert (after.prompt_tokens, after.generation_tokens, after.running) == (3, 10, 0)
    assert after.steps == 10
    assert after.step_s > 0
    assert (after.requests, after.late) == (1, 0)
    assert after.incarnation == before.incarnation
    assert stats(fleet.connect(fleet.add_router())).incarnation != before.incarnation


def test_a_report_counts_the_requests_that_missed_an_objective(model):
    with Fleet(model, control__slo_ttft_s=1e-9) as fleet:
        channel = fleet.connect(fleet.add_router())
        submit(channel, request("a", max_tokens=2))
        until_end(channel)
        submit(channel, request("b"))
        next(outputs(channel))
        channel.send(Frame(Op.ABORT, 2, meta={"request_id": "b", "attempt": 0}))
        submit(channel, request("c"))
        next(output for output in outputs(channel) if output.request_id == "c")
        channel.send(Frame(Op.ABORT, 3, meta={"request_id": "c", "attempt": 0, "stopped": True}))
        submit(channel, request("d", max_tokens=2))
        until_end(channel)  # so the loop has seen the others' ends
        after = stats(channel)
        assert (after.requests, after.late) == (3, 3)  # "b", which its client gave up, says nothing
        ends = after.metrics["moeray_request_success_total"]
        assert {key[-1]: count for key, count in ends.items() if count} == {"length": 2, "abort": 1, "stop": 1}


def test_a_pace_holds_from_the_next_step_on(model):
    """By so short an objective that a prompt takes as little of each step as it ever does."""
    with Fleet(model, engine__prefill_chunk=64) as fleet:
        router = fleet.add_router()
        router.configure(overlay(fleet.config, {"control": {"slo_tpot_s": 1e-6, "slo_pace": 0.5}}), 1.0)
        channel = fleet.connect(router)
        submit(channel, request("stream", max_tokens=400))
        next(outputs(channel))
        before = stats(channel).steps
        params = SamplingParams(max_tokens=1, temperature=0.0)
        submit(channel, GenerationRequest("long", tuple(5 + i % 50 for i in range(400)), params))
        next(output for output in outputs(channel) if output.request_id == "long")
        assert stats(channel).steps - before >= (400 - 64 - 32) // LEAST_CHUNK


def test_a_report_does_not_wait_for_the_step_that_waits_for_an_expert(fleet):
    """Losses and orphans are told without being asked, then the step goes on with a new actor."""
    router = fleet.add_router()
    ingress, observer = fleet.connect(router), fleet.connect(router)
    assert stats(observer).lost == ()
    fleet.expert.stop()
    submit(ingress, request("a", max_tokens=5))
    told = (report_from(frame.meta) for frame in frames(observer) if frame.op is Op.STATS and frame.id == 0)
    assert next(report for report in told if report.lost).lost == (("experts-0", "closed"),)
    assert next(report for report in told if report.orphans).running == 1
    assert stats(observer).orphans > 0  # while the step waits
    assert stats(fleet.connect(router)).lost == (("experts-0", "closed"),)  # to one who comes later
    fleet.renew_expert(router)
    assert len(until_end(ingress)) == 5
    report = stats(fleet.connect(router))
    assert (report.lost, report.orphans, report.epoch) == ((), 0, 2)


def test_a_restored_actor_is_used_again(fleet):
    router = fleet.add_router()
    ingress, observer = fleet.connect(router), fleet.connect(router)
    stats(observer)
    fleet.expert.stop()
    submit(ingress, request("a", max_tokens=5))
    next(frame for frame in frames(observer) if frame.op is Op.STATS and frame.meta["orphans"])
    fleet.start_expert()  # under its old name, at its old address
    router.restore("experts-0")
    assert len(until_end(ingress)) == 5
    assert stats(fleet.connect(router)).lost == ()


def test_a_stop_does_not_wait_for_the_step_that_waits_for_an_expert(fleet):
    router = fleet.add_router()
    ingress, observer = fleet.connect(router), fleet.connect(router)
    stats(observer)
    fleet.expert.stop()
    submit(ingress, request("a", max_tokens=5))
    next(frame for frame in frames(observer) if frame.op is Op.STATS and frame.meta["orphans"])
    router.stop()
    assert not router._loop._thread.is_alive()


def test_leaving_is_told_at_once(fleet):
    router = fleet.add_router()
    observer = fleet.connect(router)
    stats(observer)
    router.leave()
    assert report_from(observer.recv(10).meta).leaving
    assert stats(observer).leaving


def test_a_description_is_enough_to_take_the_router_over(fleet):
    router = fleet.add_router()
    found = router.describe()
    assert (found["kind"], found["group"], found["state"], found["epoch"]) == ("router", "router", "ready", 1)
    assert (found["system"], found["token"]) == (fleet.system, fleet.token)
    assert found["address"]["unix"] == fleet.addresses[router].unix
    assert found["facts"]["vocab_size"] == fleet.facts["vocab_size"]
    assert Placement.from_tree(found["placement"]) == fleet.placement
    assert set(found["addresses"]) == {"experts-0"}


# -- drain ------------------------------------------------------------------------------------------------------------


def refusal(channel: Channel) -> MoerayError:
    return error_from(next(frame for frame in frames(channel) if frame.op is Op.ERROR).meta)


def test_a_drain_finishes_what_runs_and_refuses_what_comes(fleet):
    router = fleet.add_router()
    channel, other = fleet.connect(router), fleet.connect(router)
    submit(channel, request("a"))
    running = outputs(channel)
    assert next(running).token_ids
    drain, drained = in_thread(router.drain, 60.0)
    while True:  # until the drain has begun
        submit(other, request("b", max_tokens=1))
        if next(frame for frame in frames(other) if frame.op in (Op.ERROR, Op.STEP)).op is Op.ERROR:
            break
    submit(other, request("c"))
    assert isinstance(refusal(other), RouterLostError)
    assert len(list(zip(range(299), running, strict=False))) == 299
    drain.join(60)
    assert drained == [True]
    assert router.describe()["state"] == Lifecycle.DRAINING


def test_a_drained_router_has_sent_all_that_it_had(fleet):
    router = fleet.add_router()
    channel = fleet.connect(router)
    submit(channel, request("a", max_tokens=40))
    next(outputs(channel))
    assert router.drain(60.0)
    fleet.kill(router)
    assert until_end(channel)[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(("timeout", "migrate"), [(60.0, True), (0.05, False)])
def test_a_drain_hands_over_what_is_left(fleet, timeout, migrate):
    router = fleet.add_router()
    channel, idle = fleet.connect(router), fleet.connect(router)
    for i in range(8):
        submit(channel, request(f"r{i}", max_tokens=400))
    next(outputs(channel))
    assert not router.drain(timeout, migrate)
    assert next(frame for frame in frames(channel) if frame.op is Op.GOODBYE)
    assert idle.recv(10).op is Op.GOODBYE
    assert router.drain(60.0)  # nothing is left of what was handed over
    assert generated(router) < 8 * 400


def test_a_client_learns_that_its_router_drains(fleet):
    async def run():
        client = RouterClient(fleet.addresses[router], fleet.identity(), fleet.config.wire)
        stream = client.generate(request("a"))
        await anext(stream)
        await asyncio.to_thread(router.drain, 60.0, True)
        with pytest.raises(RouterLostError, match="draining"):
            async for _ in stream:
                pass
        with pytest.raises(RouterLostError, match="draining"):
            await anext(client.generate(request("b")))
        await client.close()

    router = fleet.add_router()
    asyncio.run(run())


# -- fences -----------------------------------------------------------------------------------------------------------


def test_a_newer_attempt_takes_the_request_over(fleet):
    """Also from the channel of the older one, whose abort and end no longer count."""
    router = fleet.add_router()
    old, new = fleet.connect(router), fleet.connect(router)
    submit(old, request("a"))
    first = next(outputs(old)).token_ids
    submit(new, request("a", attempt=1, max_tokens=20, output_ids=first))
    resumed = outputs(new)
    taken = [next(resumed)]
    old.send(Frame(Op.ABORT, meta={"request_id": "a", "attempt": 0}))
    new.send(Frame(Op.ABORT, meta={"request_id": "a", "attempt": 0}))
    old.close()
    taken += zip(range(18), resumed, strict=False)
    assert len(taken) == 19
    assert not router.drain(0.0, True)


def test_the_error_of_a_failed_step_carries_the_attempt(model, caplog):
    with Fleet(model, wire__deadline_s=0.3) as fleet:
        router = fleet.add_router()
        channel = fleet.connect(router)
        fleet.expert.stop()
        submit(channel, request("a", attempt=4))
        end = until_end(channel)[-1]
        assert (end.attempt, end.finish_reason) == (4, FinishReason.ERROR)
        assert f"with it: {end.error}" in caplog.text
        assert "Traceback" not in caplog.text
        assert "experts-0" in end.error or "no replica" in end.error


def test_rows_without_a_replica_wait_as_long_as_a_request_has_time(model, caplog):
    """Whose time is up ends with what is missing; the other has the tokens that it would have had."""
    with Fleet(model, wire__deadline_s=0.3) as fleet:
        router = fleet.add_router()
        channel = fleet.connect(router)
        submit(channel, request("before", max_tokens=20))
        undisturbed = [token for output in until_end(channel) for token in output.token_ids]
        fleet.expert.stop()
        nobody = Placement(router.epoch + 1, dict.fromkeys(fleet.placement.replicas, ()))
        router.publish(nobody.to_tree(), {}, None, ["experts-0"])
        submit(channel, replace(request("short", max_tokens=20), timeout_s=2.0))
        submit(channel, replace(request("long", max_tokens=20), timeout_s=300.0))
        short = until_end(channel)[-1]
        assert (short.request_id, short.finish_reason) == ("short", FinishReason.ERROR)
        waited = re.match(r"expert \d of layer 0 has had no replica for ([\d.]+) s; start another", short.error)
        assert 0.3 < float(waited[1]) < 3.0
        assert "the step failed, and 1 of" in caplog.text
        orphans = 0
        while not orphans:  # the step was begun anew, and waits beyond wire.deadline_s
            orphans = stats(channel).orphans
        fleet.renew_expert(router)
        long = until_end(channel)
        assert [token for output in long for token in output.token_ids] == undisturbed
        assert {output.request_id for output in long} == {"long"}


@pytest.mark.parametrize(
    ("output_ids", "options", "reason"),
    [
        ((7, 8), {"max_tokens": 2}, FinishReason.LENGTH),
        ((7, 8), {"stop_token_ids": (8,)}, FinishReason.STOP),
        ((7, 2), {"ignore_eos": False}, FinishReason.STOP),
        ((7,) * 509, {"max_tokens": 509}, FinishReason.LENGTH),
    ],
)
def test_a_resumed_request_that_had_come_to_its_end(fleet, output_ids, options, reason):
    router = fleet.add_router()
    channel = fleet.connect(router)
    submit(channel, request("a", attempt=1, output_ids=output_ids, **options))
    assert until_end(channel) == [TokenOutput("a", 1, (), finish_reason=reason)]
    assert stats(channel).steps == 0


def test_a_request_that_no_step_can_compute_ends_alone_with_those_beside_it(fleet):
    router = fleet.add_router()
    channel = fleet.connect(router)
    sampling = SamplingParams(temperature=1.0, top_k=2.5)  # which an endpoint would refuse
    submit(channel, GenerationRequest("odd", (5, 9), sampling))
    assert until_end(channel)[-1].finish_reason is FinishReason.ERROR
    submit(channel, request("good", max_tokens=3))
    assert [len(output.token_ids) for output in until_end(channel)] == [1, 1, 1]
    assert router.describe()["state"] == Lifecycle.READY


# -- orphans ----------------------------------------------------------------------------------------------------------


def test_a_router_that_hears_of_no_controller_stops(model):
    now, stopped = 0.0, threading.Event()
    with Fleet(model, control__orphan_s=0.5) as fleet:
        router = fleet.add_router(on_stop=stopped.set, clock=lambda: now)
        channel = fleet.connect(router)
        now = 1.0
        assert stopped.wait(30)
        with pytest.raises(ChannelClosedError):
            channel.recv(5)
        assert router.describe()["state"] == Lifecycle.STOPPED


def test_whoever_asks_keeps_a_router_alive(model):
    now, stopped = 0.0, threading.Event()
    with Fleet(model, control__orphan_s=100.0) as fleet:
        router = fleet.add_router(on_stop=stopped.set, clock=lambda: now)
        channel = fleet.connect(router)
        for ask in (lambda: stats(channel), router.status, router.metrics, router.describe):
            now += 99.0
            ask()
            assert router._vigil is not None
            assert router._vigil._last == now
        channel.send(Frame(Op.PING))
        now += 1.0
        assert next(frame for frame in frames(channel) if frame.op is Op.PONG)
        assert router._vigil._last == now - 1.0  # an ingress is no controller


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_step_loop_that_dies_stops_its_router(fleet):
    stopped = threading.Event()
    router: RouterActor = fleet.add_router(on_stop=stopped.set)
    channel = fleet.connect(router)
    router._loop._inbox.put(lambda: 1 / 0)
    assert stopped.wait(30)
    with pytest.raises(ChannelClosedError):
        channel.recv(5)
