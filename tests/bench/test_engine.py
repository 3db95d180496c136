"""The benchmark of the engine, as a user runs it, and its arithmetic."""

import json
import subprocess
import sys

import pytest

from moeray.bench.budget import PARTS, StepBudget, median_budget
from moeray.bench.engine import Times, Workload, disturbed
from moeray.bench.peers import peer
from moeray.cli.bench_engine import show
from moeray.errors import MoerayError
from tests.checkpoints import make_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("granitemoe", tmp_path_factory.mktemp("bench") / "tiny")


def bench(*args):
    command = [sys.executable, "-m", "moeray.cli.main", "bench", "engine", *map(str, args), "--output", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Loading weights" not in done.stderr  # transformers' bars, which would be drawn over ours
    return json.loads(done.stdout)


def test_a_run_against_the_same_engine_in_process_and_a_peer(model):
    result = bench(
        model, "--batch", "1,3", "--rounds", "1", "--prompt-tokens", 9, "--output-tokens", 5, "--in-process",
        "--overlap", "--grpc", "--against", f"transformers={sys.executable}", "--control-orphan-s", 1,
    )  # fmt: skip
    assert [row["batch"] for row in result["rows"]] == [1, 3]
    assert result["environment"]["cores"] > 0
    for row in result["rows"]:
        names = "moeray", "in process", "over grpc", "overlapped", "transformers"
        ours, near, far, halves, other = (row[name] for name in names)
        for figures in (ours, near, far, halves, other):
            assert figures["prefill_tok_s"] > 0
            assert figures["decode_tok_s"] > 0
        parts = ours["budget"]
        assert 0 < parts["tax"] < 1
        assert parts["step_ms"] > max(parts[f"{part}_ms"] for part in PARTS)
        assert all(parts[f"{part}_ms"] > 0 for part in PARTS)
        prompts = ours["prefill_budget"]
        seconds = row["batch"] * 9 / ours["prefill_tok_s"]  # of the same run as the budget
        assert prompts["step_ms"] == pytest.approx(1000 * seconds, rel=0.2)
        assert all(prompts[f"{part}_ms"] > 0 for part in PARTS)
        assert near["budget"]["dispatch_ms"] == near["prefill_budget"]["dispatch_ms"] == 0
        assert near["decode_ratio"] > 0
        assert far["budget"]["dispatch_ms"] > 0
        assert halves["decode_ratio"] > 0
        assert "budget" not in halves | other


@pytest.mark.parametrize(
    ("decode_tok_s", "step_ms", "expected"),
    [(171.0, 187.0, False), (219.0, 181.0, False), (316.0, 187.0, True), (80.0, 187.0, True)],
)
def test_rates_that_do_not_go_with_the_steps_are_doubted(decode_tok_s, step_ms, expected, capsys):
    assert disturbed(decode_tok_s, 32, step_ms) is expected
    budget = {f"{part}_ms": 1.0 for part in PARTS} | {"step_ms": step_ms, "tax": 0.1}
    figures = {"prefill_tok_s": 1.0, "decode_tok_s": decode_tok_s, "budget": budget, "disturbed": expected}
    machine = {"cpu": "a CPU", "cores": 2}
    show({"model": "m", "rows": [{"batch": 32, "moeray": figures}], "environment": machine, "load_average": 0.0})
    assert ("not to be trusted" in capsys.readouterr().out) is expected


def test_budgets_as_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from moeray.cli.budget_plot import write_budgets

    budget = median_budget([StepBudget(0.004, 0.001, 0.002, 0.003, 0.001, 0.001, 0.001)])
    write_budgets({"rows": [{"batch": 1, "moeray": {"budget": budget}, "vllm": {}}]}, tmp_path / "budget.png")
    assert (tmp_path / "budget.png").stat().st_size > 1000


def test_medians_of_a_budget():
    steps = [StepBudget(trunk=0.004, dispatch=0.001), StepBudget(trunk=0.002, dispatch=0.002), StepBudget(trunk=0.001)]
    figures = median_budget(steps)
    assert figures["trunk_ms"] == 2.0
    assert figures["step_ms"] == 4.0
    assert figures["tax"] == 0.2


def test_decode_counts_the_tokens_beyond_the_first():
    work = Workload(prompt=100, output=50)
    assert work.prefill_rate(8, 2.0) == 400
    assert work.decode_rate(8, Times(2.0, 6.0)) == 100


def test_an_unknown_peer_is_named():
    with pytest.raises(MoerayError, match="no such peer"), peer("llama", sys.executable, "m", 1):
        pass


def test_a_peer_that_ends_is_an_error_and_not_a_wait(tmp_path):
    with pytest.raises(MoerayError, match="ended"), peer("transformers", sys.executable, str(tmp_path / "none"), 1):
        pass
