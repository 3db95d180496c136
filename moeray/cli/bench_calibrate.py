"""`moeray bench calibrate`: the costs that `moeray simulate` reckons with, measured here."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeray.cli.options import COUNT, config_of, config_options

if TYPE_CHECKING:
    from moeray.config import Config

_DEFAULTS = {
    "experts__max_actors": 3, "experts__num_cpus": 0.1, "experts__threads": 1, "router__num_cpus": 0.1,
    "serve__name": "moeray-calibrate", "engine__kv_blocks": 1024,
}  # fmt: skip


@click.command("calibrate")
@click.argument("model", required=False)
@click.option("--out", type=click.Path(dir_okay=False), help="Write the cost file here, for `moeray simulate --costs`.")
@click.option("--repeat", type=COUNT, default=15, show_default=True, help="Times each point is measured.")
@click.option("--local", is_flag=True, help="All actors in this process, without Ray.")
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@config_options
def command(
    model: str | None, out: str | None, repeat: int, local: bool, output: str, config_file: str | None, **flags: Any
) -> None:
    """Measure what `moeray simulate` reckons with, on a system of its own: trunk, experts, hops, and starts of actors.

    MODEL is a local folder or a hub id; without one, a small random model is measured. Nothing else should run on the
    machine meanwhile.
    """
    from moeray.bench.checkpoint import Shape, write_random_moe

    with tempfile.TemporaryDirectory() as folder:
        defaults = _DEFAULTS | {"control__audit_log": str(Path(folder) / "audit.jsonl")}
        path = model or str(write_random_moe(Shape(vocab=1024), Path(folder) / "random-moe"))
        config = config_of(path, config_file, flags, **defaults)
        result = calibrated(config, local, repeat, report=lambda what: click.echo(f"{what} ...", err=True))
    text = json.dumps(result, indent=2)
    if out is not None:
        Path(out).write_text(text + "\n")
    if output == "json":
        click.echo(json.dumps(result))
        return
    for key, value in result["costs"].items():
        shown = ", ".join(f"{v:.4g}" for v in value) if isinstance(value, list) else f"{value:.4g}"
        click.echo(f"{key:<13} {shown}")
    click.echo(f"on {result['environment']['cpu']}, {result['environment']['cores']} cores")


def calibrated(
    config: Config, local: bool, repeat: int = 15, report: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """`bench.calibrate` on a system of this config, which it starts and stops; its numbers of actors stay."""
    control = replace(config.control, autoscale=False, warm_pool=0)
    return asyncio.run(_run(replace(config, control=control), local, repeat, report))


async def _run(config: Config, local: bool, repeat: int, report: Callable[[str], None]) -> dict[str, Any]:
    from moeray.bench.calibrate import calibrate
    from moeray.cli.session import apart, local_system, ray_system

    async with local_system(config) if local else ray_system(apart(config, "bench")) as backend:
        assert backend.model is not None
        vocab, context = min(backend.model.vocab_size, 32000), backend.model.max_context
        return await calibrate(backend, config, vocab, context, repeat=repeat, report=report)
