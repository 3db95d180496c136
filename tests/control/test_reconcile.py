"""Changes of the placement: events in, instructions out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeray.control.placement import Placement
from moeray.control.plan import plan_diff
from moeray.control.reconcile import (
    Abandon,
    Acked,
    ActorLost,
    Host,
    Hosted,
    Publish,
    RouterGone,
    Step,
    Unhost,
    advance,
    begin,
)
from moeray.types import ExpertId

E0, E1, E2 = (ExpertId(0, i) for i in range(3))
BEFORE = Placement(4, {E0: ("a",), E1: ("a",), E2: ("b",)})
AFTER = Placement(5, {E0: ("a",), E1: ("c",), E2: ("b", "c")})


def start(routers=("r0", "r1"), before=BEFORE, after=AFTER):
    diff = plan_diff(before, after)
    return begin(after, diff.host, diff.drop, routers)


def test_the_whole_way():
    change, todo = start()
    assert todo == [Host("c", (E1, E2))]
    change, todo = advance(change, Hosted("c"))
    assert (change.step, todo) == (Step.ACKING, [Publish(AFTER)])
    change, todo = advance(change, Acked("r0", 5))
    assert todo == []
    change, todo = advance(change, Acked("r1", 6))
    assert (change.step, todo) == (Step.DONE, [Unhost("a", (E1,))])


def test_an_older_epoch_acknowledges_nothing():
    change, _ = advance(start()[0], Hosted("c"))
    change, todo = advance(change, Acked("r0", 4))
    assert (change.step, change.waiting, todo) == (Step.ACKING, {"r0", "r1"}, [])


def test_an_actor_that_cannot_host_rolls_everything_back():
    change, todo = advance(start()[0], Hosted("c", "no such file"))
    assert (change.step, todo) == (Step.ROLLED_BACK, [Unhost("c", (E1, E2))])
    assert "no such file" in change.error
    assert advance(change, Hosted("c")) == (change, [])


def test_a_lost_actor_of_the_target_rolls_back_and_is_not_spoken_to():
    change, todo = advance(start()[0], ActorLost("c"))
    assert (change.step, todo) == (Step.ROLLED_BACK, [])


def test_the_loss_of_a_bystander_changes_nothing():
    change, todo = advance(start()[0], ActorLost("z"))
    assert (change.step, todo) == (Step.HOSTING, [])


def test_behind_publication_a_change_only_goes_forward():
    change, _ = advance(start()[0], Hosted("c"))
    for event in (Abandon("repair"), ActorLost("a"), Hosted("c", "late")):
        change, todo = advance(change, event)
        assert (change.step, todo) == (Step.ACKING, [])
    for router in ("r0", "r1"):
        change, todo = advance(change, Acked(router, 5))
    assert (change.step, todo) == (Step.DONE, [])  # `a`, which was to drop E1, is dead


@pytest.mark.parametrize("gone", [("r0",), ("r0", "r1")])
@pytest.mark.parametrize("early", [False, True])
def test_a_router_that_is_gone_is_not_waited_for(gone, early):
    """Whether it went while weights were mapped, or after the new placement was published."""
    events = [Hosted("c"), *map(RouterGone, gone)]
    change, todo = start()
    for event in events[1:] + events[:1] if early else events:
        change, todo = advance(change, event)
    if len(gone) == 1:
        assert (change.step, change.waiting) == (Step.ACKING, {"r1"})
        change, todo = advance(change, Acked("r1", 5))
    assert change.step is Step.DONE
    assert todo[-1] == Unhost("a", (E1,))


def test_repair_goes_first():
    change, todo = advance(start()[0], Abandon("a repair goes first"))
    assert (change.step, todo, change.error) == (Step.ROLLED_BACK, [Unhost("c", (E1, E2))], "a repair goes first")


def test_without_routers_and_without_moves_it_is_done_at_once():
    change, todo = start(routers=(), after=Placement(5, BEFORE.replicas))
    assert (change.step, todo) == (Step.DONE, [Publish(Placement(5, BEFORE.replicas))])


EVENTS = st.lists(
    st.one_of(
        st.builds(Hosted, st.sampled_from("abcd"), st.sampled_from([None, None, "broken"])),
        st.builds(ActorLost, st.sampled_from("abcd")),
        st.builds(Acked, st.sampled_from(["r0", "r1"]), st.integers(3, 6)),
        st.builds(Abandon, st.just("why")),
    ),
    max_size=12,
)
PLACEMENTS = st.builds(
    lambda *held: {e: tuple(sorted(actors)) for e, actors in zip((E0, E1, E2), held, strict=True)},
    *[st.sets(st.sampled_from("abcd"), min_size=1) for _ in range(3)],
)


@given(PLACEMENTS, PLACEMENTS, EVENTS)
def test_nothing_that_routers_name_is_ever_dropped(before, after, events):
    """Whatever happens: dropped experts are in no placement that a router may hold, and nothing is half done."""
    target = Placement(5, after)
    change, todo = start(before=Placement(4, before), after=target)
    seen = list(todo)
    dead = set()
    for event in events:
        if isinstance(event, ActorLost):
            dead.add(event.actor_id)
        change, todo = advance(change, event)
        seen += todo
        published = Publish(target) in seen
        for step in todo:
            if isinstance(step, Unhost):
                held = after if published else before
                assert not any(step.actor_id in held[expert] for expert in step.experts)
                assert step.actor_id not in dead
    assert sum(isinstance(step, Publish) for step in seen) <= 1
    assert not (change.step is Step.ROLLED_BACK and Publish(target) in seen)
    hosted = {event.actor_id for event in events if isinstance(event, Hosted)}
    if Publish(target) in seen:
        assert {step.actor_id for step in seen if isinstance(step, Host)} <= hosted
