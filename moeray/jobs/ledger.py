"""What a batch has come to: the output file and the error file, which are all that a job remembers.

Lines are appended whole, one by one. A job that is killed leaves at most one torn line at the end, which the next run
cuts off before it goes on behind what is there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from moeray.errors import BatchError, BatchPausedError
from moeray.jobs.lines import START

SYNC_S = 1.0
"""What was written is on the disk after so long, if more follows; a killed process loses nothing in any case."""


class Ledger:
    """A context manager that holds both files against other jobs. A thread of its own writes them.

    `answered` and `failed` are the custom_ids of the output and of the error file as an earlier run left them.
    """

    def __init__(self, output: Path, errors: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._output = output
        self._errors = errors
        self._clock = clock
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="batch-writer")
        self._files: dict[Path, BinaryIO] = {}
        self._synced = clock()
        self._held = ExitStack()

    def __enter__(self) -> Ledger:
        """Raises BatchError where another job has the files, or they are not a batch's."""
        with ExitStack() as held:
            for path in (self._output, self._errors):
                if path.exists() and not path.is_file():
                    raise BatchError(f"{path} is no regular file; choose another --output")
                held.enter_context(_lock(path))
            self.answered, end = _answers(self._output)
            self.failed = {str(entry["custom_id"]) for _, entry in _refusals(self._errors)}
            if self._output.exists():
                os.truncate(self._output, end)
            self._held = held.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Write what waits, bring it to the disk, and leave the files to others. An empty error file is removed."""
        with self._held:
            self._writer.shutdown(wait=True)
            for path, file in self._files.items():
                with _writing(path), file:
                    os.fsync(file.fileno())
            if self._errors in self._files and self._errors.stat().st_size == 0:
                self._errors.unlink()

    @contextmanager
    def new_errors(self) -> Iterator[Callable[[bytes], object]]:
        """Make the error file anew; yields what adds a line to it. Until the block ends the old file is untouched.

        Of the old lines those are kept whose custom_id is in `failed` then. Afterwards both files may be written.
        """
        draft = self._errors.with_name(f".{self._errors.name}.new")
        with _writing(self._errors), ExitStack() as failed:
            failed.callback(draft.unlink, missing_ok=True)
            with draft.open("wb") as file:
                yield file.write
                for raw, entry in _refusals(self._errors):
                    if entry["custom_id"] in self.failed:
                        file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._errors)
        for path in (self._output, self._errors):
            with _writing(path):
                self._files[path] = path.open("ab", buffering=0)

    def write_answer(self, line: bytes) -> Future[None]:
        """Append to the output. The future raises BatchPausedError where that fails."""
        return self._writer.submit(self._append, self._output, line)

    def write_error(self, line: bytes) -> Future[None]:
        """Append to the error file, as `write_answer` does."""
        return self._writer.submit(self._append, self._errors, line)

    def _append(self, path: Path, line: bytes) -> None:
        with _writing(path):
            _write_whole(self._files[path], line)
            if self._clock() - self._synced >= SYNC_S:
                for file in self._files.values():
                    os.fsync(file.fileno())
                self._synced = self._clock()


def _write_whole(file: BinaryIO, line: bytes) -> None:
    rest = memoryview(line)
    while rest:
        rest = rest[file.write(rest) :]


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BatchPausedError(
            f"{path} cannot be written: {error.strerror}; mend that and run the job again"
        ) from error


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise BatchError(f"another job writes {path}; wait for its end, or choose another file") from None
    except OSError as error:
        raise BatchError(f"{path} cannot be written: {error.strerror}; check the folder") from error
    try:
        yield
    finally:
        lock.release()


def _answers(path: Path) -> tuple[set[str], int]:
    """The custom_ids of the output, and the offset in bytes behind its last whole line."""
    answered, end = set(), 0
    for number, raw, entry in _entries(path):
        if not isinstance(entry["custom_id"], str) or entry["response"] is None:
            raise BatchError(f"{path}, line {number}: this is no answer of a batch; choose another --output")
        answered.add(entry["custom_id"])
        end += len(raw)
    return answered, end


def _refusals(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The error file's lines that were requests; the others are found again in the input."""
    for _, raw, entry in _entries(path):
        if entry["response"] is not None:
            yield raw, entry


def _entries(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """(number, line, content) of every whole line. Raises BatchError at one that no batch has written."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                if raw.startswith(START[: len(raw)]) or not raw.strip(b"\0"):
                    return
                raise BatchError(f"{path}, line {number}: no batch has written this; choose another file")
            yield number, raw, _entry(path, number, raw)


def _entry(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(raw)
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or not entry.keys() >= {"id", "custom_id", "response", "error"}:
        raise BatchError(f"{path}, line {number}: no batch has written this; choose another file")
    return entry
