"""`moeray batch`: answer a file of requests, in OpenAI's batch format, and go on where a run was ended."""

from __future__ import annotations

import asyncio
import json
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeray.cli.options import COUNT, SECONDS, config_of, config_options

if TYPE_CHECKING:
    from moeray.config import Config
    from moeray.jobs.ledger import Ledger
    from moeray.jobs.survey import BatchInput, Survey
    from moeray.jobs.tally import Tally
    from moeray.serve.system import SystemBackend

SOME_FAILED = 3
PAUSED = 75  # EX_TEMPFAIL of sysexits.h
SIGNALLED = 128


@dataclass(frozen=True)
class Job:
    """What the command line asks for."""

    config: Config
    source: Path
    output: Path
    errors: Path
    concurrency: int | None
    patience_s: float
    local: bool


@click.command("batch")
@click.option("--model", help="A local folder or a hub id. Not needed where a system runs, or --config names it.")
@click.option("-i", "--input", "source", required=True, type=click.Path(path_type=Path), help="JSON lines to answer.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Where the answers go.")
@click.option("--errors", type=click.Path(path_type=Path), help="Where errors go [default: OUTPUT.errors.jsonl].")
@click.option(
    "--concurrency", type=COUNT,
    help="Sequences in flight [default: what the routers take; twice their batch on a system that others use].",
)  # fmt: skip
@click.option("--retry-errors", is_flag=True, help="Ask lines again that an earlier run has put into the error file.")
@click.option(
    "--patience", type=SECONDS, default=600.0, show_default=True,
    help="Seconds without a token from a lost system until the job ends, to be run again.",
)  # fmt: skip
@click.option("--local", is_flag=True, help="Run every actor in this process, without Ray.")
@click.option("--summary", type=click.Choice(["table", "json"]), default="table", show_default=True)
@config_options
def command(
    model: str | None, source: Path, output: Path, errors: Path | None, concurrency: int | None, patience: float,
    local: bool, retry_errors: bool, summary: str, config_file: str | None, **flags: Any,
) -> None:  # fmt: skip
    """Answer the requests of a file in OpenAI's batch format.

    The system that runs under --serve-name is used with the config that it has; where none runs, one is started from
    --model and the other options, and stopped at the end. Run the same command again after a kill: it goes on where it
    was.

    Exit code 0: every line is answered. 3: all are done, and some are in the error file. 75: it had to stop before the
    end; run it again. 130 and 143: ended by SIGINT and SIGTERM; run it again. 1: it cannot be done as asked.
    """
    from moeray.cli.batch_progress import print_summary, summary_of
    from moeray.jobs.ledger import Ledger
    from moeray.jobs.start import check_distinct, errors_beside, take_up
    from moeray.jobs.survey import BatchInput

    config = config_of(model or "", config_file, flags)
    errors = errors or errors_beside(output)
    job = Job(config, source, output, errors, concurrency, patience, local)
    check_distinct((source, output, errors))
    with BatchInput(source, config.serve.max_body_bytes) as lines, Ledger(output, errors) as ledger:
        survey, tally = take_up(ledger, lines, retry_errors)
        code, outcome = _work(job, lines, ledger, survey, tally) if survey.to_ask else _end(tally)
    figures = summary_of(tally, outcome)
    if summary == "json":
        click.echo(json.dumps(figures | {"output": str(output), "errors_file": str(errors) if tally.errors else None}))
    else:
        print_summary(figures, {"answers": str(output)} | ({"errors": str(errors)} if tally.errors else {}))
    raise SystemExit(code)


def _end(tally: Tally) -> tuple[int, str]:
    return (SOME_FAILED, "done, with errors") if tally.errors else (0, "done")


def _work(job: Job, lines: BatchInput, ledger: Ledger, survey: Survey, tally: Tally) -> tuple[int, str]:
    """Ask the lines that are left: the exit code and the outcome in words."""
    from moeray.cli.session import connect_where_it_runs
    from moeray.errors import BatchPausedError
    from moeray.logs import setup_logging

    click.echo(
        f"batch: {tally.lines} lines: {survey.to_ask} to ask, {survey.settled} settled by earlier runs, "
        f"{survey.bad} no requests",
        err=True,
    )
    if job.local:
        setup_logging()
    else:
        connect_where_it_runs(job.config.serve.name)  # before our signal handlers, since it sets its own
    try:
        return asyncio.run(_run(job, lines, ledger, survey, tally))
    except BatchPausedError as error:
        click.echo(f"moeray: {error}", err=True)
        return PAUSED, "paused; run it again"


async def _run(job: Job, lines: BatchInput, ledger: Ledger, survey: Survey, tally: Tally) -> tuple[int, str]:
    from moeray.cli.batch_progress import shown
    from moeray.cli.signals import cancelled_by_signals
    from moeray.jobs.batch import BatchJob
    from moeray.jobs.start import default_concurrency, queue_of

    with cancelled_by_signals(lambda number: click.echo(f"batch: {number.name}, stopping", err=True)) as caught:
        try:
            config, shared, system = await asyncio.to_thread(_choose_system, job)
            async with system as backend:
                batch = BatchJob(
                    backend, config.chat_template, ledger, tally, patience_s=job.patience_s, queue=queue_of(config),
                    concurrency=job.concurrency or default_concurrency(config, shared),
                )  # fmt: skip
                async with shown(tally):
                    await batch.run(lines.read(survey.pending))
        except asyncio.CancelledError:
            if caught.number is None:
                raise
            return SIGNALLED + caught.number, f"ended by {caught.number.name}; run it again"
    return _end(tally)


def _choose_system(job: Job) -> tuple[Config, bool, AbstractAsyncContextManager[SystemBackend]]:
    """The system's config, whether others use it, and the system for the time of a block."""
    from moeray.cli.session import attached_system, local_system, ray_system

    if job.local:
        config = _own(job)
        return config, False, local_system(config, _say)
    from moeray.cluster.ray import running
    from moeray.jobs.systems import check_model, own_name, take_or_clear

    if (served := running(job.config.serve.name)) is not None:
        check_model(job.config, served)
        _say(f"using the system {served.serve.name!r} that serves {served.model}, with the config that it has")
        return served, True, attached_system(served, job.patience_s)
    config = _own(job, own_name(job.config.serve.name, job.output))
    if take_or_clear(config):
        _say(f"taking over the system {config.serve.name!r} that an earlier run has left")
    else:
        _say(f"starting a system of its own, {config.serve.name!r}")
    return config, False, ray_system(config, _say)


def _own(job: Job, name: str | None = None) -> Config:
    """The config of a system of the job's own."""
    if not job.config.model:
        raise click.UsageError("name a --model, or set `model` in the file given by --config: no system runs here")
    serve = replace(job.config.serve, name=name or job.config.serve.name, request_timeout_s=job.patience_s)
    return replace(job.config, serve=serve)


def _say(line: str) -> None:
    click.echo(f"batch: {line}", err=True)
