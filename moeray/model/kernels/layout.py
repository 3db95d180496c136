"""How an expert's stored weights lie in memory, as all kernels read it (native/layout.h, native/moe.c, grouped.py)."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int64, c_void_p
from enum import IntEnum


class Format(IntEnum):
    """How a matrix stores its weights."""

    F32 = 0
    F16 = 1
    BF16 = 2
    INT8 = 3
    FP8 = 4
    MXFP4 = 5


class Matrix(Structure):
    _fields_ = [(name, c_int64) for name in (
        "format", "inputs", "outputs", "row_bytes", "scale_bytes", "out_shift", "in_shift",
    )]  # fmt: skip


class Outputs(Structure):
    _fields_ = [("data", c_void_p), ("scale", c_void_p), ("bias", c_void_p), ("first", c_int64), ("step", c_int64)]


class Activation(Structure):
    _fields_ = [("alpha", c_float), ("cubic", c_float), ("limit", c_float), ("shift", c_float)]


class Layer(Structure):
    _fields_ = [("up", Matrix), ("down", Matrix), ("activation", Activation), ("gated", c_int64)]


class Expert(Structure):
    _fields_ = [("gate", Outputs), ("up", Outputs), ("down", Outputs)]
