"""Request traces: when requests came and how many tokens went in and out. Azure's CSV and Mooncake's JSON lines."""

from __future__ import annotations

import csv
import io
import json
import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from moeray.errors import TraceError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_T = TypeVar("_T")

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOONCAKE = ("timestamp", "input_length", "output_length")
_MOST_TOKENS = 10_000_000
_LONGEST_PAUSE_S = 30 * 86400.0
_EARLIEST_S, _LATEST_S = -62_135_596_800, 253_402_300_799
"""The years 1 to 9999, in unix time."""
_MOST_REQUESTS = 10_000_000
"""A trace that is scaled up becomes no larger: its table alone would take gigabytes."""

UNDATED_S = 1_704_067_200.0
"""What the beginning of a trace without dates is taken for: Monday, 2024-01-01 00:00 UTC, in unix seconds."""


class _Row(NamedTuple):
    at_s: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival.

    `arrival_s`: seconds since the trace began; `prompt` and `output`: tokens, at least 1 each (an engine computes and
    answers with no less, so a 0 in a file counts as 1). `duration_s`: how long the trace observed. `began_at`: when it
    began, in unix seconds.
    """

    name: str
    arrival_s: Floats
    prompt: Ints
    output: Ints
    duration_s: float
    began_at: float = UNDATED_S

    def __len__(self) -> int:
        return len(self.arrival_s)

    def window(self, start_s: float, length_s: float | None) -> Trace:
        """The requests of [start_s, start_s + length_s), counted from its start. Raises TraceError for none."""
        end = math.inf if length_s is None else start_s + length_s
        keep = (self.arrival_s >= start_s) & (self.arrival_s < end)
        if not keep.any():
            raise TraceError(
                f"{self.name}: no request between second {start_s:g} and {end:g}; the trace lasts {self.duration_s:g} s"
            )
        return replace(
            self,
            arrival_s=self.arrival_s[keep] - start_s,
            prompt=self.prompt[keep],
            output=self.output[keep],
            duration_s=min(end, self.duration_s) - start_s,
            began_at=self.began_at + start_s,
        )

    def faster(self, speed: float) -> Trace:
        """The same requests in 1/speed of the time, from the same moment on."""
        return replace(self, arrival_s=self.arrival_s / speed, duration_s=self.duration_s / speed)

    def shortened(self, divisor: float) -> Trace:
        """The same requests with 1/divisor of the tokens, at least 1 each."""
        prompt, output = (
            np.maximum(1, np.rint(tokens / divisor)).astype(np.int64) for tokens in (self.prompt, self.output)
        )
        return replace(self, prompt=prompt, output=output)

    def clipped(self, context: int) -> Trace:
        """The same requests, with no more tokens in and out together than a context of that many has: answers keep half
        of it at the most, and prompts what is left."""
        output = np.minimum(self.output, max(1, context // 2))
        return replace(self, prompt=np.clip(self.prompt, 1, np.maximum(1, context - output)), output=output)

    def scaled(self, factor: float) -> Trace:
        """`factor` times as many requests in the same time, evenly thinned or repeated.

        Copies of a request spread over the gap to the next one. Raises TraceError where none is left, or too many are.
        """
        if len(self) * factor > max(len(self), _MOST_REQUESTS):
            raise TraceError(
                f"{self.name}: scaled by {factor:g} it has {len(self) * factor:.3g} requests, and may have "
                f"{_MOST_REQUESTS:,}; lower the factor"
            )
        edges = np.floor(np.arange(len(self) + 1) * factor)
        copies = np.diff(edges).astype(np.int64)
        if not copies.sum():
            raise TraceError(f"{self.name}: scaled by {factor:g} no request is left; raise the factor")
        index = np.repeat(np.arange(len(self)), copies)
        nth = np.arange(len(index)) - np.repeat(np.cumsum(copies) - copies, copies)
        gap = np.diff(self.arrival_s, append=self.duration_s)
        arrival = self.arrival_s[index] + gap[index] * nth / copies[index]
        return replace(self, arrival_s=arrival, prompt=self.prompt[index], output=self.output[index])


def read_trace(path: str | Path) -> Trace:
    """Read a trace; which format it has is seen from its first line. Raises TraceError with file and line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TraceError(f"trace {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"trace {path}: is not UTF-8 text; give an Azure CSV or a Mooncake JSONL file") from error
    first = text.lstrip().partition("\n")[0]
    dated = not first.startswith("{")  # Mooncake's milliseconds count from the trace's own beginning
    if not dated:
        rows = _read_mooncake(text, path)
    elif _names_azure(first):
        rows = _read_azure(text, path)
    else:
        raise TraceError(
            f"trace {path}, line 1: neither an Azure CSV (header {','.join(_AZURE)}) nor Mooncake JSON lines "
            f"(keys {', '.join(_MOONCAKE)})"
        )
    if not rows:
        raise TraceError(f"trace {path}: has no request")
    trace = trace_of(path.name, rows)
    if dated:
        trace = replace(trace, began_at=min(row.at_s for row in rows))
    pauses = np.diff(trace.arrival_s, prepend=0.0)
    if pauses.max() > _LONGEST_PAUSE_S:
        at = min(row[0] for row in rows) + trace.arrival_s[pauses.argmax()]
        raise TraceError(
            f"trace {path}: nothing arrives for {pauses.max() / 86400:.0f} days before the request at "
            f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S}; is a timestamp wrong? A pause may take 30 days"
        )
    return trace


def trace_of(name: str, rows: Sequence[tuple[float, int, int]]) -> Trace:
    """A trace from (seconds, prompt tokens, output tokens), in any order; the first request is at second 0."""
    table = np.array(rows, dtype=np.float64)
    table = table[np.argsort(table[:, 0], kind="stable")]
    arrival = table[:, 0] - table[0, 0]
    tokens = np.maximum(table[:, 1:], 1).astype(np.int64)
    return Trace(name, arrival, tokens[:, 0], tokens[:, 1], float(arrival[-1]))


def _names_azure(header: str) -> bool:
    try:
        return set(_AZURE) <= {name.strip() for name in next(csv.reader([header]), [])}
    except csv.Error:  # a field that is longer than any name
        return False


def _read_azure(text: str, path: Path) -> list[_Row]:
    reader = csv.reader(io.StringIO(text))
    header = [name.strip() for name in next(cells for cells in reader if any(cells))]
    columns = [header.index(name) for name in _AZURE]

    def row(cells: list[str]) -> _Row:
        if len(cells) != len(header):
            raise ValueError(f"has {len(cells)} columns, the header has {len(header)}")
        at, prompt, output = (cells[column].strip() for column in columns)
        when = datetime.fromisoformat(at)
        if when.tzinfo is None:
            when = when.replace(tzinfo=UTC)
        return _Row(_seconds(when.timestamp(), 1), _count(prompt), _count(output))

    try:
        return [_parsed(row, cells, path, reader.line_num) for cells in reader if cells]
    except csv.Error as error:
        raise TraceError(f"trace {path}, line {reader.line_num}: {error}") from error


def _read_mooncake(text: str, path: Path) -> list[_Row]:
    def row(line: str) -> _Row:
        tree = json.loads(line)
        if not isinstance(tree, dict):
            raise ValueError("is not a JSON object")
        missing = [key for key in _MOONCAKE if key not in tree]
        if missing:
            raise ValueError(f"lacks {', '.join(missing)}")
        at = tree["timestamp"]
        if isinstance(at, bool) or not isinstance(at, int | float):
            raise ValueError(f"timestamp must be a number of milliseconds, got {reprlib.repr(at)}")
        return _Row(_seconds(at, 1000), _count(tree["input_length"]), _count(tree["output_length"]))

    lines = enumerate(text.split("\n"), 1)
    return [_parsed(row, line, path, number) for number, line in lines if line.strip()]


def _parsed(parse: Callable[[_T], _Row], raw: _T, path: Path, line: int) -> _Row:
    try:
        return parse(raw)
    except (ValueError, OverflowError, RecursionError) as error:
        raise TraceError(f"trace {path}, line {line}: {' '.join(str(error).split())[:200]}") from error


def _seconds(at: float, per_s: int) -> float:
    if not _EARLIEST_S * per_s <= at <= _LATEST_S * per_s:
        raise ValueError(f"timestamp must be of the years 1 to 9999, got {reprlib.repr(at)}")
    return at / per_s


def _count(value: object) -> int:
    try:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError
        count = int(value)
    except ValueError:
        raise ValueError(f"token counts must be whole numbers, got {value!r}") from None
    if not 0 <= count <= _MOST_TOKENS:
        raise ValueError(f"token counts must be between 0 and {_MOST_TOKENS:,}, got {count}")
    return count
