"""`moeray dashboards OUT`: the Grafana dashboards as files, and as pictures without Grafana."""

from __future__ import annotations

import time
from pathlib import Path

import click

from moeray.cli.options import POSITIVE, SECONDS


@click.command("dashboards")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--datasource", default="", help="The uid of the Prometheus that they show at first.")
@click.option("--draw", metavar="URL", help="Draw them as PNGs (with moeray[plot]), from the Prometheus at URL.")
@click.option("--minutes", type=POSITIVE, default=60.0, show_default=True, help="The span that is drawn, up to now.")
@click.option("--scrape", type=SECONDS, default=15.0, show_default=True, help="Prometheus' scrape interval.")
def command(out: Path, datasource: str, draw: str | None, minutes: float, scrape: float) -> None:
    """Write the Grafana dashboards to OUT, to be imported or provisioned."""
    from moeray.dashboards.catalog import write_dashboards

    paths = _draw_all(out, draw, minutes * 60, scrape) if draw else write_dashboards(out, datasource)
    for path in paths:
        click.echo(path)


def _draw_all(out: Path, url: str, seconds: float, scrape_s: float) -> list[Path]:
    from moeray.cli.dashboard_data import Prometheus, Viewer
    from moeray.cli.dashboard_pictures import draw
    from moeray.cli.plots import require_matplotlib
    from moeray.dashboards.catalog import DASHBOARDS

    require_matplotlib("--draw")
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    with Prometheus(url) as prometheus:
        viewer = Viewer(prometheus, time.time(), seconds, scrape_s)
        for dashboard in DASHBOARDS:
            paths.append(out / f"{dashboard.name}.png")
            draw(dashboard, viewer, paths[-1])
    return paths
