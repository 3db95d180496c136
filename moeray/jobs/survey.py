"""The input file of a batch: looked through once before anything starts, then read again line by line.

Of the whole file only the custom_ids are in memory while it is looked through, and afterwards 16 bytes for each line
that is still to be asked.
"""

from __future__ import annotations

import stat
from array import array
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from moeray.errors import BatchError
from moeray.jobs.lines import BatchLine, LineError, parse_line


@dataclass(frozen=True)
class Survey:
    """What the input holds: `lines` that are not blank, `bad` ones of these, those `settled` by an earlier run.

    `pending` has the number and the offset in bytes of each line to be asked, one behind the other. `strays` were
    settled and are not in the input.
    """

    lines: int
    bad: int
    settled: int
    strays: frozenset[str]
    pending: array[int] = field(repr=False)

    @property
    def to_ask(self) -> int:
        return len(self.pending) // 2


class BatchInput:
    """A context manager; the file stays open, so that one put in its place later changes nothing."""

    def __init__(self, path: Path, max_line_bytes: int) -> None:
        self._path = path
        self._max = max_line_bytes
        self._file: BinaryIO | None = None

    def __enter__(self) -> BatchInput:
        """Raises BatchError where the file cannot be read, and read again from any place."""
        try:
            if not stat.S_ISREG(self._path.stat().st_mode):
                raise BatchError(f"the input {self._path} is no regular file; write it to one first")
            self._file = self._path.open("rb")
        except OSError as error:
            raise BatchError(f"the input {self._path} cannot be read: {error.strerror}; check the path") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._file is not None
        self._file.close()

    def survey(self, settled: Set[str], on_error: Callable[[LineError], None]) -> Survey:
        """Look through all lines. `settled` are custom_ids that need not be asked; `on_error` gets each bad line."""
        seen: dict[str, None] = {}
        pending = array("Q")
        lines = bad = known = 0
        for number, offset, raw in self._lines():
            if raw is not None and not raw.strip():
                continue
            lines += 1
            try:
                custom_id = self._parse(raw, number).custom_id
                _check_first(custom_id, number, seen)
            except LineError as error:
                bad += 1
                on_error(error)
                continue
            seen[custom_id] = None
            if custom_id in settled:
                known += 1
            else:
                pending.extend((number, offset))
        return Survey(lines, bad, known, frozenset(settled - seen.keys()), pending)

    def read(self, pending: array[int]) -> Iterator[BatchLine]:
        """The pending lines of a survey. Raises BatchError where the file has been changed since."""
        assert self._file is not None
        for place in range(0, len(pending), 2):
            number, offset = pending[place], pending[place + 1]
            self._file.seek(offset)
            try:
                yield self._parse(self._file.readline(self._max + 1), number)
            except LineError as error:
                raise BatchError(f"the input {self._path} was changed while it was read; run the job again") from error

    def _parse(self, raw: bytes | None, number: int) -> BatchLine:
        if raw is None:
            raise LineError(
                number, f"the line is over the limit of {self._max} bytes (serve.max_body_bytes)", code="line_too_long"
            )
        return parse_line(raw, number)

    def _lines(self) -> Iterator[tuple[int, int, bytes | None]]:
        """(number, offset, line) of each line; None for one that is too long, which is passed over in pieces."""
        assert self._file is not None
        number = offset = 0
        while raw := self._file.readline(self._max + 1):
            number += 1
            length = len(raw)
            too_long = length > self._max and not raw.endswith(b"\n")
            while too_long and not raw.endswith(b"\n") and (raw := self._file.readline(self._max)):
                length += len(raw)
            yield number, offset, None if too_long else raw
            offset += length


def _check_first(custom_id: str, number: int, seen: dict[str, None]) -> None:
    if custom_id in seen:
        raise LineError(
            number,
            f"another line before it has the custom_id {custom_id[:80]!r}; give each line its own",
            code="duplicate_custom_id",
            param="custom_id",
            custom_id=custom_id,
        )
