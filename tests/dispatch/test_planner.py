"""A layer's plan in C is that of Python, to the last bit of what is carried over to the next."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeray.dispatch import planner
from moeray.dispatch.balance import SPLIT_FROM
from moeray.dispatch.planner import Planner, pack_table
from moeray.dispatch.view import Usable
from moeray.errors import PlacementError

compiled_part = pytest.mark.skipif(planner.native is None, reason="the part in C was not compiled on this machine")
ACTORS = "abcde"


class InPython(Planner):
    """Plans every layer as where nothing was compiled."""

    def plan(self, now, layer, ids_TK):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planner, "native", None)
            return super().plan(now, layer, ids_TK)


@st.composite
def placements(draw):
    """Two layers' replicas; few experts have none, or are unknown."""
    actors = st.lists(st.sampled_from(ACTORS), unique=True, min_size=draw(st.sampled_from([0, 1, 1, 1])), max_size=4)
    replicas = {
        layer: {e: tuple(draw(actors)) for e in range(draw(st.integers(3, 8))) if draw(st.integers(0, 30))}
        for layer in range(2)
    }
    rates = draw(st.dictionaries(st.sampled_from(ACTORS), st.floats(0.05, 20)))
    return Usable(replicas=replicas, rates=rates)


@st.composite
def steps(draw):
    """(usable, layer, ids) of layers one after the other; the placement changes now and then."""
    usable = draw(st.lists(placements(), min_size=1, max_size=3))
    found = []
    for _ in range(draw(st.integers(1, 8))):
        now, layer, experts = draw(st.sampled_from(usable)), draw(st.integers(0, 2)), draw(st.integers(1, 8))
        tokens, top_k = draw(st.sampled_from([0, 1, 2, 7, 33, 90])), draw(st.integers(1, experts))
        generator = np.random.default_rng(draw(st.integers(0, 1000)))
        ids = [generator.permutation(experts)[:top_k] for _ in range(tokens)]
        found.append((now, layer, torch.from_numpy(np.array(ids, np.int64).reshape(tokens, top_k))))
    return found


def outcome(made, now, layer, ids_TK):
    """The plan as plain data, or why there is none; and what is carried."""
    try:
        plan = made.plan(now, layer, ids_TK)
    except PlacementError as error:
        return str(error)
    carried = dict(zip(made.actors, memoryview(made._carry).cast("d"), strict=True))
    return [tuple(share) for share in plan.shares], plan.orphans, plan.orphan_rows_R.tolist(), carried


@compiled_part
@given(steps())
@settings(deadline=None, max_examples=400)
def test_both_give_the_same_plans(layers):
    ours, theirs = Planner(), InPython()
    for layer in layers:
        assert outcome(ours, *layer) == outcome(theirs, *layer)


@compiled_part
@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf"), 1e-320])
def test_rates_that_are_none_are_left_to_python(rate):
    table = pack_table(["a", "b"], {"b": rate}, {0: ("a", "b")})
    assert planner.native.deal(table, bytearray(16), torch.zeros(2, 1, dtype=torch.int64).data_ptr(), 2, 1) is None


@compiled_part
def test_what_c_does_not_do_is_left_to_python():
    table = pack_table(["a", "b"], {}, {0: ("a", "b"), 1: ("a",), 2: ()})
    carry = bytearray(16)

    def deal(table, carry, *ids):
        ids_TK = torch.tensor(ids, dtype=torch.int64)[:, None]
        return planner.native.deal(table, carry, ids_TK.data_ptr(), *ids_TK.shape)

    assert deal(table, carry, 0, 1) is not None
    left = [(2,), (3,), (-1,), (1 << 40,), (-(1 << 63),), (0,) * SPLIT_FROM]
    assert [deal(table, bytearray(16), *ids) for ids in left] == [None] * len(left)
    assert deal(table[:-4], bytearray(16), 0) is None  # a table that is not whole
    assert deal(table, bytearray(8), 0) is None


def test_only_whole_numbers_that_lie_together_are_planned():
    now = Usable(replicas={0: {0: ("a",)}})
    for ids in (torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 4, dtype=torch.int64)[:, ::2]):
        with pytest.raises(AssertionError):
            Planner().plan(now, 0, ids)
