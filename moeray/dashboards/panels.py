"""Panels, and their JSON as Grafana keeps it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["lines", "bars", "stat", "name", "bargauge", "matrix", "heatmap"]
Json = dict[str, Any]

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_PLUGIN = {
    "lines": "timeseries", "bars": "timeseries", "stat": "stat", "name": "stat", "bargauge": "bargauge",
    "matrix": "table", "heatmap": "heatmap",
}  # fmt: skip


@dataclass(frozen=True)
class Query:
    """An expression and the legend of its series (`{{label}}` stands for a label's value).

    `bound`: an objective or a limit, drawn as a dashed line; its legend is a plain word.
    """

    expr: str
    legend: str = ""
    bound: bool = False


@dataclass(frozen=True)
class Panel:
    """`description` says what question the panel answers.

    `steps`: (from this value on, this colour), ascending, beside green. `texts`: what stands for a value. `height` and
    `width` are in the grid's units, of which a row has 24. `axis_max` fixes the scale. `repeat`: a variable of whose
    values each gets a panel like this one.
    """

    title: str
    description: str
    queries: tuple[Query, ...]
    kind: Kind = "lines"
    unit: str = "short"
    width: int = 8
    height: int = 8
    steps: tuple[tuple[float, str], ...] = ()
    decimals: int | None = None
    axis_max: float | None = None
    stacked: bool = False
    texts: tuple[tuple[float, str], ...] = ()
    repeat: str = ""

    @property
    def instant(self) -> bool:
        """Whether it shows the last moment alone."""
        return self.kind in ("bargauge", "matrix")

    @property
    def step_s(self) -> float:
        """The least time between two points: bars of events are not to overlap."""
        return 60.0 if self.kind == "bars" else 0.0

    @property
    def plugin(self) -> str:
        """Grafana's name of the kind."""
        return _PLUGIN[self.kind]


def panel_json(panel: Panel, number: int, x: int, y: int) -> Json:
    """The panel at a place of the grid."""
    return {
        "id": number,
        "type": panel.plugin,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "targets": [_target(panel, query, chr(ord("A") + i)) for i, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": _overrides(panel)},
        "options": deepcopy(_OPTIONS[panel.kind]),
        **({"transformations": deepcopy(_MATRIX)} if panel.kind == "matrix" else {}),
        **({"interval": f"{panel.step_s:g}s"} if panel.step_s else {}),
        **({"repeat": panel.repeat, "repeatDirection": "h", "maxPerRow": 4} if panel.repeat else {}),
    }


def _target(panel: Panel, query: Query, ref: str) -> Json:
    return {
        "refId": ref,
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "legendFormat": query.legend or "__auto",
        "format": "table" if panel.kind == "matrix" else "time_series",
        "instant": panel.instant,
        "range": not panel.instant,
    }


def _defaults(panel: Panel) -> Json:
    steps = [{"value": None, "color": "green"}, *({"value": value, "color": color} for value, color in panel.steps)]
    fields: Json = {
        "unit": panel.unit,
        "color": _color(panel),
        "thresholds": {"mode": "absolute", "steps": steps},
        "custom": _custom(panel),
    }
    if panel.plugin != "heatmap":
        fields["min"] = 0
    if panel.texts:
        options = {f"{value:g}": {"text": text, "index": i} for i, (value, text) in enumerate(panel.texts)}
        fields["mappings"] = [{"type": "value", "options": options}]
    if panel.axis_max is not None:
        fields["max"] = panel.axis_max
    if panel.decimals is not None:
        fields["decimals"] = panel.decimals
    return fields


def _color(panel: Panel) -> Json:
    if panel.plugin == "stat":
        return {"mode": "thresholds"}
    return {"mode": "continuous-BlYlRd" if panel.kind == "matrix" else "palette-classic"}


def _custom(panel: Panel) -> Json:
    if panel.kind == "matrix":
        return {
            "align": "center", "cellOptions": {"type": "color-background", "mode": "basic"}, "inspect": False,
            "filterable": False, "minWidth": 50,
        }  # fmt: skip
    if panel.kind == "heatmap":
        return {"hideFrom": {"legend": False, "tooltip": False, "viz": False}, "scaleDistribution": {"type": "linear"}}
    if panel.plugin != "timeseries":
        return {}
    bars, bounded = panel.kind == "bars", any(query.bound for query in panel.queries)
    return {
        "drawStyle": "bars" if bars else "line",
        "fillOpacity": 60 if bars else 25 if panel.stacked else 0 if bounded else 8,
        "lineWidth": 1,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if bars or panel.stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "dashed" if panel.steps else "off"},
    }


def _overrides(panel: Panel) -> list[Json]:
    if panel.kind == "matrix":
        return [_override(["layer\\expert"], [("custom.cellOptions", {"type": "auto"})])]
    dashed: list[tuple[str, Json]] = [
        ("custom.lineStyle", {"fill": "dash", "dash": [8, 6]}),
        ("custom.stacking", {"mode": "none", "group": "A"}),
        ("color", {"mode": "fixed", "fixedColor": "semi-dark-orange"}),
    ]
    return [_override([query.legend], dashed) for query in panel.queries if query.bound]


def _override(names: list[str], properties: list[tuple[str, Json]]) -> Json:
    return {
        "matcher": {"id": "byNames", "options": {"mode": "include", "names": names}},
        "properties": [{"id": name, "value": value} for name, value in properties],
    }


_LAST = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_LINES: Json = {
    "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull"]},
    "tooltip": {"mode": "multi", "sort": "desc"},
}
_STAT: Json = {
    "reduceOptions": _LAST, "orientation": "auto", "textMode": "value", "colorMode": "value", "graphMode": "area",
    "justifyMode": "auto", "wideLayout": True, "showPercentChange": False, "percentChangeColorMode": "standard",
}  # fmt: skip
_OPTIONS: dict[str, Json] = {
    "lines": _LINES,
    "bars": _LINES,
    "stat": _STAT,
    "name": _STAT | {"textMode": "name", "graphMode": "none", "colorMode": "none"},
    "bargauge": {
        "reduceOptions": _LAST, "orientation": "horizontal", "displayMode": "gradient", "valueMode": "color",
        "namePlacement": "auto", "showUnfilled": True, "sizing": "auto", "minVizWidth": 8, "minVizHeight": 16,
        "maxVizHeight": 300,
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False, "calcs": []},
    },
    "matrix": {
        "frameIndex": 0, "showHeader": True, "cellHeight": "sm", "sortBy": [],
    },
    "heatmap": {
        "calculate": False, "cellGap": 1, "rowsFrame": {"layout": "auto"}, "showValue": "never",
        "selectionMode": "x", "exemplars": {"color": "rgba(255,0,255,0.7)"}, "filterValues": {"le": 1e-9},
        "color": {"mode": "scheme", "scheme": "Inferno", "steps": 64, "reverse": False, "exponent": 0.5, "fill": "red"},
        "legend": {"show": True}, "tooltip": {"mode": "single", "showColorScale": True, "yHistogram": False},
        "yAxis": {"axisPlacement": "left", "unit": "none"}, "cellValues": {"unit": "short"},
    },
}  # fmt: skip

_MATRIX: list[Json] = [
    *({"id": "sortBy", "options": {"fields": {}, "sort": [{"field": name}]}} for name in ("expert", "layer")),
    {"id": "groupingToMatrix", "options": {"rowField": "layer", "columnField": "expert", "valueField": "Value"}},
]
"""One row of the answer an expert -> a row for each layer, a column for each expert."""
