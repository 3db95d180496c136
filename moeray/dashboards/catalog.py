"""The dashboards that there are, as files and as a table for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from moeray.dashboards.autoscaling import AUTOSCALING
from moeray.dashboards.experts import EXPERTS
from moeray.dashboards.grafana import Dashboard, dashboard_json
from moeray.dashboards.overview import OVERVIEW

DASHBOARDS = (OVERVIEW, EXPERTS, AUTOSCALING)


def write_dashboards(folder: Path, datasource: str = "") -> list[Path]:
    """Write `NAME.json` for each; returns the paths. `datasource`: the uid of the Prometheus chosen at first."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for dashboard in DASHBOARDS:
        paths.append(folder / f"{dashboard.name}.json")
        text = json.dumps(dashboard_json(dashboard, datasource), indent=2, ensure_ascii=False)
        paths[-1].write_text(text + "\n", encoding="utf-8")
    return paths


def questions(dashboard: Dashboard) -> Iterator[str]:
    """The lines of a Markdown table: the panels, and what each answers."""
    yield "| panel | answers |"
    yield "| --- | --- |"
    for panel in dashboard.panels:
        yield f"| {panel.title} | {panel.description} |"
