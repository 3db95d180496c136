"""A dashboard and its JSON as Grafana keeps it: variables, annotations, links to the others, panels in a grid."""

from __future__ import annotations

from dataclasses import dataclass

from moeray.dashboards.panels import DATASOURCE, Json, Panel, panel_json

TAG = "moeray"
COLUMNS = 24
SCHEMA = 39
"""Grafana 10.2 and later read it; newer ones migrate it."""


@dataclass(frozen=True)
class Row:
    """Panels below a heading; they fill lines from left to right."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Variable:
    """A choice above the panels: the values of a metric's label. `every`: several or all of them may be chosen."""

    name: str
    label: str
    query: str
    every: bool = False


@dataclass(frozen=True)
class Annotation:
    """A mark across all panels where the expression is not 0, with its series' labels as text."""

    name: str
    expr: str
    text: str
    color: str


@dataclass(frozen=True)
class Dashboard:
    name: str
    title: str
    description: str
    rows: tuple[Row, ...]
    variables: tuple[Variable, ...] = ()
    annotations: tuple[Annotation, ...] = ()

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All of them, in reading order."""
        return tuple(panel for row in self.rows for panel in row.panels)


def dashboard_json(dashboard: Dashboard, datasource: str = "") -> Json:
    """What Grafana imports. `datasource`: the uid of the Prometheus chosen at first (empty: Grafana decides)."""
    return {
        "uid": f"moeray-{dashboard.name}",
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": [TAG],
        "schemaVersion": SCHEMA,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "10s",
        "links": [_link()],
        "templating": {"list": [_datasource(datasource), *map(_variable, dashboard.variables)]},
        "annotations": {"list": [_own_annotations(), *map(_annotation, dashboard.annotations)]},
        "panels": _grid(dashboard.rows),
    }


def _grid(rows: tuple[Row, ...]) -> list[Json]:
    placed: list[Json] = []
    y = 0
    for row in rows:
        heading = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        placed.append(
            {"id": len(placed) + 1, "type": "row", "title": row.title, "collapsed": False, "panels": []}
            | {"gridPos": heading}
        )
        x, y, tallest = 0, y + 1, 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            placed.append(panel_json(panel, len(placed) + 1, x, y))
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest
    return placed


def _datasource(uid: str) -> Json:
    chosen = {"current": {"selected": True, "text": uid, "value": uid}} if uid else {}
    return {
        "type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus", "refresh": 1,
        "hide": 0, **chosen,
    }  # fmt: skip


def _variable(variable: Variable) -> Json:
    several = {"multi": True, "includeAll": True, "allValue": ".*"} if variable.every else {}
    return {
        "type": "query",
        "name": variable.name,
        "label": variable.label,
        "datasource": DATASOURCE,
        "query": variable.query,
        "refresh": 2,
        "sort": 3,
        "hide": 0,
        **({"current": {"selected": True, "text": ["All"], "value": ["$__all"]}} if variable.every else {}),
        **several,
    }


def _annotation(annotation: Annotation) -> Json:
    return {
        "name": annotation.name,
        "datasource": DATASOURCE,
        "enable": True,
        "hide": False,
        "iconColor": annotation.color,
        "expr": annotation.expr,
        "step": "10s",
        "titleFormat": annotation.name,
        "textFormat": annotation.text,
        "useValueForTime": False,
    }


def _own_annotations() -> Json:
    """Those that people write on the dashboard."""
    return {
        "builtIn": 1, "name": "Annotations & Alerts", "type": "dashboard", "enable": True, "hide": True,
        "iconColor": "rgba(0, 211, 255, 1)", "datasource": {"type": "grafana", "uid": "-- Grafana --"},
    }  # fmt: skip


def _link() -> Json:
    return {
        "title": "moeray", "type": "dashboards", "icon": "external link", "tooltip": "", "tags": [TAG],
        "asDropdown": False, "targetBlank": False, "includeVars": True, "keepTime": True,
    }  # fmt: skip
