"""`moeray bench engine MODEL`: tokens per second, and where a step's time goes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import click

from moeray.cli.options import COUNT, config_of, config_options, listed
from moeray.cli.progress import progress

_DEFAULTS = {
    # One step takes as many prompt tokens as peers' default budget does, and no prompt is found in a cache.
    "engine__prefill_chunk": 2048, "engine__prefix_cache": False, "dtype": "bfloat16",
    # Replicas of a node share one mapping, so every actor may host every expert, and rows can be split evenly.
    "experts__replicas": 2,
}  # fmt: skip


@click.command("engine")
@click.argument("model")
@click.option(
    "--actors",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="Expert processes; 0: within the engine's.",
)
@click.option("--batch", "batches", type=listed(COUNT), default="1,8,32", show_default=True,
              help="Sequences at once, commas between.")  # fmt: skip
@click.option("--prompt-tokens", type=COUNT, default=256, show_default=True)
@click.option("--output-tokens", type=COUNT, default=64, show_default=True)
@click.option("--rounds", type=COUNT, default=3, show_default=True, help="Runs of each; medians are shown.")
@click.option("--in-process", is_flag=True, help="Run the same engine with its experts in process too, in alternation.")
@click.option("--overlap", is_flag=True, help="Run it with both halves of a batch at the same time, in alternation.")
@click.option("--tcp", is_flag=True, help="Run it over TCP too, as between nodes, in alternation.")
@click.option("--grpc", is_flag=True, help="Run it over gRPC too, as between nodes with TLS, in alternation.")
@click.option("--against", multiple=True, metavar="PEER=PYTHON", help="vllm or transformers, run in alternation.")
@click.option("--plot", type=click.Path(), help="Write the budgets as a PNG (with moeray[plot]).")
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@config_options
def command(
    model: str, actors: int, batches: tuple[int, ...], prompt_tokens: int, output_tokens: int, rounds: int,
    in_process: bool, overlap: bool, tcp: bool, grpc: bool, against: tuple[str, ...], plot: str | None, output: str,
    config_file: str | None, **flags: Any,
) -> None:  # fmt: skip
    """Prefill and decode tokens per second of a real engine and real expert processes, with a budget of a step.

    Sequences of random tokens are sampled at temperature 1. Peers do the same work in turn; ratios are ours to theirs.
    """
    from moeray.threads import wait_passively

    wait_passively()
    import torch

    from moeray.bench.engine import Contender, Workload, measure, own_engines
    from moeray.bench.peers import peer
    from moeray.settings.wire import Remote

    if plot is not None:
        from moeray.cli.plots import require_matplotlib

        require_matplotlib()
    config = config_of(model, config_file, flags, **_DEFAULTS)
    work = Workload(batches, prompt_tokens, output_tokens, rounds)
    threads = config.router.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    asked: dict[Remote, bool] = {"tcp": tcp, "grpc": grpc}
    remotes = [remote for remote, on in asked.items() if on]
    with ExitStack() as stack, progress() as report:
        own = stack.enter_context(own_engines(config, actors, overlap=overlap, remotes=remotes, local=in_process))
        contenders: dict[str, Contender] = dict(own)
        for entry in against:
            name, _, python = entry.partition("=")
            contenders[name] = stack.enter_context(peer(name, python, config.model, threads))
        result = measure(contenders, work, report) | {"model": model, "actors": actors}
    if plot is not None:
        from moeray.cli.budget_plot import write_budgets

        write_budgets(result, plot)
    if output == "json":
        click.echo(json.dumps(result))
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    """Print the rates, then the budgets."""
    from rich.console import Console

    from moeray.cli.tables import narrow

    console = Console()
    title = f"tokens/s of {result['model']}; ratios are moeray's to it"
    speed = narrow(title, "batch", "engine", "prefill", "decode", "prefill ratio", "decode ratio")
    parts = ("step", "trunk", "gate", "dispatch", "experts", "combine", "sampling", "other")
    spent = {
        key: narrow(f"{what}, ms; tax: the part that dispatching takes", "batch", "engine", *parts, "tax")
        for key, what in {"prefill_budget": "all prompts", "budget": "a decode step"}.items()
    }
    for row in result["rows"]:
        for name, figures in row.items():
            if name == "batch":
                continue
            ratios = [f"{figures[key]:.2f} x" if key in figures else "" for key in ("prefill_ratio", "decode_ratio")]
            rates = [f"{figures['prefill_tok_s']:.0f}", f"{figures['decode_tok_s']:.1f}"]
            speed.add_row(str(row["batch"]), name, *rates, *ratios)
            for key in spent.keys() & figures.keys():
                times = [_ms(figures[key][f"{part}_ms"]) for part in parts]
                spent[key].add_row(str(row["batch"]), name, *times, f"{figures[key]['tax']:.0%}")
    console.print(speed)
    for line in _doubts(result):
        console.print(line)
    for table in spent.values():
        console.print()
        console.print(table)
    console.print()
    where = result["environment"]
    console.print(f"on {where['cpu']}, {where['cores']} cores, load average {result['load_average']:.1f}")


def _doubts(result: dict[str, Any]) -> Iterator[str]:
    """What to say of rates that the machine has spoilt."""
    for row in result["rows"]:
        for name, figures in row.items():
            if name != "batch" and figures.get("disturbed"):
                by_steps = 1000 * row["batch"] / figures["budget"]["step_ms"]
                yield (
                    f"batch {row['batch']}: {name} decodes {by_steps:.1f} tokens/s by its steps, so the machine was "
                    "disturbed and these rates and ratios are not to be trusted; repeat with more --rounds"
                )


def _ms(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"
