"""`moeray status`: the running system as a table, once or as it changes."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import click

from moeray.cli.options import Finite, system_options

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from moeray.cli.readings import Reading

RATE_WINDOW_S = 1.0


@click.command("status")
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C, also while the system is away.")
@click.option("--interval", type=Finite(0.2), default=2.0, show_default=True, help="Seconds, for --watch.")
@system_options
def command(name: str, address: str | None, output: str, watch: bool, interval: float) -> None:
    """Show the running system: its actors, what they host and how busy they are.

    With --watch, a terminal shows a table that changes, a file or pipe gets a table each interval, and --output json
    is one object a line; where there is no answer, it has `error`.
    """
    if watch:
        with _interruptible():
            _watch(name, address, output, interval)
    else:
        _once(name, address, output)


def _once(name: str, address: str | None, output: str) -> None:
    from rich.console import Console

    from moeray.cli.session import attach
    from moeray.cli.status_view import view, with_rates
    from moeray.cluster.ray import ask

    controller = attach(name, address)
    before = {"at": time.time()} | ask(controller, "status")
    time.sleep(RATE_WINDOW_S)
    status = with_rates({"at": time.time()} | ask(controller, "status"), before)
    if output == "json":
        click.echo(json.dumps(status))
    else:
        Console().print(view(status))


# -- watching -----------------------------------------------------------------------------------------------------


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C, SIGTERM and a reader that has gone end the block, and the command with 0."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        sys.stdout = None  # or the interpreter would flush it once more at its end
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(name: str, address: str | None, output: str, interval: float) -> None:
    from rich.console import Console

    from moeray.cli.readings import readings_of

    console = Console()
    with closing(readings_of(name, address, interval)) as readings:
        if output == "json":
            _print_lines(readings)
        elif console.is_terminal:
            _show_live(console, readings)
        else:
            for seen in _views(readings):
                with console.capture() as text:  # by print: rich has an end of its own for a pipe that is closed
                    console.print(seen)
                print(text.get(), end="", flush=True)


def _print_lines(readings: Iterator[Reading]) -> None:
    from moeray.cli.status_view import with_rates

    before = None
    for reading in readings:
        if "error" not in reading:
            before, reading = reading, with_rates(reading, before)
        print(json.dumps(reading), flush=True)


def _show_live(console: Console, readings: Iterator[Reading]) -> None:
    """On the terminal's other screen; what was seen last stays on the first one."""
    from rich.live import Live

    last: RenderableType = "connecting to Ray ..."
    try:
        with Live(last, console=console, screen=True, auto_refresh=False) as live:
            for last in _views(readings):
                live.update(last, refresh=True)
    finally:
        console.print(last)


def _views(readings: Iterator[Reading]) -> Iterator[RenderableType]:
    """Each reading; while there is none, the reason above what was last known."""
    from moeray.cli.status_view import view, with_rates, without_answer

    last = None
    for reading in readings:
        if "error" in reading:
            yield without_answer(reading, last)
        else:
            last = with_rates(reading, last)
            yield view(last)
