"""The dashboards that there are, as files and as a table for people."""

from __future__ import annotations

import json
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


def questions(dashboard: Dashboard) -> str:
    """A Markdown table of the panels, and what each answers."""
    rows = (f"| {panel.title} | {panel.description} |" for panel in dashboard.panels)
    return "\n".join(("| panel | what it answers |", "| --- | --- |", *rows))
