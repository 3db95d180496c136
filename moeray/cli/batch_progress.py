"""How far a batch is: a bar on a terminal, a plain line every few seconds elsewhere, and the table at its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moeray.jobs.tally import Pace, Reading, Tally

BAR_S = 0.5
LINE_S = 5.0


@asynccontextmanager
async def shown(tally: Tally) -> AsyncIterator[None]:
    """Show the tally on stderr for as long as the block runs, and once more at its end."""
    console, pace = Console(stderr=True), Pace()
    pace.read(_reading(tally))
    watch = asyncio.create_task((_bar if console.is_terminal else _lines)(console, tally, pace))
    try:
        yield
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        if not console.is_terminal:
            _print_line(console, tally, pace)


async def _bar(console: Console, tally: Tally, pace: Pace) -> None:
    columns = (TextColumn("batch"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(line_of(tally, pace), total=tally.lines, completed=tally.done)
        try:
            while True:
                await asyncio.sleep(BAR_S)
                pace.read(_reading(tally))
                bars.update(task, completed=tally.done, description=line_of(tally, pace))
        finally:
            bars.update(task, completed=tally.done, description=line_of(tally, pace))


async def _lines(console: Console, tally: Tally, pace: Pace) -> None:
    while True:
        _print_line(console, tally, pace)
        await asyncio.sleep(LINE_S)


def _print_line(console: Console, tally: Tally, pace: Pace) -> None:
    pace.read(_reading(tally))
    console.print(f"batch: {line_of(tally, pace)}", highlight=False, soft_wrap=True)


def _reading(tally: Tally) -> Reading:
    return Reading(time.monotonic(), tally.done, tally.generated)


def line_of(tally: Tally, pace: Pace) -> str:
    """`420/1000 lines, 3 errors, 128 in flight, 812 tokens/s, 0:00:41 left`."""
    left = pace.seconds_left(tally.lines)
    parts = [
        f"{tally.done}/{tally.lines} lines",
        f"{tally.errors} error{'' if tally.errors == 1 else 's'}",
        f"{tally.in_flight} in flight",
        f"{pace.tokens_per_second():.0f} tokens/s",
    ]
    if left is not None and not tally.complete:
        parts.append(f"{timedelta(seconds=round(left))} left")
    return ", ".join(parts)


def summary_of(tally: Tally, outcome: str) -> dict[str, Any]:
    """What became of the input, as plain data."""
    return {
        "outcome": outcome,
        "lines": tally.lines,
        "answered": tally.answered,
        "earlier": tally.earlier,
        "errors": tally.errors,
        "left": tally.lines - tally.done,
        "codes": dict(tally.codes),
        "prompt_tokens": tally.prompt_tokens,
        "completion_tokens": tally.completion_tokens,
        "seconds": tally.seconds,
        "tokens_per_second": tally.completion_tokens / tally.seconds if tally.seconds else 0.0,
    }


def print_summary(figures: dict[str, Any], files: dict[str, str]) -> None:
    """The table at the end, on stdout."""
    table = Table(title=f"batch: {figures['outcome']}", title_justify="left", show_header=False)
    for key, text in _ROWS.items():
        value = figures[key]
        table.add_row(text, f"{value:.1f}" if isinstance(value, float) else str(value))
    for code, count in sorted(figures["codes"].items()):
        table.add_row(f"  error {code}", str(count))
    console = Console()
    console.print(table)
    for what, path in files.items():
        console.print(f"{what}: {path}", highlight=False, soft_wrap=True)


_ROWS = {
    "lines": "lines of the input", "answered": "answered", "earlier": "settled by earlier runs",
    "errors": "in the error file", "left": "left for another run", "prompt_tokens": "prompt tokens",
    "completion_tokens": "generated tokens", "seconds": "seconds of asking", "tokens_per_second": "generated tokens/s",
}  # fmt: skip
