"""`moeray bench serve URL`: latency and throughput over HTTP."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import click

from moeray.cli.options import COUNT, POSITIVE, listed
from moeray.cli.progress import progress


@click.command("serve")
@click.argument("url")
@click.option(
    "--concurrency", type=listed(COUNT), default="1,8,32", show_default=True, help="Requests in flight, commas between."
)
@click.option("--rate", "rates", type=listed(POSITIVE), help="Instead: random arrivals per second, commas between.")
@click.option("--requests", "count", type=COUNT, default=64, show_default=True, help="Requests of each level.")
@click.option("--prompt-tokens", type=COUNT, default=256, show_default=True)
@click.option("--output-tokens", type=COUNT, default=64, show_default=True)
@click.option("--vocab", type=COUNT, default=1000, show_default=True, help="Prompts are token ids below this.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--model", help="[default: the first that the endpoint lists]")
@click.option("--api-key", envvar="MOERAY_API_KEY", help="[default: MOERAY_API_KEY]")
@click.option("--against", metavar="URL", help="Another endpoint, measured in alternation.")
@click.option("--plot", type=click.Path(), help="Write the curves as a PNG (with moeray[plot]).")
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def command(
    url: str, concurrency: tuple[int, ...], rates: tuple[float, ...] | None, count: int, prompt_tokens: int,
    output_tokens: int, vocab: int, seed: int, model: str | None, api_key: str | None, against: str | None,
    plot: str | None, output: str,
) -> None:  # fmt: skip
    """Time to the first token, time between tokens and throughput of an OpenAI endpoint, level by level."""
    from moeray.bench.serve import Endpoint, Level, Requests, measure

    if plot is not None:
        from moeray.cli.plots import require_matplotlib

        require_matplotlib()
    levels = [Level(rate=rate) for rate in rates] if rates else [Level(concurrency=many) for many in concurrency]
    endpoints = {"moeray": Endpoint(url.rstrip("/"), model, api_key)}
    if against:
        endpoints["other"] = Endpoint(against.rstrip("/"))
    requests = Requests(count, prompt_tokens, output_tokens, vocab, seed)
    with progress() as report:
        result = asyncio.run(measure(endpoints, levels, requests, report))
    result["endpoints"] = {name: endpoint.url for name, endpoint in endpoints.items()}
    if plot is not None:
        _write_plot(result, Path(plot))
    if output == "json":
        click.echo(json.dumps(result))
    else:
        show(result)
    if any(row[name]["errors"] for row in result["rows"] for name in endpoints):
        raise SystemExit(1)


def _level(row: dict[str, Any]) -> str:
    return f"{row['concurrency']} at once" if row["rate"] is None else f"{row['rate']:g}/s"


def show(result: dict[str, Any]) -> None:
    """Print the table, and what went wrong above it."""
    from rich.console import Console

    from moeray.cli.tables import narrow

    console, asked = Console(), result["requests"]
    title = (
        f"{asked['count']} requests of {asked['prompt']} tokens, {asked['output']} generated; ms to the first token "
        "(TTFT) and between tokens (TPOT)"
    )
    columns = ("load", "endpoint", "req/s", "tokens/s", "TTFT p50", "p99", "TPOT p50", "p99", "errors")
    table = narrow(title, *columns)
    for row in result["rows"]:
        for name in result["endpoints"]:
            figures = row[name]
            if figures["errors"]:
                console.print(f"{name}: {figures['errors']} errors, the first: {figures['first_error']}")
            times = [
                f"{1e3 * figures[kind][p]:.0f}" if figures.get(kind) else "-"
                for kind in ("ttft_s", "tpot_s")
                for p in ("p50", "p99")
            ]
            rates = [f"{figures[key]:.1f}" if key in figures else "-" for key in ("requests_per_s", "output_tok_s")]
            table.add_row(_level(row), name, *rates, *times, str(figures["errors"]))
    console.print(table)


def _write_plot(result: dict[str, Any], path: Path) -> None:
    """Throughput and latencies over the levels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, sharex=True, figsize=(8, 9))
    levels = [_level(row) for row in result["rows"]]
    for name in result["endpoints"]:
        rows = [row[name] for row in result["rows"]]
        axes[0].plot(levels, [r.get("output_tok_s", 0.0) for r in rows], "o-", label=name)
        for panel, kind in ((axes[1], "ttft_s"), (axes[2], "tpot_s")):
            for p, style in (("p50", "o:"), ("p99", "o-")):
                panel.plot(levels, [1e3 * r.get(kind, {}).get(p, 0.0) for r in rows], style, label=f"{name} {p}")
    for panel, label in zip(axes, ("tokens/s", "first token, ms", "between tokens, ms"), strict=True):
        panel.set_ylabel(label)
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
