"""The `moeray` command. One file a command; errors are one line on stderr and exit code 1."""

from __future__ import annotations

import errno
import importlib
import sys
from typing import ClassVar

import click

from moeray import __version__
from moeray.errors import MoerayError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Commands(click.Group):
    """Commands are imported when they are called, so that `--help` needs neither torch nor Ray."""

    _modules: ClassVar[dict[str, str]] = {
        "batch": "batch",
        "bench": "bench",
        "chaos": "chaos",
        "dashboards": "dashboards",
        "demo": "demo",
        "doctor": "doctor",
        "drain": "drain",
        "generate": "generate",
        "pause-autoscaling": "pause:pause",
        "plan": "plan",
        "rebalance": "rebalance",
        "resume-autoscaling": "pause:resume",
        "scale": "scale",
        "serve": "serve",
        "simulate": "simulate",
        "status": "status",
        "upcycle": "upcycle",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._modules:
            return None
        module, _, name = self._modules[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(f"moeray.cli.{module}"), name or "command")
        return command


@click.group(cls=_Commands)
@click.version_option(__version__, prog_name="moeray")
def cli() -> None:
    """Serve open-weight Mixture-of-Experts models, their experts as Ray actors."""


def main() -> None:
    """Entry point of the console script."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except MoerayError as error:
        click.echo(f"moeray: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno not in _DISK_FULL:
            raise  # not of a file that somebody has named
        where = f"{error.filename}: " if error.filename is not None else ""
        click.echo(f"moeray: {where}{error.strerror}; check the path, its rights and the space there", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
