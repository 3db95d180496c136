"""Products over weights in their stored form, in C, for CPUs: linear layers and experts.

`load()` finds the shared object that was compiled when moeray was installed. Where there is none, callers use torch.
"""

from __future__ import annotations

from moeray.model.kernels.combine import combine
from moeray.model.kernels.linear import NativeLinear, NativeLinears, linear
from moeray.model.kernels.native import Block, Scratch, available

__all__ = ["Block", "NativeLinear", "NativeLinears", "Scratch", "available", "combine", "linear"]
