import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeray.dispatch.plan import plan_rows
from moeray.errors import PlacementError


def test_rows_go_to_hosts_of_their_expert_once_each():
    torch.manual_seed(0)
    ids_TK = torch.stack([torch.randperm(8)[:3] for _ in range(17)])
    replicas = {e: (("a", "b"), ("b",), ("c", "a"))[e % 3] for e in range(8)}
    plan = plan_rows(ids_TK.numpy(), replicas)
    assert plan.orphans == []
    assert sorted(np.concatenate([s.rows_R for s in plan.shares]).tolist()) == list(range(51))
    flat = ids_TK.numpy().reshape(-1)
    for share in plan.shares:
        expected = [e for e, n in zip(share.experts, share.counts, strict=True) for _ in range(n)]
        assert flat[share.rows_R].tolist() == expected
        assert all(share.actor_id in replicas[e] for e in share.experts)
        assert (share.tokens_U[share.token_of_row_R] == share.rows_R // 3).all()
        assert len(np.unique(share.tokens_U)) == len(share.tokens_U)


def test_only_the_rows_that_are_asked_for():
    plan = plan_rows(np.array([[0, 1], [1, 2]]), {0: ("a",), 1: ("a",), 2: ("b",)}, rows_R=np.array([1, 3]))
    assert {s.actor_id: s.rows_R.tolist() for s in plan.shares} == {"a": [1], "b": [3]}


def test_an_expert_without_replicas_is_an_orphan():
    plan = plan_rows(np.array([[0, 1]]), {0: (), 1: ("a",)})
    assert plan.orphans == [0]
    assert plan.orphan_rows_R.tolist() == [0]
    assert [s.rows_R.tolist() for s in plan.shares] == [[1]]


def test_no_rows_make_no_shares():
    assert plan_rows(np.empty((0, 2), np.int64), {}).shares == []


def test_an_unknown_expert_is_an_error():
    with pytest.raises(PlacementError, match="expert 7"):
        plan_rows(np.array([[7]]), {0: ("a",)})


@st.composite
def layers(draw):
    """A layer's choices, replicas (some experts without any), and which of the rows to plan."""
    experts = draw(st.integers(1, 6))
    tokens, top_k = draw(st.integers(0, 90)), draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    ids_TK = torch.empty(tokens, top_k, dtype=torch.int64)
    for token in range(tokens):
        ids_TK[token] = torch.randperm(experts, generator=generator)[:top_k]
    actors = st.lists(st.sampled_from("abcd"), unique=True, max_size=4)
    replicas = {expert: tuple(draw(actors)) for expert in range(experts)}
    rows = draw(st.none() | st.lists(st.integers(0, max(tokens * top_k - 1, 0)), unique=True))
    return ids_TK.numpy(), replicas, np.array(rows) if rows and tokens else None


@given(layers())
@settings(deadline=None, max_examples=300)
def test_every_row_goes_once_to_a_usable_replica_or_waits(layer):
    ids_TK, replicas, rows_R = layer
    plan = plan_rows(ids_TK, replicas, rows_R=rows_R)
    top_k, flat = ids_TK.shape[1], ids_TK.flatten().tolist()
    seen = plan.orphan_rows_R.tolist()
    assert all(not replicas[flat[row]] for row in seen)
    assert set(plan.orphans) == {flat[row] for row in seen}
    assert [share.actor_id for share in plan.shares] == sorted({share.actor_id for share in plan.shares})
    for share in plan.shares:
        rows = share.rows_R.tolist()
        seen += rows
        assert all(share.actor_id in replicas[flat[row]] for row in rows)
        assert [flat[row] for row in rows] == [
            e for e, n in zip(share.experts, share.counts, strict=True) for _ in range(n)
        ]
        assert share.experts == sorted(set(share.experts))
        assert share.tokens_U.tolist() == sorted({row // top_k for row in rows})
        assert share.tokens_U[share.token_of_row_R].tolist() == [row // top_k for row in rows]
    wanted = range(len(flat)) if rows_R is None else rows_R.tolist()
    assert sorted(seen) == sorted(wanted)
