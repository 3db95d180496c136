import pytest
import torch

from moeray.dispatch.plan import balance_rows, plan_rows
from moeray.errors import PlacementError


def test_rows_go_to_hosts_of_their_expert_once_each():
    torch.manual_seed(0)
    ids_TK = torch.stack([torch.randperm(8)[:3] for _ in range(17)])
    replicas = {e: (("a", "b"), ("b",), ("c", "a"))[e % 3] for e in range(8)}
    plan = plan_rows(ids_TK, replicas)
    assert plan.orphans == ()
    assert torch.equal(torch.cat([s.rows_R for s in plan.shares]).sort().values, torch.arange(51))
    flat = ids_TK.reshape(-1)
    for share in plan.shares:
        expected = [e for e, n in zip(share.experts, share.counts, strict=True) for _ in range(n)]
        assert flat[share.rows_R].tolist() == expected
        assert all(share.actor_id in replicas[e] for e in share.experts)
        assert torch.equal(share.tokens_U[share.token_of_row_R], share.rows_R // 3)
        assert len(share.tokens_U.unique()) == len(share.tokens_U)


def test_only_the_rows_that_are_asked_for():
    plan = plan_rows(torch.tensor([[0, 1], [1, 2]]), {0: ("a",), 1: ("a",), 2: ("b",)}, rows_R=torch.tensor([1, 3]))
    assert {s.actor_id: s.rows_R.tolist() for s in plan.shares} == {"a": [1], "b": [3]}


def test_an_expert_without_replicas_is_an_orphan():
    plan = plan_rows(torch.tensor([[0, 1]]), {0: (), 1: ("a",)})
    assert plan.orphans == (0,)
    assert [s.rows_R.tolist() for s in plan.shares] == [[1]]


def test_no_rows_make_no_shares():
    assert plan_rows(torch.empty(0, 2, dtype=torch.int64), {}).shares == ()


def test_an_unknown_expert_is_an_error():
    with pytest.raises(PlacementError, match="expert 7"):
        plan_rows(torch.tensor([[7]]), {0: ("a",)})


@pytest.mark.parametrize(
    ("rows", "replicas", "chosen"),
    [
        ({0: 5}, {0: ("a", "b")}, {0: "a"}),
        ({0: 5, 1: 4}, {0: ("a", "b"), 1: ("a", "b")}, {0: "a", 1: "b"}),
        ({0: 9, 1: 4, 2: 3}, {0: ("a",), 1: ("a", "b"), 2: ("a", "b")}, {0: "a", 1: "b", 2: "b"}),
        ({0: 2, 1: 2, 2: 2, 3: 2}, dict.fromkeys(range(4), ("a", "b")), {0: "a", 1: "b", 2: "a", 3: "b"}),
    ],
)
def test_rows_are_balanced_over_replicas(rows, replicas, chosen):
    assert balance_rows(rows, replicas) == chosen
