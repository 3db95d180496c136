"""`moeray upcycle SOURCE OUT`: a dense Llama-like model made into a Mixture of Experts that computes the same."""

from __future__ import annotations

from pathlib import Path

import click

from moeray.cli.options import COUNT
from moeray.cli.progress import progress


@click.command("upcycle")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--experts", type=COUNT, default=8, show_default=True)
@click.option("--top-k", type=COUNT, default=2, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="bfloat16", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Seeds the random gate.")
def command(source: Path, out: Path, experts: int, top_k: int, dtype: str, seed: int) -> None:
    """Upcycle SOURCE (a folder, or a GGUF file) into a checkpoint in OUT; every expert starts as a copy."""
    import torch

    from moeray.logs import setup_logging
    from moeray.model.upcycle import upcycle

    setup_logging()
    with progress() as report:
        upcycle(source, out, experts=experts, top_k=top_k, dtype=getattr(torch, dtype), progress=report, seed=seed)
    click.echo(f"wrote {out}; try `moeray generate {out} --local --prompt Hello`")
