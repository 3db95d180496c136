"""`moeray doctor`: whether an installation can run moeray, and how to mend what is wrong."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from moeray.cli.ray_address import astray, unreachable
from moeray.config import Config, load_config
from moeray.errors import ConfigError, MoerayError

if TYPE_CHECKING:
    from moeray.cli.checks.finding import Finding

_MARKS = {"ok": "[green]✓", "warn": "[yellow]![/]", "fail": "[bold red]✗", "skipped": "[dim]-"}


@click.command("doctor")
@click.argument("model", required=False)
@click.option("--config", "config_file", type=click.Path(), help="The YAML file that moeray is to run with.")
@click.option("--port", type=int, help="The endpoint's port, as for `moeray serve` [default: the config's].")
@click.option("--address", help="The Ray cluster's address [default: RAY_ADDRESS, else the local one].")
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def command(model: str | None, config_file: str | None, port: int | None, address: str | None, output: str) -> None:
    """Check this machine, its Ray cluster where there is one, and MODEL where one is named.

    Ends with 1 where something has to be mended before moeray can run.
    """
    from rich.console import Console

    with Console(stderr=True).status("looking at this machine and at Ray ..."):
        findings = list(_examine({"model": model, "serve.port": port}, config_file, address))
    healthy = all(finding.verdict != "fail" for finding in findings)
    if output == "json":
        click.echo(json.dumps({"healthy": healthy, "findings": [asdict(finding) for finding in findings]}))
    else:
        _print(findings)
    if not healthy:
        raise MoerayError("what is marked ✗ is to be mended")


def _examine(flags: Mapping[str, Any], config_file: str | None, address: str | None) -> Iterator[Finding]:
    from moeray.cli.checks import cluster, nodes
    from moeray.cli.checks.finding import failed_by, ok
    from moeray.cli.checks.gather import surveying

    given = {key: value for key, value in flags.items() if value is not None}
    try:
        config = load_config(config_file, given)
        yield ok("config", config_file or "the defaults")
    except ConfigError as error:
        config = Config(model=given.get("model", ""))
        yield failed_by("config", error)
    lost, stray = unreachable(address), astray(address)
    if lost or stray:
        yield from _examine_here(config)
        survey = {"error": lost} if lost else {"absent": f"{stray}; `moeray serve` starts a cluster of its own"}
    else:
        with surveying(address) as asked:
            yield from _examine_here(config)
            survey = asked.result()
    yield from cluster.examine(survey, nodes.facts(), config.wire.host, config.wire.remotes)


def _examine_here(config: Config) -> Iterator[Finding]:
    from moeray.cli.checks import nodes, software
    from moeray.cli.checks.finding import fail

    asked = importlib.metadata.metadata("moeray")
    yield software.python(platform.python_version(), asked["Requires-Python"])
    yield software.packages(importlib.metadata.requires("moeray") or (), nodes.version_of)
    try:
        yield from _machine(config)
        yield from _files(config)
    except ImportError as error:  # the checks need what moeray needs
        yield fail("imports", str(error), "mend the packages first, then ask again")


def _files(config: Config) -> Iterator[Finding]:
    from moeray.cli.checks import files, named, secrets

    yield files.runtime_folder()
    yield files.cache_folder(config.cache_folder)
    yield secrets.token(config.wire.token)
    yield secrets.api_key(config.serve.api_key, config.serve.host)
    yield from named.examine(config)
    yield files.model(config.model, config.revision)


def _machine(config: Config) -> Iterator[Finding]:
    import psutil
    import torch

    from moeray.cli.checks import gather, machine, nodes, software
    from moeray.model.kernels import native
    from moeray.threads import cpu_quota

    instructions = native.best_instructions().name if native.available() else None
    yield software.kernels(instructions, config.experts.kernel)
    groups = config.experts.resolved()
    computing = sum(group.actors * group.threads for group in groups if group.device == "cpu")
    wanted = "cuda" in {config.router.device, *(group.device for group in groups)}
    yield machine.cpu(len(os.sched_getaffinity(0)), cpu_quota(), computing)
    yield machine.gpus(nodes.count_gpus(), torch.cuda.device_count(), nodes.cuda_build(), wanted)
    ring = gather.ring_error(config.wire.shared_memory_bytes)
    yield machine.shared_memory(ring, gather.ring_bytes(config), psutil.virtual_memory().available)
    yield machine.object_store(gather.shm_free())
    yield machine.open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    host, port = config.serve.host, config.serve.port
    taken = gather.bind_error(host, port)
    holder, ours = (gather.holder_of(port), gather.is_endpoint(host, port)) if taken else (None, False)
    yield machine.port(host, port, taken, holder, ours)
    yield machine.wire(config.wire.host, gather.bind_error(config.wire.host, 0), config.wire.remotes)


def _print(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 1))
    for finding in findings:
        mend = f"\n[bold]→ {escape(finding.mend)}[/]" if finding.mend else ""
        table.add_row(_MARKS[finding.verdict], finding.name, escape(finding.what) + mend)
    Console(highlight=False).print(table)
