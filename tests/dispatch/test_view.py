"""What a router believes of the actors."""

import pytest

from moeray.control.placement import Placement
from moeray.dispatch.view import PlacementView
from moeray.types import Address, ExpertId

E0, E1 = ExpertId(0, 0), ExpertId(0, 1)


def at(actor, path="sock"):
    return Address(actor, "node", f"{actor}-{path}")


AB = {"a": at("a"), "b": at("b")}


@pytest.fixture
def view():
    view = PlacementView()
    view.publish(Placement(1, {E0: ("a", "b"), E1: ("a",)}), AB)
    return view


def test_an_older_epoch_is_ignored(view):
    assert not view.publish(Placement(0, {E0: ("b",)}), AB, lost=["a"])
    assert view.epoch == 1
    assert view.now.replicas[0] == {0: ("a", "b"), 1: ("a",)}


def test_a_loss_is_news_once(view):
    assert view.lose("a")
    assert not view.lose("a")
    assert not view.lose("stranger")
    assert view.now.replicas[0] == {0: ("b",), 1: ()}


def test_a_publish_believes_in_a_lost_actor_only_at_another_address(view):
    view.lose("a")
    view.publish(Placement(2, {E0: ("a", "b")}), AB)
    assert view.now.replicas[0] == {0: ("b",)}
    view.publish(Placement(3, {E0: ("a", "b")}), AB | {"a": at("a", "new")})
    assert view.now.replicas[0] == {0: ("a", "b")}


def test_a_restored_actor_is_used_again(view):
    view.lose("a")
    version = view.now.version
    view.restore("a")
    assert view.wait_change(version, 0.0)
    assert view.now.replicas[0] == {0: ("a", "b"), 1: ("a",)}


def test_a_retry_believes_again_in_all_but_the_dead(view):
    view.lose("a")
    view.lose("b")
    view.refuse("b", [E0])
    view.publish(Placement(2, {E0: ("a", "b"), E1: ("a",)}), AB, lost=["a"])
    view.refuse("b", [E0])
    view.retry([E0])
    assert view.now.replicas[0] == {0: ("b",), 1: ()}
    view.restore("a")
    assert view.now.replicas[0] == {0: ("a", "b"), 1: ("a",)}


def test_dead_actors_are_told_to_subscribers(view):
    told = []
    view.subscribe(told.append)
    view.publish(Placement(2, {E0: ("b",)}), AB)
    view.publish(Placement(3, {E0: ("b",)}), AB, lost=["a"])
    view.unsubscribe(told.append)
    view.publish(Placement(4, {}), {}, lost=["b"])
    assert told == [["a"]]
    assert "b" in view.now.dead
    assert "b" not in view.now.addresses


def test_rates_are_relative_and_the_unknown_are_left_out(view):
    view.publish(Placement(2, {E0: ("a", "b")}), AB, rates={"a": 300.0, "b": 100.0, "c": 0.0})
    assert view.now.rates == {"a": 1.5, "b": 0.5}
    view.publish(Placement(3, {E0: ("a", "b")}), AB)
    assert view.now.rates == {}
