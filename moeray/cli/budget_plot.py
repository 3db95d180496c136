"""The budget of a decode step as a picture. matplotlib is an extra: `pip install moeray[plot]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeray.bench.budget import PARTS


def write_budgets(result: dict[str, Any], path: str | Path) -> None:
    """Stacked bars, one for each batch and engine whose budget is known."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{name}, batch {row['batch']}", figures["budget"])
        for row in result["rows"]
        for name, figures in row.items()
        if name != "batch" and "budget" in figures
    ]
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.6 * len(bars)))
    left = [0.0] * len(bars)
    for part in PARTS:
        widths = [budget[f"{part}_ms"] for _, budget in bars]
        axes.barh([label for label, _ in bars], widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms of a decode step")
    axes.legend(ncols=len(PARTS), loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
