"""Losses of every kind, over real channels."""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from moeray.dispatch.deadline import FRESH_S
from moeray.errors import MoerayError, NoReplicaError, PlacementError, WireError
from moeray.model.dispatched import Sum
from moeray.model.kernels import combine
from tests.dispatch.actors import (
    WIRE,
    Background,
    Stage,
    expected,
    garbage,
    hang,
    hold,
    misfit,
    refuse,
    serve,
    vanish,
)  # fmt: skip
from tests.threads import refuse_one
from tests.wire.support import OtherProcess

BOTH = {0: "ab", 1: "ab", 2: "ab"}
SPLIT = {0: "a", 1: "b"}


@pytest.fixture(autouse=True, params=[False, True], ids=["rows", "sums"])
def combines(request, monkeypatch):
    monkeypatch.setattr(Stage, "combines", request.param)


@pytest.fixture
def folder():
    path = Path(tempfile.mkdtemp(prefix="moeray-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def stage(folder):
    stage = Stage(folder, "abc")
    yield stage
    stage.close()


def retries(stage, reason):
    return stage.recorder.read()[1]["moeray_dispatch_retries_total"][reason,]


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [(vanish, "closed"), (misfit, "error"), (garbage, "error"), (refuse("out_of_memory"), "out_of_memory")],
)
def test_rows_of_a_lost_actor_go_to_another(stage, behaviour, reason):
    stage.publish(1, BOTH)
    stage.actors["a"].script = [behaviour]
    stage.dispatch([[0, 1], [1, 2], [2, 0]])
    assert stage.losses == [("a", reason)]
    assert retries(stage, reason) > 0
    stage.dispatch([[0, 1]])
    assert stage.actors["a"].forwards == 1
    assert stage.dispatcher.orphans == 0


def test_a_hung_actor_is_given_up_soon_and_used_again_once_it_is_restored(stage):
    stage.publish(1, {0: "ab"})
    stage.dispatch([[0]] * 40)  # its pages are in memory on both, and times are known
    a = stage.actors["a"]
    a.script = [hang]
    began = time.monotonic()
    stage.dispatch([[0]] * 40)
    assert 0.5 <= time.monotonic() - began < FRESH_S
    assert stage.losses == [("a", "timeout")]
    stage.dispatch([[0]] * 40)
    assert a.forwards == 2
    stage.view.restore("a")
    stage.dispatch([[0]] * 40)
    assert a.forwards == 3
    assert len(stage.losses) == 1


def test_after_each_timeout_an_actor_has_twice_as_long(stage):
    stage.publish(1, {0: "ab"})
    stage.dispatch([[0]] * 40)  # split, as one is not enough
    stage.actors["a"].script = [hang, hang]
    for least in (0.5, 1.0):
        began = time.monotonic()
        stage.dispatch([[0]] * 40)
        assert time.monotonic() - began >= least
        stage.view.restore("a")
    stage.dispatch([[0]] * 40)
    assert stage.losses == [("a", "timeout")] * 2


def test_an_actor_that_cannot_be_dialled_for_lack_of_files_is_one_that_is_lost(folder, monkeypatch):
    def no_files(*args):
        raise OSError(errno.EMFILE, "Too many open files")

    stage = Stage(folder, deadline_s=2.0)
    try:
        stage.publish(1, {0: "ab"})
        with monkeypatch.context() as patch:
            patch.setattr("moeray.wire.receiver.RingReader", no_files)
            with pytest.raises(MoerayError):
                stage.dispatch([[0]])
        assert {reason for _, reason in stage.losses} == {"error"}
        for actor in "ab":
            stage.view.restore(actor)
        stage.dispatch([[0]])
    finally:
        stage.close()


@pytest.mark.parametrize("thread", ["dial-a", "hang-up-a"])
def test_an_actor_for_which_there_is_no_thread_is_one_that_is_lost(stage, thread, monkeypatch):
    refuse_one(monkeypatch, thread.__eq__)
    stage.actors["a"].script = [vanish]
    stage.publish(1, SPLIT | {0: "ab"})
    for _ in range(3):
        stage.dispatch([[0, 1]])
    assert stage.losses == [("a", "closed")]


def test_a_hung_actor_holds_up_nobody_elses_answer(stage):
    stage.publish(1, SPLIT, known="abc")
    stage.dispatch([[0]] * 40 + [[1]])
    stage.actors["a"].script = [hang]
    stage.publish(2, {0: "ac", 1: "b"})
    began = time.monotonic()
    stage.dispatch([[0]] * 40 + [[1]])  # 0 is split; c is new and would have longer
    assert time.monotonic() - began < FRESH_S
    assert stage.losses == [("a", "timeout")]


def test_rows_are_sent_again_while_others_compute(stage):
    """b answers only after c was sent what a lost."""
    stage.publish(1, {0: "ac", 1: "b", 2: "c"})
    a, b, c = (stage.actors[name] for name in "abc")
    a.script, b.script = [vanish], [hold]
    dispatch = Background(lambda: stage.dispatch([[0, 1, 2]]))
    assert c.received.get(timeout=10) == {2: 1}
    assert c.received.get(timeout=10) == {0: 1}
    b.release.set()
    dispatch.join()
    assert stage.losses == [("a", "closed")]


def test_rows_that_wait_are_sent_to_a_new_replica_while_others_compute(stage):
    """b's second piece is answered only after c was sent what a lost."""
    experts = range(16)
    stage.publish(1, {expert: "a" if expert < 2 else "b" for expert in experts}, known="abc")
    a, b, c = (stage.actors[name] for name in "abc")
    orphaned = threading.Event()
    stage.on_orphans = orphaned.set

    def after_c(actor, channel, frame):
        c.received.get(timeout=10)
        return serve(actor, channel, frame)

    a.script, b.script = [vanish] * 2, [hold, after_c]
    dispatch = Background(lambda: stage.dispatch(many_rows()))
    assert orphaned.wait(10)
    stage.publish(2, {expert: "c" if expert < 2 else "b" for expert in experts}, known="bc", lost=["a"])
    b.release.set()
    dispatch.join()
    assert stage.losses == [("a", "closed")]


def test_without_a_ring_an_actor_that_computes_is_sent_nothing_more(folder):
    """It would answer the first while the router sends the second, and neither would read."""
    stage = Stage(folder, nodes="there")
    lost, unread = threading.Event(), []
    stage.on_loss = lambda *loss: lost.set()

    def look(actor, channel, frame):
        assert lost.wait(20)
        unread.extend(select.select([channel._connection.sock], [], [], 0.3)[0])
        return serve(actor, channel, frame)

    try:
        stage.publish(1, {0: "a", 1: "ba"})
        stage.actors["a"].script, stage.actors["b"].script = [look], [vanish]
        stage.dispatch([[0, 1]] * 40)
        assert stage.actors["a"].forwards == 2
        assert not unread
    finally:
        stage.close()


@pytest.mark.parametrize("nodes", ["here", "there"])
def test_a_placement_that_names_the_actor_lost_wakes_the_wait_at_once(folder, nodes):
    stage = Stage(folder, nodes=nodes)
    try:
        stage.publish(1, {0: "a"})
        stage.actors["a"].script = [hang]
        dispatch = Background(lambda: stage.dispatch([[0]]))
        stage.actors["a"].received.get(timeout=10)
        began = time.monotonic()
        stage.publish(2, {0: "b"}, lost=["a"])
        dispatch.join()
        assert time.monotonic() - began < FRESH_S
        assert stage.losses == []
    finally:
        stage.close()


@pytest.fixture
def stopped(folder, stage):
    """An actor `s`, whose process is stopped before anybody speaks to it: it lets one in, and never says a word."""
    other = folder / "other"
    other.mkdir(mode=0o700)
    actor = OtherProcess(other)
    actor.process.send_signal(signal.SIGSTOP)
    os.waitpid(actor.process.pid, os.WUNTRACED)
    stage.actors["s"] = actor
    return actor


def test_a_stopped_actor_keeps_nobody_elses_rows_waiting_and_is_dialled_no_longer_once_it_is_named_dead(stage, stopped):
    stage.patience_s = 600.0
    stage.publish(1, {0: "s", 1: "b"})
    dispatch = Background(lambda: stage.dispatch([[0, 1]]))
    assert stage.actors["b"].received.get(timeout=10) == {1: 1}
    assert stage.dialling == [stopped.address.actor_id]
    stage.publish(2, {0: "b", 1: "b"}, lost=["s"])
    dispatch.join()
    assert stage.actors["b"].received.get(timeout=10) == {0: 1}
    assert stage.dialling == [stopped.address.actor_id]
    stopped.process.kill()


def test_an_expected_actor_has_its_channel_before_it_is_sent_rows(stage):
    stage.publish(1, {0: "a"})
    stage.dispatcher.expect({name: stage.actors[name].address for name in "abc"})
    assert sorted(stage.dialled) == ["a", "b", "c"]
    stage.publish(2, BOTH)
    stage.dispatch([[0, 1]])
    assert sorted(stage.dialled) == ["a", "b", "c"]
    assert stage.actors["c"].hung_up.wait(10)  # no placement names it: it is forgotten


def test_who_does_not_answer_is_not_expected_for_ever(stage, stopped, monkeypatch):
    monkeypatch.setattr("moeray.dispatch.dispatcher.EXPECT_S", 0.01)
    stage.patience_s = 600.0
    stage.dispatcher.expect({"s": stopped.address, "b": stage.actors["b"].address})
    stage.publish(1, {0: "b"})
    stage.dispatch([[0]])
    stopped.process.kill()


def test_a_stopped_actor_is_given_up_when_it_does_not_take_the_call(stage, stopped):
    stage.publish(1, {0: "s"})
    stage.on_loss = lambda *loss: (stage.losses.append(loss), stage.publish(2, {0: "b"}))
    began = time.monotonic()
    stage.dispatch([[0]])
    assert stage.losses == [("s", "timeout")]
    assert time.monotonic() - began < FRESH_S


def test_an_abandoned_dispatcher_dials_nobody(stage, stopped):
    stage.patience_s = 600.0
    stage.publish(1, {0: "s", 1: "b"})
    dispatch = Background(lambda: stage.dispatch([[0, 1]]))
    stage.actors["b"].received.get(timeout=10)
    stage.dispatcher.abandon()
    with pytest.raises(MoerayError, match="is being stopped"):
        dispatch.join()
    stopped.process.kill()


def test_a_drained_actor_may_finish(stage):
    stage.publish(1, SPLIT)
    a, b = stage.actors["a"], stage.actors["b"]
    a.script = [hold]
    dispatch = Background(lambda: stage.dispatch([[0, 1]]))
    a.received.get(timeout=10)
    stage.publish(2, {0: "b", 1: "b"})
    a.release.set()
    dispatch.join()
    assert (a.forwards, b.forwards) == (1, 1)
    assert not a.hung_up.is_set()
    stage.dispatch([[0, 1]])
    assert a.hung_up.wait(10)
    assert a.forwards == 1
    assert stage.losses == []


def test_a_poison_frame_fails_the_step_and_takes_down_nobody(stage):
    stage.publish(1, BOTH)
    for name in "ab":
        stage.actors[name].script = [refuse("failed")] * 5
    with pytest.raises(MoerayError, match=r"expert 2 of layer 0 failed twice, on . and then on .: a poem of woe"):
        stage.dispatch([[2]])
    assert [stage.actors[name].forwards for name in "ab"] == [1, 1]
    for name in "ab":
        stage.actors[name].script.clear()
    stage.dispatch([[0, 1, 2]] * 3)
    assert stage.losses == []


def test_a_frame_that_no_channel_carries_fails_the_step_and_takes_down_nobody(stage):
    stage.publish(1, BOTH)
    too_wide = torch.zeros(1, WIRE.max_payload_bytes // 4 + 64)
    with pytest.raises(WireError, match="payload"):
        stage.dispatcher(0, too_wide, torch.tensor([[0]]))
    stage.dispatch([[0, 1, 2]])
    assert stage.losses == []


@pytest.mark.parametrize("replicas", [{0: "a"}, {0: "ab"}])
def test_a_forward_that_failed_is_tried_once_more(stage, replicas):
    stage.publish(1, replicas)
    stage.actors["a"].script = [refuse("failed")]
    stage.dispatch([[0]])
    assert stage.actors[replicas[0][-1]].forwards == len(replicas[0]) % 2 + 1
    assert stage.losses == []
    assert retries(stage, "failed") == 1


def test_an_actor_that_does_not_host_one_expert_keeps_the_others(stage):
    stage.publish(1, {0: "ab", 1: "a", 2: "b"})
    stage.actors["a"].script = [refuse("not_hosted", experts=[0])]
    stage.dispatch([[0, 2], [1, 2]])
    stage.dispatch([[0, 2], [1, 2]])
    assert stage.view.now.replicas[0] == {0: ("b",), 1: ("a",), 2: ("b",)}
    assert stage.losses == []


def test_rows_that_an_actor_refuses_again_and_again_fail_at_a_deadline(folder):
    stage = Stage(folder, "a", deadline_s=1.5)
    try:
        stage.publish(1, {0: "a"})
        stage.actors["a"].script = [refuse("not_hosted", experts=[0])] * 1000
        with pytest.raises(PlacementError, match=r"no actor answered for expert 0 of layer 0 within 3 s \(last a: "):
            stage.dispatch([[0]])
        assert stage.losses == []
        stage.actors["a"].script.clear()
        stage.publish(2, {0: "a"})
        stage.dispatch([[0]])
    finally:
        stage.close()


def test_rows_for_an_actor_without_an_address_wait_for_another(stage):
    waiting = threading.Event()
    stage.on_orphans = waiting.set
    stage.publish(1, {0: "b", 1: "a"}, known="a")
    dispatch = Background(lambda: stage.dispatch([[0, 1], [1, 0]]))
    assert waiting.wait(10)
    stage.publish(2, {0: "b", 1: "a"})
    dispatch.join()
    assert stage.losses == []


def test_rows_without_a_replica_wait_for_one(stage):
    stage.publish(1, {0: "a"})
    stage.actors["a"].script = [vanish] * 50
    waiting = threading.Event()
    seen = []

    def orphaned(actor_id, reason):
        stage.losses.append((actor_id, reason))
        waiting.set()

    stage.on_loss = orphaned
    dispatch = Background(lambda: stage.dispatch([[0], [0], [0]]))
    assert waiting.wait(10)
    while not seen:
        seen = [count for count in (stage.dispatcher.orphans,) if count]
    stage.publish(2, {0: "b"}, lost=["a"])
    dispatch.join()
    assert seen == [3]
    assert stage.dispatcher.orphans == 0


def test_without_a_controller_the_last_replica_is_tried_again(stage):
    stage.publish(1, {0: "a"})
    stage.actors["a"].script = [vanish]
    stage.dispatch([[0]])
    assert stage.losses == [("a", "closed")]
    assert stage.actors["a"].forwards == 2


def test_rows_wait_no_longer_than_the_deadline(folder):
    stage = Stage(folder, deadline_s=0.3)
    try:
        stage.publish(1, {0: "a", 1: "b"})
        stage.actors["a"].script = [vanish]
        began = time.monotonic()
        with pytest.raises(PlacementError, match="expert 0 of layer 0 has had no replica"):
            stage.dispatch([[0, 1]])
        assert 0.3 <= time.monotonic() - began < FRESH_S
        stage.dispatch([[1]])  # what others answered meanwhile is passed over
    finally:
        stage.close()


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (vanish, "expert 0 of layer 0 has had no replica"),
        (
            refuse("not_hosted", experts=[0]),
            "no actor answered for expert 0 of layer 0|had no replica",
        ),
    ],
)
def test_requests_that_have_time_left_are_waited_for_beyond_the_deadline_and_no_longer(folder, behaviour, words):
    stage = Stage(folder, "a", deadline_s=0.2)
    try:
        stage.publish(1, {0: "a"})
        stage.actors["a"].script = [behaviour] * 500
        stage.patience = lambda began: began + 1.2
        began = time.monotonic()
        with pytest.raises(NoReplicaError, match=words) as raised:
            stage.dispatch([[0]])
        assert began <= raised.value.since <= began + 1.2 <= time.monotonic()
    finally:
        stage.close()


def test_an_actor_that_takes_rows_and_never_answers_is_no_endless_loop(folder):
    stage = Stage(folder, deadline_s=0.3)
    try:
        stage.publish(1, {0: "ab"})
        stage.on_loss = lambda actor_id, reason: stage.view.restore(actor_id)
        for actor in stage.actors.values():
            actor.script = [hang] * 50
        with pytest.raises(PlacementError, match=r"no actor answered for expert 0 of layer 0 within 0\.6 s"):
            stage.dispatch([[0]])
    finally:
        stage.close()


@pytest.mark.parametrize("behaviour", [hang, vanish])
def test_an_abandoned_dispatcher_waits_for_nobody(folder, behaviour):
    """Neither for the answer of a hung actor nor for a replica that does not come."""
    stage = Stage(folder, deadline_s=600.0)
    try:
        stage.publish(1, {0: "a"})
        stage.actors["a"].script = [behaviour] * 500
        dispatch = Background(lambda: stage.dispatch([[0]]))
        stage.actors["a"].received.get(timeout=10)
        stage.dispatcher.abandon()
        with pytest.raises(MoerayError, match="is being stopped"):
            dispatch.join()
        with pytest.raises(MoerayError, match="is being stopped"):
            stage.dispatch([[0]])
    finally:
        stage.close()


def test_an_actor_under_a_new_address_is_believed_alive(folder):
    stage = Stage(folder, "a")
    try:
        stage.publish(1, {0: "a"})
        stage.actors["a"].script = [hang]
        dispatch = Background(lambda: stage.dispatch([[0]]))
        stage.actors["a"].received.get(timeout=10)
        other = folder / "2"
        other.mkdir(mode=0o700)
        first, stage.actors = stage.actors["a"], Stage(other, "a").actors
        stage.publish(2, {0: "a"}, lost=["a"])
        dispatch.join()
        assert stage.actors["a"].forwards == 1
        first.close()
    finally:
        stage.close()


def test_no_rows(stage):
    assert stage.dispatcher(0, torch.empty(0, 8), torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2, 8)


def test_a_layer_has_the_memory_of_the_one_before_where_it_fits(stage):
    stage.publish(1, BOTH)
    places = []
    for tokens in (40, 2, 60, 3):
        x_TD, ids_TK = torch.randn(tokens, 8), torch.arange(2 * tokens).view(tokens, 2) % 3
        out_TKD = stage.dispatcher(0, x_TD, ids_TK)
        assert torch.equal(out_TKD, expected(x_TD, ids_TK))
        places.append(out_TKD.data_ptr())
    assert places[0] == places[1]
    assert places[2] == places[3]


def test_hot_rows_are_split_between_replicas(stage):
    stage.publish(1, {0: "abc", 1: "a", 2: "b", 3: "c"})
    stage.dispatch([[0, 1 + token % 3] for token in range(120)])
    assert max(actor.rows for actor in stage.actors.values()) < 1.1 * 80


def test_nothing_is_left_behind(folder):
    before = set(threading.enumerate())
    stage = Stage(folder)
    stage.publish(1, BOTH)
    stage.actors["a"].script = [vanish]
    stage.dispatch([[0, 1]])
    stage.close()
    assert set(threading.enumerate()) <= before


MANY = dict.fromkeys(range(16), "ab")
"""Experts on two actors: all of `many_rows` are six pieces or so."""


def many_rows():
    return [[token % 16, (token + 5) % 16] for token in range(20_000)]


def test_many_rows_go_out_in_pieces(stage):
    stage.publish(1, MANY)
    stage.dispatch(many_rows())
    a, b = stage.actors["a"], stage.actors["b"]
    assert a.forwards + b.forwards >= 6
    assert a.rows + b.rows == 40_000
    assert not stage.losses


def test_rows_beyond_a_frame_go_out_in_several_where_nothing_is_shared(folder):
    """Inputs that fit a frame with outputs that do not among them."""
    stage = Stage(folder, "a", nodes="there")
    try:
        stage.publish(1, dict.fromkeys(range(4), "a"))
        x_TD = torch.randn(1500, 1024)
        for ids_TK in (torch.arange(4).expand(1500, 4), torch.tensor([[1]]).expand(1500, 1)):
            assert torch.equal(stage.dispatcher(0, x_TD, ids_TK), expected(x_TD, ids_TK))
        assert 2 * WIRE.max_payload_bytes < 1500 * 1024 * 4 * 4
        assert stage.actors["a"].forwards == 4 + 1  # an expert each, then all
        assert not stage.losses
    finally:
        stage.close()


def test_an_actor_that_stops_in_the_middle_leaves_its_pieces_to_the_other(stage):
    """It answers only once the other has been sent all but the two pieces that it has itself."""
    stage.publish(1, MANY)
    a, b = stage.actors["a"], stage.actors["b"]
    a.script = [hold, hold]
    dispatch = Background(lambda: stage.dispatch(many_rows()))
    first, took = sum(a.received.get(timeout=10).values()), 0
    while took < 40_000 - 2.5 * first:
        took += sum(b.received.get(timeout=10).values())
    a.release.set()
    dispatch.join()
    assert a.forwards <= 2
    assert b.rows > 24_000
    assert not stage.losses


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    ("behaviour", "reason"), [(vanish, "closed"), (misfit, "error"), (refuse("out_of_memory"), "out_of_memory")]
)
def test_a_loss_at_any_piece_loses_no_row(stage, behaviour, reason, place):
    stage.publish(1, MANY)
    a, b = stage.actors["a"], stage.actors["b"]
    a.script, b.script = [serve] * place + [behaviour], [hold]
    dispatch = Background(lambda: stage.dispatch(many_rows()))
    for _ in range(place + 1):
        a.received.get(timeout=10)
    b.release.set()
    dispatch.join()
    assert stage.losses == [("a", reason)]
    stage.dispatch([[0, 1]])


@pytest.mark.parametrize("experts", [16, 1])
def test_pieces_that_fail_are_tried_by_the_other(stage, experts):
    """Also several pieces of one expert."""
    stage.publish(1, MANY)
    a, b = stage.actors["a"], stage.actors["b"]
    a.script, b.script = [serve, refuse("failed"), refuse("failed")], [hold]
    ids = [[first % experts, second % experts] for first, second in many_rows()]
    dispatch = Background(lambda: stage.dispatch(ids))
    for _ in range(3):
        a.received.get(timeout=10)
    b.release.set()
    dispatch.join()
    assert retries(stage, "failed") > 0
    assert not stage.losses


def test_pieces_wait_for_a_replica_as_all_rows_do(stage):
    stage.publish(1, dict.fromkeys(range(16), "a"), known="ab")
    stage.actors["a"].script = [serve, vanish]
    dispatch = Background(lambda: stage.dispatch(many_rows()))
    assert stage.actors["a"].hung_up.wait(10)
    stage.publish(2, MANY, lost="a")
    dispatch.join()
    assert stage.actors["b"].rows > 16_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_sums_of_another_dtype_than_the_rows(stage, dtype):
    stage.publish(1, BOTH)
    x_TD, ids_TK = torch.randn(3, 8), torch.tensor([[0, 1], [1, 2], [2, 0]])
    total = Sum(torch.rand(3, 2), torch.empty(3, 8, dtype=dtype))
    stage.dispatcher.combined(0, x_TD, ids_TK, total)
    assert torch.equal(total.out_TD, combine(expected(x_TD, ids_TK), total.weights_TK).to(dtype))
