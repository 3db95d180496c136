"""A trace live: every request at its time, and the figures that are held against the simulation."""

import asyncio
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from moeray.bench.checkpoint import Shape, write_random_moe
from moeray.bench.replay import Replayed, replay
from moeray.cli.bench import command
from moeray.control.simulate import Latencies
from moeray.control.trace import trace_of
from moeray.errors import SimulationError
from moeray.types import FinishReason, TokenOutput

COSTS = {"costs": {}, "model": {"experts": {"0": 4, "1": 4}, "top_k": 2, "expert_bytes": 1000}}
SHAPE = Shape(hidden=64, intermediate=64, experts=4, top_k=2, layers=2, vocab=128)


class Answers:
    """Answers at once; the third request ends with an error."""

    def __init__(self):
        self.asked = []

    async def generate(self, request):
        self.asked.append((asyncio.get_running_loop().time(), len(request.prompt_ids), request.sampling.max_tokens))
        if len(self.asked) == 3:
            yield TokenOutput(request.request_id, 0, (), finish_reason=FinishReason.ERROR, error="out of luck")
            return
        yield TokenOutput(request.request_id, 0, (1,))
        yield TokenOutput(request.request_id, 0, (2,), finish_reason=FinishReason.LENGTH)

    async def status(self):
        return {"actors": [{"kind": "expert"}, {"kind": "router"}]}


def test_requests_come_at_their_times_and_a_lost_one_is_told():
    system = Answers()
    trace = trace_of("t", [(0.0, 5, 2), (0.1, 7, 3), (0.2, 9, 4), (0.3, 11, 5)])
    result = asyncio.run(replay(system, trace, 100))
    moments = np.array([at for at, _, _ in system.asked])
    assert np.diff(moments) == pytest.approx([0.1, 0.1, 0.1], abs=0.09)
    assert [lengths for _, *lengths in system.asked] == [[5, 2], [7, 3], [9, 4], [11, 5]]
    assert result.errors == ["out of luck"]
    assert np.isnan(result.latencies.last_s).tolist() == [False, False, True, False]
    assert list(result.actors) == [1]


def test_quantiles_are_of_those_that_finished():
    trace = trace_of("t", [(0.0, 5, 3), (1.0, 5, 3), (2.0, 5, 3)])
    result = Replayed(Latencies(np.array([1.0, 2.0, 9.0]), np.array([2.0, 5.0, np.nan])), [], [])
    assert result.quantile(trace, 1.0).ttft_s == 2.0
    assert result.quantile(trace, 1.0).tpot_s == 1.5

    nothing = Replayed(Latencies(np.array([0.5, np.nan, np.nan]), np.full(3, np.nan)), [], ["refused"])
    assert nothing.quantile(trace, 0.5) is None


def run_of(model, tmp_path, costs, requests, *args):
    """`bench replay` of so many requests, half a second apart."""
    (tmp_path / "trace.jsonl").write_text("".join(
        json.dumps({"timestamp": 500 * i, "input_length": 80, "output_length": 40}) + "\n" for i in range(requests)
    ))  # fmt: skip
    (tmp_path / "costs.json").write_text(json.dumps(costs))
    files = ["--trace", str(tmp_path / "trace.jsonl"), "--costs", str(tmp_path / "costs.json")]
    small = ["--local", "--engine-kv-blocks", "64", "--experts-actors", "1"]
    return CliRunner().invoke(command, ["replay", str(model), *files, *small, *args])


def test_the_command_holds_a_replay_against_the_simulation(tmp_path):
    model = write_random_moe(SHAPE, tmp_path / "moe", torch.float32)
    run = run_of(model, tmp_path, COSTS, 8, "--minutes", "0.05", "--scale", "1", "--shorten", "10", "--output", "json")
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout.splitlines()[-1])
    assert (result["requests"], result["tokens"], result["lost_requests"]) == (6, 6 * 12, 0)
    assert all(row["live"] > 0 and row["simulated"] > 0 for row in result["figures"].values())


def test_requests_are_cut_to_the_context_and_as_many_come_as_keep_the_machine_half_busy(tmp_path):
    """Of 2 blocks of 16 tokens, and with costs by which a request takes a part of a second."""
    model = write_random_moe(SHAPE, tmp_path / "moe", torch.float32)
    slow = COSTS | {"costs": {"trunk_tokens": [1, 64], "trunk_s": [0.025, 0.025], "trunk_layers": 2}}
    run = run_of(model, tmp_path, slow, 40, "--minutes", "0.05", "--engine-kv-blocks", "2", "--output", "json")
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout.splitlines()[-1])
    assert (result["lost_requests"], result["tokens"]) == (0, 32 * result["requests"])
    assert 0.5 < result["scale"] < 2
    assert result["calibration_drift_ratio"] == 1.0  # the file's costs hold before and after


@pytest.mark.parametrize("output", ["json", "table"])
def test_a_replay_of_which_all_is_refused_has_no_latencies(tmp_path, output):
    """No context holds a prompt and an answer of one token."""
    model = write_random_moe(SHAPE, tmp_path / "moe", torch.float32)
    run = run_of(model, tmp_path, COSTS, 1, "--engine-max-context", "1", "--output", output)
    assert (run.exit_code, type(run.exception)) == (1, SystemExit), run.output
    if output == "json":
        result = json.loads(run.stdout.splitlines()[-1])
        assert (result["requests"], result["lost_requests"], len(result["errors"])) == (1, 1, 1)
        assert result["figures"]["ttft_p50_s"]["live"] is None
        assert result["figures"]["ttft_p50_s"]["ratio"] is None
    else:
        assert "lost: " in run.stdout
        rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in run.stdout.splitlines()]
        assert ["ttft_p50_s", "-"] in rows


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({"costs": {}}, "has no `model`"),
        ({"costs": {}, "model": {"experts": {}, "top_k": 2, "expert_bytes": 1}}, "model.experts must be 1 or more"),
        ({"costs": {}, "model": {"experts": {"0": 4}, "expert_bytes": 1}}, "model.top_k must be 1 or more, got None"),
        (COSTS | {"costs": {"trunk_layers": 0}}, "costs.trunk_layers must be 1 or more"),
    ],
)
def test_a_cost_file_at_fault_is_told_before_the_replay(tmp_path, costs, message):
    run = run_of(tmp_path / "nowhere", tmp_path, costs, 1)
    assert isinstance(run.exception, SimulationError)
    assert message in str(run.exception)
