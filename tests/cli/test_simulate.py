"""`moeray simulate` as a user runs it."""

import csv
import json

import pytest
from click.testing import CliRunner

from moeray.cli.main import cli
from moeray.errors import MoerayError, SimulationError

KEYS = (
    "actor_hours", "static_actor_hours", "actor_hours_saved_ratio", "oracle_saved_ratio", "slo_attainment",
    "static_slo_attainment", "node_hours", "reversals", "ttft_p50_s", "ttft_p99_s", "cost", "slo",
)  # fmt: skip


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 500 * i, "input_length": 100 + i % 7, "output_length": 5 + i % 3} for i in range(120)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


def simulate(*args):
    small = ("--layers", "2", "--experts", "8", "--top-k", "2", "--max-actors", "8")
    return CliRunner().invoke(cli, ["simulate", *small, *args], catch_exceptions=False)


def test_json_is_one_object(trace):
    result = simulate("--trace", trace, "--output", "json")
    tree = json.loads(result.stdout)
    assert set(KEYS) <= set(tree)
    assert tree["requests"] == 120
    saved = 1 - tree["actor_hours"] / tree["static_actor_hours"]
    assert tree["actor_hours_saved_ratio"] == pytest.approx(saved)


def test_the_table_names_the_three_runs(trace):
    result = simulate("--trace", trace, "--minutes", "0.5", "--slo", "5,1", "--skew", "zipf")
    for text in ("elastic", "best static", "oracle", "actor-hours saved", "SLO attainment"):
        assert text in result.stdout


def test_a_config_file_says_where_to_start(trace, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("experts: {actors: 3, min_actors: 2, max_actors: 5}\nrouter: {actors: 2}\n")
    args = ["simulate", "--trace", trace, "--config", str(config), "--output", "json"]
    tree = json.loads(CliRunner().invoke(cli, args, catch_exceptions=False).stdout)
    assert tree["routers"] == 2
    assert 2 <= tree["actors_min"] <= tree["actors_max"] <= 5


def test_plots_come_with_their_numbers(trace, tmp_path):
    pytest.importorskip("matplotlib", reason="the `plot` extra is not installed")
    simulate("--trace", trace, "--plot", str(tmp_path / "out"))
    assert (tmp_path / "out" / "simulation.png").stat().st_size > 10_000
    with (tmp_path / "out" / "elastic.csv").open() as file:
        assert {"at_s", "actors", "demand", "replicas"} <= set(next(csv.DictReader(file)))
    with (tmp_path / "out" / "static-requests.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 120


def test_without_matplotlib_one_line_says_what_to_install(trace, tmp_path, monkeypatch):
    monkeypatch.setattr("moeray.cli.plots.find_spec", lambda name: None)
    with pytest.raises(MoerayError, match=r"--plot needs .*moeray\[plot\]"):
        simulate("--trace", trace, "--plot", str(tmp_path))
    draw = ["dashboards", str(tmp_path), "--draw", "http://127.0.0.1:1"]
    with pytest.raises(MoerayError, match=r"--draw needs .*moeray\[plot\]"):
        CliRunner().invoke(cli, draw, catch_exceptions=False)


def test_a_trace_of_one_request_is_simulated(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"timestamp": 7, "input_length": 100, "output_length": 5}')
    tree = json.loads(simulate("--trace", str(path), "--minutes", "5", "--output", "json").stdout)
    assert (tree["requests"], tree["slo_attainment"]) == (1, 1.0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--slo", "fast"), "--slo must be two numbers"),
        (("--slo", "inf,inf"), "--slo must be two numbers"),
        (("--slo", "nan,1"), "--slo must be two numbers"),
        (("--slo", "-1,1"), "--slo must be two numbers"),
        (("--slo", "0.0001,0.0001"), "raise --slo"),
        (("--routers", "100000"), "100000 routers are more than the 1024"),
        (("--costs", "nowhere.json"), "moeray bench calibrate"),
    ],
)
def test_faults_are_one_line(trace, args, message):
    with pytest.raises(SimulationError) as raised:
        simulate("--trace", trace, *args)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
