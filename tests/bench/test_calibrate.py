"""Calibration: the fits, and a whole one of a tiny model in a real system, read back by the simulator."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from moeray.bench import calibrate as calibration
from moeray.bench.checkpoint import Shape, write_random_moe
from moeray.bench.rhythm import Phase, Rhythm, _SideBySide
from moeray.cli.bench_calibrate import calibrated
from moeray.control.cost import Costs, load_costs, load_model, mean_costs
from moeray.control.popularity import MoeShape
from tests.systems import tiny_config


@pytest.mark.parametrize(
    ("truth", "expected"),
    [
        ((0.5, 0.01, 0.2), (0.5, 0.01, 0.2)),
        ((0.0, 0.02, 0.0), (0.0, 0.02, 0.0)),
    ],
)
def test_the_fit_finds_what_made_the_points(truth, expected):
    features = [[1.0, rows * distinct, distinct] for rows in (1, 8, 64) for distinct in (1, 2, 8)]
    seconds = [sum(a * b for a, b in zip(truth, row, strict=True)) for row in features]
    assert calibration._fit(features, seconds) == pytest.approx(expected, abs=1e-6)


def test_no_cost_is_negative():
    """A falling line has no slope of at least 0, so the fit is flat."""
    intercept, slope = calibration._fit([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]], [3.0, 2.0, 1.0])
    assert slope == 0
    assert 1 < intercept < 3


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([1.0, 2.0, 2.0, 5.0], [1.0, 2.0, 2.0, 5.0]),
        ([1.0, 4.0, 3.0, 8.0], [1.0, 3.5, 3.5, 8.0]),
        ([1.0, 7.0, 3.0, 2.0, 8.0], [1.0, 4.0, 4.0, 4.0, 8.0]),
        ([3.0, 2.0, 1.0], [2.0, 2.0, 2.0]),
        ([2.0, 4.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]),
    ],
)
def test_a_value_that_falls_is_evened_out_with_its_neighbours(values, expected):
    assert calibration.rising(values) == pytest.approx(expected)


def test_a_simulated_step_lasts_as_long_as_the_one_that_was_seen():
    truth = Costs(
        trunk_tokens=(1, 64), trunk_s=(0.004, 0.020), trunk_layers=2, decode_s=0.0005, forward_s=1e-4, row_s=1e-5,
        expert_s=2e-4, hop_s=3e-4, hop_row_s=2e-6, request_s=0.006, wake_s=0.003, decode_context_s=2e-6,
        prefill_context_s=5e-7,
    )  # fmt: skip
    shape, context = MoeShape(2, 4, 2), 96.0

    def lasts(tokens: int, decodes: int, context: float = context) -> float:
        trunk_s = float(np.interp(tokens, truth.trunk_tokens, truth.trunk_s))
        attention_s = decodes * context * truth.decode_context_s
        if not decodes:
            attention_s = truth.prefill_context_s * tokens**2 / 2
        beside_s = calibration._beside_experts(truth, shape, 2)(tokens)
        return trunk_s + decodes * truth.decode_s + attention_s + beside_s

    def phase(count: int, step_s: float, context: float = 0.0) -> Phase:
        return Phase(count, step_s, truth.hop_s + truth.hop_row_s * count * shape.top_k, context)

    before_s = truth.request_s + truth.wake_s
    beside_s = lasts(1, 1) / 2 + truth.request_s
    chunk_s = lasts(16, 0) + truth.decode_s
    chunks_s = 8 * chunk_s + truth.prefill_context_s * 16**2 * sum(range(8))
    rhythm = Rhythm(
        [phase(n, lasts(n, n), context) for n in (1, 2, 4, 8, 16)],
        [phase(1, lasts(1, 1) + before_s), *(phase(n, lasts(n, 0) + before_s) for n in (16, 64))],
        beside_s + lasts(2, 2),
        far_streams=phase(4, lasts(4, 4, 1000.0), 1000.0),
        far_prompts=(phase(16, chunk_s + beside_s), phase(128, chunks_s + beside_s)),
    )
    experts = replace(truth, hop_s=0.0, hop_row_s=0.0)
    found = calibration.fit_rhythm(rhythm, experts, shape, 2)
    for key in ("hop_s", "hop_row_s", "request_s", "wake_s", "decode_s", "decode_context_s", "prefill_context_s"):
        assert found[key] == pytest.approx(getattr(truth, key)), key
    assert found["trunk_tokens"] == [1, 2, 4, 8, 16, 64]
    assert found["trunk_s"] == pytest.approx(np.interp(found["trunk_tokens"], truth.trunk_tokens, truth.trunk_s))


def test_two_measurements_are_averaged_and_counts_are_not():
    before = Costs(trunk_tokens=(1, 8), trunk_s=(0.01, 0.03), trunk_layers=4, hop_s=0.002, cores=2)
    after = replace(before, trunk_s=(0.02, 0.05), hop_s=0.004, start_s=before.start_s + 1)
    mean = mean_costs(before, after)
    assert mean.trunk_s == pytest.approx((0.015, 0.04))
    assert mean == replace(before, trunk_s=mean.trunk_s, hop_s=pytest.approx(0.003), start_s=before.start_s + 0.5)


@pytest.mark.parametrize(("each_ms", "side_by_side"), [(1, 1000), (5, 200), (40, 64)])
def test_streams_decode_for_a_while_however_fast_they_are(each_ms, side_by_side):
    """So that what a step takes after a rest is a small part."""
    run = _SideBySide(2)
    streams = [run.stream(0), run.stream(1)]
    came, enough = 0, False
    while not enough:
        came += 1
        enough = streams[0](0.001 * each_ms * came)
        enough = streams[1](0.001 * each_ms * came) or enough
    assert came == pytest.approx(side_by_side, abs=2)
    assert run.period_s == pytest.approx(0.001 * each_ms, rel=0.05)


def test_a_running_system_is_measured_and_the_simulator_reads_it(tmp_path):
    shape = Shape(hidden=64, intermediate=32, experts=4, top_k=2, layers=2, vocab=128)
    model = write_random_moe(shape, tmp_path / "model", torch.float32)
    config = tiny_config(
        model, experts__max_actors=3, engine__max_batch_tokens=64, control__audit_log=str(tmp_path / "audit.jsonl")
    )
    result = calibrated(config, local=True, repeat=1)
    (tmp_path / "costs.json").write_text(json.dumps(result))
    costs = load_costs(tmp_path / "costs.json")
    assert costs.trunk_layers == 2
    assert load_model(tmp_path / "costs.json")[0] == MoeShape(layers=2, experts=4, top_k=2)
    assert costs.trunk_tokens == (1, 2, 4, 8, 16, 64)
    seen = result["points"]["rhythm"]
    assert [phase["count"] for phase in seen["far_prompts"]] == [16, 128]
    assert seen["far_streams"]["context"] > 4 * seen["streams"][0]["context"]
    assert costs.cores == 0  # an actor's figures hold for any number of machines
    assert result["costs"]["start_s"] > 0
    # What is left of a step for the trunk may be nothing on a busy machine.
    assert list(costs.trunk_s) == sorted(costs.trunk_s)
    assert costs.trunk_s[0] >= 0
    assert max(costs.forward_s, costs.row_s, costs.expert_s) > 0
    assert max(costs.hop_s, costs.hop_row_s) > 0
    assert result["model"]["top_k"] == 2
    assert "cpu" in result["environment"]
