"""A dashboard as a PNG, for those without Grafana at hand. matplotlib is an extra: `pip install moeray[plot]`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moeray.cli.dashboard_data import Line, Viewer
from moeray.dashboards.grafana import COLUMNS, Dashboard
from moeray.dashboards.panels import Panel

UNIT_IN, WIDTH_IN, DPI = 0.36, 17.0, 75
BACK, PANEL, TEXT, FAINT = "#111217", "#181b1f", "#ccccdc", "#3a3d45"
GREEN, BOUND = "#73bf69", "#ff9830"
COLORS = (GREEN, "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#96d98d", "#ffb357", "#c0d8ff")
MOST_LEGENDS = 9
COLORS_OF_A_PICTURE = 128
CELLS_WITH_NUMBERS = 150


def draw(dashboard: Dashboard, viewer: Viewer, path: Path) -> None:
    """Write a picture of the dashboard as the viewer sees it. Raises MoerayError where Prometheus does not answer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    viewer.choose(dashboard)
    marks = [(a.color, at) for a in dashboard.annotations for at in viewer.marks(a)]
    places = list(_places(dashboard))
    units = max(y + (panel.height if panel else 1) for panel, _, _, y in places) + 1
    with pyplot.rc_context(_STYLE):
        figure = pyplot.figure(figsize=(WIDTH_IN, units * UNIT_IN))
        figure.text(0.008, 1 - 0.65 / units, dashboard.title, fontsize=14, va="center")
        for panel, title, x, y in places:
            if panel is None:
                figure.text(0.008, 1 - (y + 1.55) / units, f"▾ {title}", fontsize=11, va="center")
            else:
                _draw_panel(figure, panel, viewer, marks, (x, y + 1, units))
        figure.savefig(path, dpi=DPI)
        pyplot.close(figure)
    _shrink(path)


def _shrink(path: Path) -> None:
    """Fewer colours: a third of the bytes."""
    from PIL import Image

    with Image.open(path) as image:
        image.convert("RGB").quantize(COLORS_OF_A_PICTURE).save(path, optimize=True)


def _places(dashboard: Dashboard) -> Iterator[tuple[Panel | None, str, int, int]]:
    """(panel, or None for a row's heading; its title; x; y) in the grid."""
    y = 0
    for row in dashboard.rows:
        yield None, row.title, 0, y
        x, y, tallest = 0, y + 1, 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            yield panel, panel.title, x, y
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest


def _draw_panel(
    figure: Any, panel: Panel, viewer: Viewer, marks: list[tuple[str, float]], place: tuple[int, int, int]
) -> None:
    x, y, units = place
    gap = 0.0035
    box = (x / COLUMNS + gap, 1 - (y + panel.height) / units + gap, panel.width / COLUMNS - 2 * gap)
    height = panel.height / units - 2 * gap
    back = figure.add_axes((*box, height), facecolor=PANEL, xticks=[], yticks=[])
    title = viewer.filled(panel.title).replace(".*", "all groups")
    back.text(0.012 * COLUMNS / panel.width, 1 - 0.45 / panel.height, title, va="center")
    foot = 2.0 if panel.plugin == "timeseries" else 1.0
    inner = (
        box[0] + 0.032, box[1] + foot * height / panel.height, box[2] - 0.04, height * (1 - (foot + 1.4) / panel.height)
    )  # fmt: skip
    lines = viewer.lines(panel)
    if not lines:
        back.text(0.5, 0.5, "No data", ha="center", va="center", fontsize=12, color="#8e8e99")
        return
    if panel.plugin == "stat":
        _draw_stat(back, panel, lines)
        return
    axes = figure.add_axes(inner, facecolor=PANEL)
    _DRAW[panel.kind](axes, panel, lines)
    if panel.plugin == "timeseries":
        _draw_marks(axes, viewer, marks)
        _draw_legend(axes, panel.width)


def _draw_stat(axes: Any, panel: Panel, lines: list[Line]) -> None:
    line = lines[0]
    color = TEXT if panel.kind == "name" else GREEN
    for value, name in panel.steps:
        color = name if line.last >= value else color
    texts = dict(panel.texts)
    text = line.legend if panel.kind == "name" else texts.get(line.last) or shown(line.last, panel.unit, panel.decimals)
    size = min(21.0, 46.0 * panel.width / len(text))
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=size, color=color)
    values = [value for _, value in line.points if math.isfinite(value)]
    if panel.kind == "stat" and len(values) > 1:
        spark = axes.inset_axes((0.0, 0.0, 1.0, 0.3))
        spark.fill_between(range(len(values)), values, color=color, alpha=0.25, linewidth=0)
        spark.plot(values, color=color, linewidth=0.8)
        spark.set_ylim(0, max(values) * 1.1 or 1)
        spark.axis("off")


def _draw_lines(axes: Any, panel: Panel, lines: list[Line]) -> None:
    own = [line for line in lines if not line.bound]
    below: dict[datetime, float] = {}
    for line, color in zip(own, _cycle(), strict=False):
        times, values = _xy(line)
        base = [below.get(at, 0.0) if panel.stacked else 0.0 for at in times]
        tops = [low + value for low, value in zip(base, values, strict=True)]
        axes.plot(times, tops, color=color, linewidth=1.1, label=_label(line, panel))
        if panel.stacked or len(lines) == 1:
            axes.fill_between(times, base, tops, color=color, alpha=0.2, linewidth=0)
        below |= dict(zip(times, tops, strict=True))
    _finish_lines(axes, panel, lines)


def _draw_bars(axes: Any, panel: Panel, lines: list[Line]) -> None:
    base: dict[datetime, float] = {}
    for line, color in zip(lines, _cycle(), strict=False):
        times, values = _xy(line)
        width = (times[1] - times[0]) * 0.9 if len(times) > 1 else None
        bottom = [base.get(at, 0.0) for at in times]
        axes.bar(times, values, width, bottom, color=color, label=_label(line, panel))
        base |= {at: below + value for at, below, value in zip(times, bottom, values, strict=True)}
    _finish_lines(axes, panel, lines)


def _finish_lines(axes: Any, panel: Panel, lines: list[Line]) -> None:
    for line in lines:
        if line.bound:
            axes.plot(*_xy(line), color=BOUND, linewidth=1.2, linestyle="--", label=_label(line, panel))
    for value, color in panel.steps:
        axes.axhline(value, color=color, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, panel.axis_max or max(axes.get_ylim()[1], 1e-9))
    axes.yaxis.set_major_formatter(lambda value, _: shown(value, panel.unit, None))
    _mark_time(axes)
    axes.grid(color=FAINT, linewidth=0.4)


def _mark_time(axes: Any) -> None:
    """At whole minutes, also where few are shown."""
    from matplotlib.dates import AutoDateLocator, DateFormatter

    axes.xaxis.set_major_locator(AutoDateLocator(minticks=2, maxticks=6))
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M"))


def _draw_marks(axes: Any, viewer: Viewer, marks: list[tuple[str, float]]) -> None:
    """Of marks that follow each other at every step, the first."""
    shown_at: dict[str, float] = {}
    for color, at in marks:
        if at - shown_at.get(color, 0.0) > 1.5 * viewer.step():
            axes.axvline(_time(at), color=color, linewidth=0.9, linestyle=(0, (3, 2)), alpha=0.8)
        shown_at[color] = at
    axes.set_xlim(_time(viewer.end - viewer.seconds), _time(viewer.end))


def _draw_legend(axes: Any, width: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > MOST_LEGENDS:
        labels = [*labels[: MOST_LEGENDS - 1], f"and {len(labels) - MOST_LEGENDS + 1} more"]
    columns = 3 if len(labels) > 4 else 2
    axes.legend(
        handles[: len(labels)], labels, loc="upper left", bbox_to_anchor=(-0.64 / width, -0.11), ncols=columns,
        fontsize=7, frameon=False, handlelength=1.2, columnspacing=1.0, labelspacing=0.25, borderpad=0,
    )  # fmt: skip


def _draw_gauges(axes: Any, panel: Panel, lines: list[Line]) -> None:
    for row, (line, color) in enumerate(zip(lines, _cycle(), strict=False)):
        axes.barh(row, line.last, color=color, height=0.55)
        axes.text(0, row - 0.42, f"{line.legend}: {shown(line.last, panel.unit, panel.decimals)}", fontsize=9)
    axes.set_ylim(len(lines) - 0.5, -0.7)
    axes.axis("off")


def _draw_matrix(axes: Any, panel: Panel, lines: list[Line]) -> None:
    layers, experts = (sorted({line.labels[name] for line in lines}) for name in ("layer", "expert"))
    cells = [[math.nan] * len(experts) for _ in layers]
    for line in lines:
        cells[layers.index(line.labels["layer"])][experts.index(line.labels["expert"])] = line.last
    axes.imshow(cells, aspect="auto", cmap="RdYlBu_r")
    axes.set_xticks(range(len(experts)), experts)
    axes.set_yticks(range(len(layers)), layers)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    if len(lines) <= CELLS_WITH_NUMBERS:
        for y, row in enumerate(cells):
            for x, value in enumerate(row):
                axes.text(x, y, shown(value, panel.unit, 0), ha="center", va="center", color="black", fontsize=8)


def _draw_heatmap(axes: Any, panel: Panel, lines: list[Line]) -> None:
    times = sorted({at for line in lines for at, _ in line.points})
    by_time = [dict(line.points) for line in lines]
    cells = [[row.get(at, math.nan) for at in times] for row in by_time]
    mesh = axes.pcolormesh([_time(at) for at in times], range(len(lines)), cells, cmap="inferno", shading="nearest")
    axes.set_yticks(range(len(lines)), [line.legend for line in lines], fontsize=7)
    _mark_time(axes)
    axes.figure.colorbar(mesh, ax=axes, pad=0.01, aspect=40)


_DRAW: dict[str, Callable[[Any, Panel, list[Line]], None]] = {
    "lines": _draw_lines, "bars": _draw_bars, "bargauge": _draw_gauges, "matrix": _draw_matrix,
    "heatmap": _draw_heatmap,
}  # fmt: skip
_STYLE = {
    "figure.facecolor": BACK, "text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT,
    "axes.edgecolor": FAINT, "font.size": 9, "xtick.labelsize": 7, "ytick.labelsize": 7, "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False,
}  # fmt: skip


def shown(value: float, unit: str, decimals: int | None) -> str:
    """A value for people, in a unit of Grafana's."""
    if not math.isfinite(value):
        return "-"
    if unit == "percentunit":
        return f"{value * 100:.{1 if decimals is None else decimals}f} %"
    if unit == "s":
        for size, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
            if abs(value) >= size:
                return f"{value / size:.3g} {name}"
        return "0 s"
    scale = 1024.0 if unit == "bytes" else 1000.0
    name = {"bytes": "iB", "Bps": "B/s", "reqps": " req/s", "ops": " ops/s", "cps": " c/s", "h": " h"}.get(unit, "")
    size = 0
    while abs(value) >= scale and size < 5:
        value, size = value / scale, size + 1
    prefix = " kMGTP"[size].strip().replace("k", "K" if unit == "bytes" else "k")
    number = f"{value:.{decimals}f}" if decimals is not None and size == 0 else f"{value:.3g}"
    return f"{number}{' ' if unit in ('bytes', 'Bps') else ''}{prefix}{name}"


def _label(line: Line, panel: Panel) -> str:
    return f"{line.legend}  {shown(line.last, panel.unit, panel.decimals)}"


def _cycle() -> Iterator[str]:
    while True:
        yield from COLORS


def _time(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)


def _xy(line: Line) -> tuple[list[datetime], list[float]]:
    return [_time(at) for at, _ in line.points], [value for _, value in line.points]
