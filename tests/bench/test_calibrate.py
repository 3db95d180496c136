"""Calibration: the fit, and a whole one of a tiny model with real actors, read back by the simulator."""

import json

import pytest

from moeray.bench import calibrate as calibration
from moeray.bench.checkpoint import Shape, write_random_moe
from moeray.control.cost import load_costs


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


def test_a_model_is_measured_and_the_simulator_reads_it(tmp_path):
    shape = Shape(hidden=64, intermediate=32, experts=4, top_k=2, layers=2)
    model = write_random_moe(shape, tmp_path / "model")
    result = calibration.calibrate(str(model), actors=1, repeat=1)
    (tmp_path / "costs.json").write_text(json.dumps(result))
    costs = load_costs(tmp_path / "costs.json")
    assert costs.trunk_layers == 2
    assert costs.cores == 0  # an actor's figures hold for any number of machines
    assert costs.start_s > costs.map_s > 0
    assert min(costs.trunk_s) > 0
    assert max(costs.forward_s, costs.row_s, costs.expert_s) > 0
    assert max(costs.hop_s, costs.hop_row_s) > 0
    assert result["model"]["top_k"] == 2
    assert "cpu" in result["environment"]
