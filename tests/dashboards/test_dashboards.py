"""The dashboards: as generated, of metrics that exist, valid by Grafana's own schema, and told of in the README."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from moeray.cli.main import cli
from moeray.dashboards.catalog import DASHBOARDS, questions
from moeray.dashboards.grafana import dashboard_json
from moeray.dashboards.promql import gauge, quantile, rate
from moeray.metrics import METRICS
from tests.dashboards.labels import Scope, placeholders

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT.parent / "shared" / "schemas" / "grafana-dashboard.schema.json"
BY_NAME = {dashboard.name: dashboard for dashboard in DASHBOARDS}

each = pytest.mark.parametrize("name", BY_NAME)


def committed(name: str) -> dict:
    return json.loads((ROOT / "dashboards" / f"{name}.json").read_text(encoding="utf-8"))


def panels(name: str) -> list[dict]:
    return [panel for panel in committed(name)["panels"] if panel["type"] != "row"]


def fixed(expression: str) -> str:
    """The expression with a duration for each of Grafana's own, as it is sent to Prometheus."""
    return expression.replace("$__rate_interval", "1m").replace("$__range", "1h")


@each
def test_the_files_are_what_the_command_writes(name, tmp_path):
    result = CliRunner().invoke(cli, ["dashboards", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) == committed(name), (
        "run `moeray dashboards dashboards`"
    )


@each
def test_every_query_is_of_metrics_and_labels_that_exist(name):
    scope = Scope()
    for panel in panels(name):
        for target in panel["targets"]:
            assert placeholders(target["legendFormat"]) <= scope.labels(fixed(target["expr"])), panel["title"]
    for annotation in committed(name)["annotations"]["list"][1:]:
        assert placeholders(annotation["textFormat"]) <= scope.labels(fixed(annotation["expr"]))


@each
def test_variables_of_the_queries_are_there_to_choose(name):
    dashboard = committed(name)
    defined = {variable["name"] for variable in dashboard["templating"]["list"]}
    text = json.dumps(dashboard["panels"])
    used = {word for word in ("job", "instance", "group", "layer") if f"${word}" in text}
    assert used <= defined
    assert {"datasource", "job", "instance"} <= defined
    for variable in dashboard["templating"]["list"][1:]:
        selector, label = variable["query"].removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
        assert {label} <= Scope().labels(selector)


def test_every_metric_is_on_some_panel():
    text = "".join(target["expr"] for name in BY_NAME for panel in panels(name) for target in panel["targets"])
    assert {name for name in METRICS if f"{name}{{" not in text and f"{name}_bucket{{" not in text} == set()


@each
def test_panels_lie_in_the_grid_side_by_side(name):
    taken: set[tuple[int, int]] = set()
    for panel in committed(name)["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in committed(name)["panels"]}) == len(committed(name)["panels"])


@each
def test_every_panel_says_what_it_answers(name):
    readme = (ROOT / "dashboards" / "README.md").read_text(encoding="utf-8")
    table = questions(BY_NAME[name])
    assert table in readme, f"put this into dashboards/README.md:\n{table}"


@pytest.mark.skipif(not SCHEMA.exists(), reason=f"Grafana's schema is not at {SCHEMA}")
@each
def test_grafanas_schema(name):
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft7Validator(schema).validate(committed(name))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(schema).validate(committed(name) | {"pannels": []})


def test_the_datasource_can_be_named():
    variable = dashboard_json(BY_NAME["overview"], "my-uid")["templating"]["list"][0]
    assert variable["current"]["value"] == "my-uid"


def test_provisioning_names_the_folder_and_the_source():
    folder = ROOT / "dashboards" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((folder / "dashboards" / "moeray.yaml").read_text())["providers"]
    assert source["type"] == "prometheus"
    assert source["isDefault"] is True
    assert provider["type"] == "file"


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: rate("moeray_nothing_total"), "moeray_nothing_total"),
        (lambda: rate("moeray_replicas"), "counter"),
        (lambda: gauge("moeray_actors", ("layer",)), "kind, group, state"),
        (lambda: quantile(0.5, "moeray_expert_rows_total"), "histogram"),
    ],
)
def test_an_expression_over_what_the_table_lacks_cannot_be_built(build, names):
    with pytest.raises(ValueError, match=names):
        build()
