"""`moeray bench ...`: benchmarks that a user can run. One file a benchmark."""

from __future__ import annotations

import importlib
from typing import ClassVar

import click


class _Benchmarks(click.Group):
    """Imported when they are called."""

    _names: ClassVar[tuple[str, ...]] = (
        "calibrate", "dispatch", "engine", "grow", "kernel", "metrics", "plan", "replay", "serve", "skew",
    )  # fmt: skip

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._names:
            return None
        command: click.Command = importlib.import_module(f"moeray.cli.bench_{cmd_name}").command
        return command


@click.group("bench", cls=_Benchmarks)
def command() -> None:
    """Measure moeray on this machine."""
