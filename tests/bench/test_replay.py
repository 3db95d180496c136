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
from moeray.types import FinishReason, TokenOutput

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


def test_the_command_holds_a_replay_against_the_simulation(tmp_path):
    model = write_random_moe(SHAPE, tmp_path / "moe", torch.float32)
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(
        json.dumps({"timestamp": 500 * i, "input_length": 80, "output_length": 40}) + "\n" for i in range(8)
    ))  # fmt: skip
    costs = tmp_path / "costs.json"
    tree = {"costs": {}, "model": {"experts": {"0": 4, "1": 4}, "top_k": 2, "expert_bytes": 1000}}
    costs.write_text(json.dumps(tree))
    args = ["replay", str(model), "--trace", str(trace), "--costs", str(costs), "--minutes", "0.05", "--shorten", "10"]
    args += ["--local", "--engine-kv-blocks", "64", "--experts-actors", "1", "--output", "json"]
    run = CliRunner().invoke(command, args)
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout.splitlines()[-1])
    assert (result["requests"], result["tokens"], result["lost_requests"]) == (6, 6 * 12, 0)
    assert all(row["live"] > 0 and row["simulated"] > 0 for row in result["figures"].values())
