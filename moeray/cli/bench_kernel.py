"""`moeray bench kernel`: how near the expert kernels come to what this machine can do."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from moeray.cli.options import COUNT, listed
from moeray.cli.progress import progress

if TYPE_CHECKING:
    from moeray.settings.experts import ExpertKernel


@click.command("kernel")
@click.option("--formats", default="bf16,int8,fp8,mxfp4", show_default=True, help="With commas between.")
@click.option("--kernels", default=None, help="With commas between.  [default: native,torch; on a GPU triton,torch]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--rows", type=listed(COUNT), default="1,2,4,8,32,256", show_default=True,
              help="Rows of each expert, with commas between.")  # fmt: skip
@click.option("--threads", type=listed(COUNT), help="CPU threads, with commas between.  [default: 1 and all cores]")
@click.option("--hidden", type=click.IntRange(32), default=1024, show_default=True)
@click.option("--intermediate", type=click.IntRange(32), default=512, show_default=True)
@click.option("--distinct", type=COUNT, default=8, show_default=True, help="Experts of a forward.")
@click.option("--repeat", type=COUNT, default=7, show_default=True, help="Forwards in each of 3 turns.")
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def command(
    formats: str,
    kernels: str | None,
    device: Literal["cpu", "cuda"],
    rows: tuple[int, ...],
    threads: tuple[int, ...] | None,
    output: str,
    **sizes: int,
) -> None:
    """Experts' forwards by weight format and rows per expert, on moeray's kernels and on torch.

    Beside each stand this machine's ceilings, measured in turn with it: reading memory, and multiplying. On a GPU a
    forward's time includes its launches, so let it have some work: --hidden 4096 --intermediate 1536 --distinct 32.
    """
    from moeray.bench.kernel import KernelPlan, measure

    cores = os.cpu_count() or 1
    plan = KernelPlan(
        formats=tuple(formats.split(",")),
        kernels=cast("tuple[ExpertKernel, ...]", tuple(kernels.split(",")) if kernels else ()),
        device=device,
        rows=rows,
        threads=threads or ((1, cores) if cores > 1 and device == "cpu" else (1,)),
        **sizes,
    )
    with progress() as report:
        result = measure(plan, report)
    if output == "json":
        click.echo(json.dumps(result))
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    """Print the table, and what its columns mean."""
    from rich.console import Console

    from moeray.cli.tables import narrow

    plan = result["plan"]
    title = (
        f"{plan['distinct']} experts of {plan['hidden']}x{plan['intermediate']} a forward, bf16 rows, "
        f"{result['machine']}; best of 3 x {plan['repeat']}"
    )
    columns = ("weights", "kernel", "rows", "threads", "ms", "median", "GB/s", "GFLOP/s", "roofline", "error")
    table = narrow(title, *columns)
    for f in result["figures"]:
        table.add_row(
            f["format"], f["kernel"], str(f["rows"]), str(f["threads"]),
            f"{1e3 * f['seconds']:.4g}", f"{1e3 * f['median_s']:.4g}",
            f"{f['gb_per_s']:.1f} {f['gb_per_s'] / f['read_gb_per_s']:4.0%}",
            f"{f['gflop_per_s']:.0f} {f['gflop_per_s'] / f['peak_gflop_per_s']:4.0%}",
            f"{f['roofline']:.0%}", f"{f['error']:.4f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(
        f"rows: of each expert; %: of what reading memory, or multiplying in {result['multiplies']}, reaches at most"
    )
    console.print(f"on {result['environment']['cpu']}, {result['environment']['cores']} cores")
