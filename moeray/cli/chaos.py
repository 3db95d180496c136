"""`moeray chaos [MODEL]`: kill actors under load, and show that nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeray.cli.options import COUNT, SECONDS, config_of, config_options
from moeray.cli.progress import progress

if TYPE_CHECKING:
    from moeray.bench.chaos import ChaosPlan, Result
    from moeray.config import Config
    from moeray.serve.system import SystemBackend

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
_DEFAULTS = {
    "experts__replicas": 2, "experts__num_cpus": 0.1, "router__num_cpus": 0.1, "control__warm_pool": 1,
    "dtype": "float32", "serve__name": "moeray-chaos", "engine__kv_blocks": 1024,
}  # fmt: skip


@click.command("chaos")
@click.argument("model", required=False)
@click.option("--kill", type=click.Choice(["experts", "routers", "controller", "any", "none"]), default="experts")
@click.option("--every", type=SECONDS, default="5s", show_default=True, help="Seconds between kills.")
@click.option("--for", "duration", type=SECONDS, default="60s", show_default=True, help="Seconds of load and kills.")
@click.option("--streams", type=COUNT, default=16, show_default=True, help="Requests in flight at any time.")
@click.option("--max-tokens", type=COUNT, default=64, show_default=True, help="Tokens of a request.")
@click.option("--signal", "how", type=click.Choice(sorted(SIGNALS)), default="kill", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@config_options
def command(
    model: str | None, every: float, duration: float, how: str, output: str, config_file: str | None, **flags: Any
) -> None:
    """Serve MODEL, kill its actors again and again under load, and compare every token with an undisturbed run.

    Where no MODEL is named, a small random checkpoint is made. It starts a system of its own (two replicas of each
    expert and a warm pool of one, unless told otherwise) and stops it. Exits 1 when a request was lost or a token
    changed. What is lost and moved on the way is what it is for, so it is counted; --log-level debug shows it all.
    """
    from moeray.bench.chaos import ChaosPlan, summary
    from moeray.bench.checkpoint import write_small_moe

    chosen = {key: flags.pop(key) for key in ("kill", "streams", "max_tokens", "seed")}
    plan = ChaosPlan(**chosen, every_s=every, for_s=duration)
    with tempfile.TemporaryDirectory() as folder, progress() as report:
        defaults = _DEFAULTS | {"control__audit_log": str(Path(folder) / "audit.jsonl")}
        config = config_of(model or write_small_moe(Path(folder)), config_file, flags, **defaults)
        with _ray_keeps_off_stdout(quiet=config.log_level != "debug"):
            result, moved = asyncio.run(_run(config, plan, SIGNALS[how], report))
    figures = summary(result) | {"moved_requests": moved}
    if output == "json":
        click.echo(json.dumps(figures))
    else:
        _print(plan, figures)
    if figures["lost_requests"] or figures["changed_tokens"]:
        raise SystemExit(1)


@contextlib.contextmanager
def _ray_keeps_off_stdout(quiet: bool) -> Iterator[None]:
    """Ray tells of every worker that dies on stdout, which is the result's; until Ray is left, that goes to stderr, or
    nowhere."""
    import ray

    sys.stdout.flush()
    kept, other = os.dup(1), os.open(os.devnull, os.O_WRONLY) if quiet else os.dup(2)
    os.dup2(other, 1)
    os.close(other)
    try:
        yield
    finally:
        ray.shutdown()
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


async def _run(
    config: Config, plan: ChaosPlan, number: int, report: Callable[[str, int, int], None]
) -> tuple[Result, int]:
    """The result, and how many requests went on at another router."""
    from moeray.bench.chaos import run_chaos
    from moeray.cli.session import ray_system
    from moeray.logs import setup_logging

    async with ray_system(config) as backend:
        assert backend.model is not None
        if config.log_level != "debug":
            setup_logging(replace(config, log_level="error"))  # of this process alone
        fitting = replace(plan, vocab=min(backend.model.vocab_size, 32000))
        result = await run_chaos(backend, _killer(backend, number, plan.seed), lambda: _whole(backend), fitting, report)
        return result, int(sum(backend.reading().values["moeray_requests_moved_total"].values()))


def _killer(backend: SystemBackend, number: int, seed: int) -> Callable[[str], Awaitable[str | None]]:
    """Ends one random actor of a kind. An expert actor that hosts nothing (warm, or still starting) is not a victim."""
    from moeray.cluster.ray_kill import kill_process
    from moeray.errors import MoerayError

    rng = random.Random(seed)

    async def kill(kind: str) -> str | None:
        try:
            status = await backend.status()
            if kind == "controller":
                row = status["controller"]
                await asyncio.to_thread(kill_process, row["node"], row["pid"], number)
                return "controller"
            wanted = "expert" if kind == "experts" else "router"
            alive = [row for row in status["actors"] if row["kind"] == wanted and row["state"] == "ready"]
            if not alive:
                return None
            victim = rng.choice(alive)
            await asyncio.to_thread(kill_process, victim["node"], victim["pid"], number)
            return str(victim["actor"])
        except MoerayError:
            return None  # it was dying already, or the controller that was asked is

    return kill


async def _whole(backend: SystemBackend) -> bool:
    """Every expert has the replicas that it should have, and every actor that is wanted is ready."""
    from moeray.errors import MoerayError

    try:
        status = await backend.status()
    except MoerayError:
        return False
    if status["status"] != "ready" or status["changing"]:
        return False
    enough = all(status["ready"].get(group, 0) >= count for group, count in status["wanted"].items())
    silent = any(row["state"] == "silent" for row in status["actors"])
    return enough and not silent and status["fewest_replicas"] >= status["replicas_wanted"]


def _print(plan: ChaosPlan, figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{figures['kills']} kills ({plan.kill}, every {plan.every_s:g} s) under {plan.streams} streams"
    table = Table(title=title, title_justify="left", show_header=False)
    for key, text in _LINES.items():
        value = figures[key]
        table.add_row(text, "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value))
    console = Console()
    console.print(table)
    for error in figures["errors"]:
        console.print(f"lost: {error}", highlight=False)


_LINES = {
    "requests": "requests", "lost_requests": "lost requests", "changed_tokens": "changed tokens", "moved_requests":
    "requests that went on at another router", "tokens": "tokens",
    "tokens_per_second": "tokens/s", "calm_gap_p99_seconds": "gap between tokens without kills, p99 (s)",
    "stall_p50_seconds": "longest gap per kill and stream, p50 (s)", "stall_p99_seconds": "p99 (s)",
    "stall_max_seconds": "maximum (s)", "recovery_p50_seconds": "until all is whole again, p50 (s)",
    "recovery_p99_seconds": "p99 (s)", "not_recovered": "kills not recovered from",
}  # fmt: skip
