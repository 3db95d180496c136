"""What a job has to do: the input looked through, beside what an earlier run has written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moeray.config import Config
from moeray.errors import BatchError
from moeray.jobs.ledger import Ledger
from moeray.jobs.lines import LineError, error_line
from moeray.jobs.survey import BatchInput, Survey
from moeray.jobs.tally import Tally

SHARED_BATCHES = 2
"""In a system that others use too, so many of the routers' batches are in flight: one runs and the rest waits, so that
the queues are the others'."""


def errors_beside(output: Path) -> Path:
    """Where the error file lies unless it is named: `out.jsonl` has `out.errors.jsonl`. Raises BatchError where the
    output names no file."""
    if not output.name:
        raise BatchError(f"the output {str(output)!r} has no file name; give one, such as --output answers.jsonl")
    return output.with_name(f"{output.stem}.errors{output.suffix}")


def check_distinct(paths: Sequence[Path]) -> None:
    """Raises BatchError where two of the job's files are one."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise BatchError("the input, the output and the error file must be three files; give them different names")


def take_up(ledger: Ledger, lines: BatchInput, retry_errors: bool) -> tuple[Survey, Tally]:
    """Look through the input, write its bad lines to the error file, and see what is left.

    Lines that failed in an earlier run count as settled, unless `retry_errors`; those that are gone from the input
    leave the error file. Raises BatchError where the output has answers to lines that the input does not have.
    """
    tally = Tally()
    if retry_errors:
        ledger.failed.clear()
    with ledger.new_errors() as add:

        def on_error(error: LineError) -> None:
            tally.fail(error.code)
            add(error_line(error))

        survey = lines.survey(ledger.answered | ledger.failed, on_error)
        if strays := survey.strays & ledger.answered:
            raise BatchError(
                f"the output has answers to {len(strays)} lines that the input does not have, such as custom_id "
                f"{min(strays)[:80]!r}; choose another --output, or put the lines back into the input"
            )
        ledger.failed -= survey.strays | ledger.answered
    tally.lines, tally.earlier, tally.failed_earlier = survey.lines, survey.settled, len(ledger.failed)
    return survey, tally


def queue_of(config: Config) -> int:
    """The most sequences that the routers queue, when there are as many routers as there may be."""
    return config.router.actors_span[1] * config.engine.max_waiting


def default_concurrency(config: Config, shared: bool) -> int:
    """As many sequences as the routers take; of a `shared` system only enough to keep their batches full."""
    running = config.router.actors_span[1] * config.engine.max_running
    return SHARED_BATCHES * running if shared else config.most_sequences
