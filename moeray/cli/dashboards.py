"""`moeray dashboards OUT`: the Grafana dashboards as files, and as pictures without Grafana."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("dashboards")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--datasource", default="", help="The uid of the Prometheus that they show at first.")
def command(out: Path, datasource: str) -> None:
    """Write the Grafana dashboards to OUT, to be imported or provisioned."""
    from moeray.dashboards.catalog import write_dashboards

    for path in write_dashboards(out, datasource):
        click.echo(path)
