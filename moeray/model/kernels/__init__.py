"""Products over weights in their stored form, in C, for CPUs: linear layers and experts.

`load()` finds the shared object that was compiled when moeray was installed. Where there is none, callers use torch.
"""

from __future__ import annotations

from moeray.model.kernels.combine import combine
from moeray.model.kernels.linear import NativeLinear, NativeLinears, linear
from moeray.model.kernels.native import Block, Scratch, available, part
from moeray.model.kernels.trunk import RmsNorm, can_rotate, keep, rotate

__all__ = [
    "Block", "NativeLinear", "NativeLinears", "RmsNorm", "Scratch", "available", "can_rotate", "combine", "keep",
    "linear", "part", "rotate",
]  # fmt: skip
