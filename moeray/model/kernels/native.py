"""The shared object of kernels/native: found, loaded and called."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_int64, c_void_p
from enum import IntEnum
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeray.model.kernels.layout import Format, Layer

log = logging.getLogger(__name__)

ALIGNMENT = 64
_REBUILD = "install moeray again where there is a C compiler (pip install --force-reinstall --no-deps moeray)"


class Instructions(IntEnum):
    """The sets that the kernels are compiled for. Those with a fused multiply-add give the same bits."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2


_CALL_FORMATS = {torch.float32: Format.F32, torch.bfloat16: Format.BF16}


class Call(Structure):
    _fields_ = [
        ("x", c_void_p), ("y", c_void_p), ("scratch", c_void_p),
        ("format", c_int64), ("threads", c_int64), ("instructions", c_int64),
    ]  # fmt: skip


def available() -> bool:
    """Whether the kernels were compiled and can be loaded."""
    return library() is not None


@cache
def library() -> Any | None:
    """The shared object, or None (with one warning). Importing torch has loaded the OpenMP runtime that it uses."""
    found = [path for suffix in EXTENSION_SUFFIXES if (path := Path(__file__).with_name(f"_native{suffix}")).is_file()]
    if not found:
        log.warning("the CPU kernels were not compiled, so experts run on torch, slower; %s", _REBUILD)
        return None
    try:
        return _declared(ctypes.CDLL(str(found[0])))
    except (OSError, AttributeError) as error:
        log.warning("the CPU kernels do not load (%s), so experts run on torch, slower; %s", error, _REBUILD)
        return None


def _declared(lib: Any) -> Any:
    lib.moeray_instructions.restype = c_int64
    lib.moeray_scratch.argtypes = [POINTER(Layer), c_int64, c_int64, c_int64]
    lib.moeray_scratch.restype = c_int64
    lib.moeray_forward.argtypes = [POINTER(Layer), c_void_p, c_void_p, c_int64, POINTER(Call)]
    lib.moeray_forward.restype = None
    lib.moeray_read.argtypes = [c_void_p, c_int64, c_int64, c_int64]
    lib.moeray_read.restype = None
    lib.moeray_multiply.argtypes = [c_int64, c_int64, c_int64]
    lib.moeray_multiply.restype = c_int64
    lib.moeray_combine.argtypes = [c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64]
    lib.moeray_combine.restype = None
    lib.moeray_attention_scratch.argtypes = [c_void_p]
    lib.moeray_attention_scratch.restype = c_int64
    lib.moeray_attention.argtypes = [c_void_p]
    lib.moeray_attention.restype = None
    return lib


@cache
def best_instructions() -> Instructions:
    """The most capable set of this CPU."""
    lib = library()
    assert lib is not None
    return Instructions(lib.moeray_instructions())


def forward(
    layer: Layer, experts: Sequence[int], counts: Sequence[int], x_RI: Tensor, outputs: int, chosen: Instructions | None
) -> Tensor:
    """x [R, I] float -> [R, outputs] of its dtype: of each expert (by its `Expert` structure's address) the next rows.

    Runs on torch's number of threads; the interpreter's lock is released meanwhile.
    """
    lib, threads, dtype = library(), torch.get_num_threads(), x_RI.dtype
    assert lib is not None
    if dtype not in _CALL_FORMATS:
        x_RI = x_RI.float()
    x_RI = x_RI.contiguous()
    y_RO = x_RI.new_empty(len(x_RI), outputs)
    nbytes = lib.moeray_scratch(ctypes.byref(layer), len(x_RI), len(experts), threads)
    memory, address = scratch(nbytes)
    call = Call(
        x_RI.data_ptr(), y_RO.data_ptr(), address, _CALL_FORMATS[x_RI.dtype], threads,
        best_instructions() if chosen is None else chosen,
    )  # fmt: skip
    count = len(experts)
    numbers = c_int64 * count
    lib.moeray_forward(ctypes.byref(layer), numbers(*experts), numbers(*counts), count, ctypes.byref(call))
    del memory
    return y_RO.to(dtype)


def scratch(nbytes: int) -> tuple[Tensor, int]:
    """Memory that a call may write, and its aligned address."""
    memory = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8)
    return memory, -(-memory.data_ptr() // ALIGNMENT) * ALIGNMENT


def read_all(memory: Tensor) -> None:
    """Read a tensor as fast as can be, on torch's number of threads."""
    lib = library()
    assert lib is not None
    lib.moeray_read(memory.data_ptr(), memory.nbytes, torch.get_num_threads(), best_instructions())


def multiply(times: int) -> int:
    """Multiply and add fp32 numbers in registers, on torch's number of threads; the operations done."""
    lib = library()
    assert lib is not None
    return int(lib.moeray_multiply(times, torch.get_num_threads(), best_instructions()))
