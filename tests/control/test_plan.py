from moeray.control.placement import Placement
from moeray.control.plan import Diff, plan_diff
from moeray.types import ExpertId

A, B, C = ExpertId(0, 0), ExpertId(0, 1), ExpertId(1, 0)


def test_what_each_actor_gains_and_loses():
    current = Placement(1, {A: ("x",), B: ("x", "y"), C: ("y",)})
    target = Placement(2, {A: ("y",), B: ("y", "x"), C: ("y", "z")})
    assert plan_diff(current, target) == Diff({"y": (A,), "z": (C,)}, {"x": (A,)})
    assert plan_diff(current, target).moves == 2


def test_from_nothing_and_to_nothing():
    some = Placement(1, {C: ("x",), A: ("x", "y")})
    assert plan_diff(Placement(), some) == Diff({"x": (A, C), "y": (A,)})
    assert plan_diff(some, Placement()) == Diff(drop={"x": (A, C), "y": (A,)})
    assert plan_diff(some, some).moves == 0
