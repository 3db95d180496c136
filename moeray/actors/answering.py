"""Forwards that are as nearly all of them are, answered in one call of the part in C (`native/answer.c`); the rest is
left to `rows.py`."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from ctypes import Structure, c_int64, c_void_p
from typing import Any, NamedTuple

import numpy as np

from moeray.compiled import compiled
from moeray.model.experts import ExpertTable
from moeray.model.kernels import Scratch, available
from moeray.model.kernels.native import CALL_FORMATS, best_instructions, library
from moeray.wire.channel import Channel
from moeray.wire.row_message import Place
from moeray.wire.rows import Result
from moeray.wire.tensors import DTYPES

native = compiled("moeray.actors._native")

_NO_FORMAT = -1


class _Answering(Structure):
    """`scratch`, `forward`: of the experts' kernels. `formats`: their format for each of the wire's dtypes, or -1.
    `closed`: leave everything to Python. `active`: how many forwards are being answered."""

    _fields_ = (
        ("scratch", c_void_p), ("forward", c_void_p), ("formats", c_int64 * len(DTYPES)), ("instructions", c_int64),
        ("threads", c_int64), ("closed", c_int64), ("active", c_int64),
    )  # fmt: skip
    threads: int
    closed: int
    active: int


class Answered(NamedTuple):
    """A forward: rows of each expert, seconds it waited and computed, and when it ended by time.perf_counter."""

    layer: int
    experts: list[int]
    counts: list[int]
    waited_s: float
    computed_s: float
    at: float


class Answering:
    """Thread-safe, but for `answer`, which each channel's own thread calls. `lock` is held by whoever computes.

    What was answered is counted later, many at a time: `take_answered`. `on_sent` is called when outputs have gone out
    that did not at once.
    """

    def __init__(self, lock: threading.Lock, on_sent: Callable[[], None]) -> None:
        self._lock = lock
        self._on_sent = on_sent
        self._answered: deque[tuple[int, bytes, bytes, float, float, float]] = deque()
        self._memory = _Memory()
        self._shared = _shared() if native is not None and available() else None

    @property
    def active(self) -> int:
        """How many forwards are being answered."""
        return self._shared.active if self._shared is not None else 0

    def answer(self, channel: Channel, tables: Mapping[int, ExpertTable], threads: int) -> bool:
        """Answer the channel's forwards for as long as they are ordinary, or many. False where something else is to be
        read. Raises what `send_rows` does."""
        if self._shared is None:
            return False
        self._shared.threads = threads
        left = channel.on_lane(lambda lane: self._answer(lane, tables))
        if left is None:
            return False
        if isinstance(left, tuple):
            try:
                if left:
                    channel.send_rows(_result(*left))
                else:
                    channel.flush()
            finally:
                assert native is not None
                native.sent(ctypes.addressof(self._shared))
                self._on_sent()
        return True

    def _answer(self, lane: int, tables: Mapping[int, ExpertTable]) -> Any:
        """See `answer` in C, which asks for memory until it has enough."""
        assert native is not None
        assert self._shared is not None
        memory = self._memory.of(0)
        while True:
            left = native.answer(
                ctypes.addressof(self._shared), lane, tables, self._lock, self._answered, memory.address, memory.nbytes
            )
            if not isinstance(left, int) or not left:
                return left
            try:
                memory = self._memory.of(left)
            except MemoryError:
                return None  # Python answers that there is none

    def close(self) -> None:
        """Begin no forward any more; the one that is being computed holds the lock."""
        if self._shared is not None:
            self._shared.closed = 1

    def take_answered(self) -> list[Answered]:
        """Those that were not taken yet."""
        taken = []
        with suppress(IndexError):  # another thread took the last
            while self._answered:
                layer, experts, counts, waited_s, computed_s, at = self._answered.popleft()
                taken.append(Answered(layer, _ints(experts), _ints(counts), waited_s, computed_s, at))
        return taken


class _Memory(threading.local):
    """A thread's memory for a forward."""

    def __init__(self) -> None:
        self._kept = Scratch(1 << 18)

    def of(self, nbytes: int) -> Scratch:
        """At least so much, kept for the next."""
        if self._kept.nbytes < nbytes:
            self._kept = Scratch(nbytes)
        return self._kept


def _shared() -> _Answering:
    kernels = library()
    assert kernels is not None
    formats = [int(CALL_FORMATS[dtype]) if dtype in CALL_FORMATS else _NO_FORMAT for dtype in DTYPES]
    address: Callable[[Any], int | None] = lambda function: ctypes.cast(function, c_void_p).value  # noqa: E731
    return _Answering(
        address(kernels.moeray_scratch), address(kernels.moeray_forward), (c_int64 * len(DTYPES))(*formats),
        best_instructions(),
    )  # fmt: skip


def _ints(values: bytes) -> list[int]:
    numbers: list[int] = np.frombuffer(values, np.int64).tolist()
    return numbers


def _result(
    frame_id: int, layer: int, epoch: int, computed_s: float, waited_s: float, dtype: int, position: int, address: int,
    rows: int, width: int,
) -> Result:  # fmt: skip
    nbytes = rows * width * DTYPES[dtype].itemsize
    memory = memoryview((ctypes.c_uint8 * nbytes).from_address(address)).cast("B")
    place = Place(memory, address, position)
    return Result(frame_id, layer, epoch, computed_s, waited_s, DTYPES[dtype], place, rows, width)
