"""The rules: valid, of metrics that exist, each alert tried by promtool both ways."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.dashboards.labels import Scope, placeholders

FOLDER = Path(__file__).parents[2] / "deploy" / "prometheus"
promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")


def rules(name: str) -> list[dict]:
    tree = yaml.safe_load((FOLDER / "rules" / name).read_text(encoding="utf-8"))
    return [rule for group in tree["groups"] for rule in group["rules"]]


def recorded() -> Scope:
    scope = Scope()
    for rule in rules("recording.yml"):
        scope.record(rule["record"], rule["expr"])
    return scope


def cases() -> list[dict]:
    (file,) = (FOLDER / "tests").glob("*.yml")
    tests = yaml.safe_load(file.read_text(encoding="utf-8"))["tests"]
    return [case for test in tests for case in test.get("alert_rule_test", ())]


def run(*args: str) -> None:
    done = subprocess.run(["promtool", *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_are_of_metrics_and_labels_that_exist():
    scope = recorded()
    for rule in rules("alerts.yml"):
        labels = scope.labels(rule["expr"])
        assert "job" in labels, f"{rule['alert']} does not say of which system it is"
        assert placeholders(str(rule["annotations"])) <= labels, rule["alert"]


@pytest.mark.parametrize("rule", rules("alerts.yml"), ids=lambda rule: rule["alert"])
def test_every_alert_says_how_bad_it_is_and_what_to_do_and_is_tried_both_ways(rule):
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"].keys() == {"summary", "description"}
    fires = {bool(case["exp_alerts"]) for case in cases() if case["alertname"] == rule["alert"]}
    assert fires == {True, False}
    assert f"`{rule['alert']}`" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_recording_rules_read_only_what_was_recorded_before():
    names = [rule["record"] for rule in rules("recording.yml")]
    assert len(set(names)) == len(names)
    assert all("job" in labels for name, labels in recorded().series.items() if name.startswith("moeray:"))


@promtool
def test_promtool_takes_the_config_and_the_rules():
    run("check", "config", str(FOLDER / "prometheus.yml"))
    run("check", "rules", *map(str, sorted((FOLDER / "rules").glob("*.yml"))))


@promtool
def test_promtool_tries_the_rules():
    run("test", "rules", *map(str, sorted((FOLDER / "tests").glob("*.yml"))))
