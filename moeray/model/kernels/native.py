"""The shared object of kernels/native: found, loaded and called."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from enum import IntEnum
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeray.buffers import KEPT_BYTES, new_buffer
from moeray.compiled import compiled
from moeray.model.kernels.layout import Format, Layer
from moeray.model.recording import perform

_ELEMENTS_PER_THREAD = 1 << 18
"""Fewer are done before another thread has woken up."""

_MODULE = "moeray.model.kernels._native"


class Instructions(IntEnum):
    """The sets that the kernels are compiled for. Those with a fused multiply-add give the same bits, but that the last
    two multiply bf16 inputs with all weights but fp32 and fp16 in their own ways: in pairs, and by matrix tiles; and
    that the two before that multiply them with int8 in whole numbers."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_VNNI = 3
    AVX512_BF16 = 4
    AMX_BF16 = 5


CALL_FORMATS = {torch.float32: Format.F32, torch.bfloat16: Format.BF16}


class Block(NamedTuple):
    """Rows of `width` numbers that lie in memory one after the other."""

    address: int
    width: int
    dtype: torch.dtype


def available() -> bool:
    """Whether the kernels were compiled and can be loaded."""
    return library() is not None


def functions() -> Any:
    """What the kernels' module has for Python. Ask `available` first."""
    module = compiled(_MODULE)
    assert module is not None, "the CPU kernels are not there; ask kernels.available() first"
    return module


@cache
def library() -> Any | None:
    """The shared object, or None (with one warning). Importing torch has loaded the OpenMP runtime that it uses."""
    module = compiled(_MODULE)
    return None if module is None else _declared(ctypes.CDLL(module.__file__))


def _declared(lib: Any) -> Any:
    lib.moeray_instructions.restype = c_int64
    lib.moeray_read.argtypes = [c_void_p, c_int64, c_int64, c_int64]
    lib.moeray_read.restype = None
    lib.moeray_multiply.argtypes = [c_int64, c_int64, c_int64]
    lib.moeray_multiply.restype = c_int64
    lib.moeray_part.argtypes = [c_int64, c_int64]
    lib.moeray_part.restype = c_int64
    return lib


@cache
def best_instructions() -> Instructions:
    """The most capable set of this CPU."""
    lib = library()
    assert lib is not None
    return Instructions(lib.moeray_instructions())


def forward(
    layer: Layer, experts: list[int], counts: list[int], x_RI: Tensor, outputs: int, chosen: Instructions | None,
    dtype: torch.dtype | None = None, threads: int | None = None,
) -> Tensor:  # fmt: skip
    """x [R, I] float -> [R, outputs] of `dtype` (x's if None): of each expert (by its `Expert` structure's address) the
    next rows.

    Runs on torch's number of threads unless told otherwise; the interpreter's lock is released meanwhile.
    """
    dtype = x_RI.dtype if dtype is None else dtype
    if x_RI.dtype not in CALL_FORMATS:
        x_RI = x_RI.float()
    x_RI = x_RI.contiguous()
    y_RO = x_RI.new_empty(len(x_RI), outputs, dtype=dtype if dtype in CALL_FORMATS else torch.float32)
    run(
        ctypes.addressof(layer), experts, counts, x_RI.data_ptr(), len(x_RI), y_RO.data_ptr(), CALL_FORMATS[x_RI.dtype],
        CALL_FORMATS[y_RO.dtype], torch.get_num_threads() if threads is None else threads,
        best_instructions() if chosen is None else chosen,
    )  # fmt: skip
    return y_RO.to(dtype)


def run(
    layer: int, experts: list[int], counts: list[int], x: int, rows: bytes | int, y: int, x_format: Format,
    y_format: Format, threads: int, instructions: Instructions,
) -> None:  # fmt: skip
    """The same from addresses: x is read at `rows` (int64 as bytes), or so many rows of it one after the other; y takes
    as many. Raises ValueError where the counts do not sum to the rows."""
    perform(
        with_scratch, functions().forward, layer, experts, counts, x, rows, y, x_format, y_format, threads, instructions
    )


def with_scratch(function: Callable[..., int], *args: Any) -> None:
    """Call it with so much memory of this thread behind its arguments as it says that it takes."""
    memory = scratch(0)
    while needed := function(*args, memory.address, memory.nbytes):
        memory = scratch(needed)


def part(own: int, other: int) -> bool:
    """Keep the calling thread on one core and the thread that computes with it, in a team of two, on another; whether
    both can be. Ask `available` first."""
    lib = library()
    assert lib is not None
    return bool(lib.moeray_part(own, other) == 0)


def threads_for(rows: int, elements: int) -> int:
    """How many threads are worth waking for a pass over memory, which share the rows."""
    return min(torch.get_num_threads(), rows, 1 + elements // _ELEMENTS_PER_THREAD)


class Scratch:
    """Memory that a call may write, aligned to 64 bytes."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        memory = new_buffer(nbytes)
        self.memory = memory[:nbytes].data
        self.address: int = memory.ctypes.data


class _Kept(threading.local):
    """A thread's scratch memory: allocating it anew for every call costs more than a small call does."""

    def __init__(self) -> None:
        self.scratch = Scratch(1 << 18)


_kept = _Kept()


def scratch(nbytes: int) -> Scratch:
    """At least so much, until the thread's next call."""
    memory = _kept.scratch
    if memory.nbytes < nbytes:
        memory = Scratch(nbytes)
        if nbytes <= KEPT_BYTES:
            _kept.scratch = memory
    return memory


def read_all(memory: Tensor) -> None:
    """Read a tensor as fast as can be, on torch's number of threads."""
    lib = library()
    assert lib is not None
    lib.moeray_read(memory.data_ptr(), memory.nbytes, torch.get_num_threads(), best_instructions())


def multiply(times: int) -> int:
    """Multiply and add numbers in registers, pairs of bf16 where the CPU can and else fp32, on torch's number of
    threads; the operations done."""
    lib = library()
    assert lib is not None
    return int(lib.moeray_multiply(times, torch.get_num_threads(), best_instructions()))
