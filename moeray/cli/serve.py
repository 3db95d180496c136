"""`moeray serve MODEL`: the endpoint on a Ray cluster, until Ctrl-C."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moeray.cli.options import config_of, config_options


@click.command("serve")
@click.argument("model", required=False)
@config_options
def command(model: str | None, config_file: str | None, **flags: Any) -> None:
    """Serve MODEL (a local folder or a hub id) at an OpenAI-compatible endpoint, until Ctrl-C."""
    from moeray.cli.checks.files import NO_TOKENIZER
    from moeray.cli.endpoint import running_endpoint, wait_for_interrupt
    from moeray.serve.prompt import has_tokenizer

    config = config_of(model or "", config_file, flags)
    if not config.model:
        raise click.UsageError("name a MODEL, or set `model` in the file given by --config")
    folder = Path(config.model).expanduser()
    if folder.is_dir() and not has_tokenizer(folder):
        click.echo(f"warning: no tokenizer in {folder}; {NO_TOKENIZER}", err=True)
    with running_endpoint(config) as url:
        click.echo(f"serving {config.model} at {url}/v1  (Ctrl-C stops it)")
        wait_for_interrupt()
