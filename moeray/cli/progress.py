"""Progress bars on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

Report = Callable[[str, int, int], None]
"""(what is done, units done, units in all)"""


@contextmanager
def progress() -> Iterator[Report]:
    """Yield a reporter; each distinct text gets a bar of its own."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain()
        return
    columns = (TextColumn("{task.description:<36}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


def phases(report: Report) -> Callable[[str], None]:
    """Turn lines such as `loading experts 12/64` into a bar, and print any other line."""
    console = Console(stderr=True)

    def show(detail: str) -> None:
        counted = re.fullmatch(r"(.*) (\d+)/(\d+)", detail)
        if counted:
            report(counted[1], int(counted[2]), int(counted[3]))
        else:
            console.print(f"  {detail}", highlight=False)

    return show


def _plain() -> Report:
    shown: dict[str, int] = {}

    def report(what: str, done: int, total: int) -> None:
        quarter = 4 * done // max(total, 1)
        if shown.get(what) != quarter:
            shown[what] = quarter
            print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)

    return report
