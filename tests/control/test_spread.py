"""The simulation's spreading of rows is the dispatcher's."""

import numpy as np
import pytest

from moeray.control.placement import Placement
from moeray.control.spread import MIN_PIECE, NEAR, spread
from moeray.dispatch import balance
from moeray.types import ExpertId

ACTORS = {name: i for i, name in enumerate("abcd")}


def spread_of(rows, held, speeds=(1.0, 1.0, 1.0, 1.0)):
    """One step of one layer: rows, experts and the most rows of each actor."""
    placement = Placement(1, {ExpertId(0, e): tuple(actors) for e, actors in enumerate(held)})
    out = spread(placement, np.array([[rows]]), ACTORS, np.array(speeds))
    return [of_GLA[0, 0].round(6).tolist() for of_GLA in out]


def test_the_constants_are_the_dispatchers():
    assert (MIN_PIECE, NEAR) == (balance.MIN_PIECE, balance.NEAR)


@pytest.mark.parametrize(
    ("rows", "held", "served", "experts", "most"),
    [
        ([5, 7], ["a", "a"], [12, 0, 0, 0], [2, 0, 0, 0], [12, 0, 0, 0]),
        ([0, 7], ["a", "b"], [0, 7, 0, 0], [0, 1, 0, 0], [0, 7, 0, 0]),
        # few rows are not split: replicas take turns
        ([6], ["ab"], [3, 3, 0, 0], [0.5, 0.5, 0, 0], [6, 6, 0, 0]),
        # but not where another would be done sooner
        ([9, 6], ["a", "ab"], [9, 6, 0, 0], [1, 1, 0, 0], [9, 6, 0, 0]),
        # many are split
        ([64], ["ab"], [32, 32, 0, 0], [1, 1, 0, 0], [32, 32, 0, 0]),
        # so that both are done at the same time
        ([20, 64], ["a", "ab"], [42, 42, 0, 0], [2, 1, 0, 0], [42, 42, 0, 0]),
        # and not into pieces that are too small
        ([40], ["abcd"], [20, 20, 0, 0], [1, 1, 0, 0], [20, 20, 0, 0]),
        # the expert with most rows chooses first
        ([8, 16], ["ab", "a"], [16, 8, 0, 0], [1, 1, 0, 0], [16, 8, 0, 0]),
        ([64, 96], ["ab", "ab"], [80, 80, 0, 0], [2, 2, 0, 0], [80, 80, 0, 0]),
    ],
)
def test_rows_go_where_they_are_done_first(rows, held, served, experts, most):
    assert spread_of(rows, held) == [served, experts, most]


def test_a_faster_actor_gets_more():
    assert spread_of([96], ["ab"], (1.0, 2.0, 1.0, 1.0))[0] == [32, 64, 0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_it_is_near_what_the_dispatcher_does(seed):
    """The largest cost of a step, of many rows on any placement, is within a fifth of the dispatcher's."""
    draw = np.random.default_rng(seed)
    rows = draw.integers(1, 400, 12)
    held = ["".join(draw.permutation(list("abcd"))[: draw.integers(1, 5)]) for _ in rows]
    served, _, most = spread_of(rows.tolist(), held)
    pieces = balance.balance_rows(dict(enumerate(rows.tolist())), dict(enumerate(map(tuple, held))))
    real = dict.fromkeys(ACTORS, 0)
    for parts in pieces.values():
        for actor, count in parts:
            real[actor] += count
    assert sum(served) == pytest.approx(rows.sum())
    assert max(most) == pytest.approx(max(real.values()), rel=0.2)
