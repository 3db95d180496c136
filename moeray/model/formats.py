"""Stored forms of a weight and their decoding: plain tensors, FP8 in blocks, MXFP4.

A stored weight stays as it lies in the checkpoint (a view of the memory map) and is decoded at use.
Shapes: `...` leading dimensions (experts), R rows, C columns, G groups of 32 MXFP4 values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from moeray.errors import CheckpointError

MXFP4_GROUP = 32
_MXFP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E8M0_BIAS = 127
_ROWS_AT_A_TIME = 1024  # bounds the fp32 scratch of a decode, whatever the matrix
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


class StoredWeight(Protocol):
    """A weight in the form in which the checkpoint holds it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The decoded tensor's shape."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored: the weight, and its scales if it has any."""

    @property
    def nbytes(self) -> int:
        """Bytes as stored, scales included."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight; the stored tensor itself where it already has `dtype`."""

    def to(self, device: torch.device) -> StoredWeight:
        """The same stored form on `device`."""


@dataclass(frozen=True, slots=True)
class Plain(StoredWeight):
    """A tensor as it is."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.tensor,)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.tensor.to(dtype)

    def to(self, device: torch.device) -> Plain:
        return Plain(self.tensor.to(device))


@dataclass(frozen=True, slots=True)
class Fp8Block(StoredWeight):
    """`weight` [..., R, C] float8 with one scale per block: `scale_inv` [..., ceil(R / block), ceil(C / block)]."""

    weight: Tensor
    scale_inv: Tensor
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight, self.scale_inv)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return dequantize_fp8_block(self.weight, self.scale_inv, self.block, dtype)

    def to(self, device: torch.device) -> Fp8Block:
        return Fp8Block(self.weight.to(device), self.scale_inv.to(device), self.block)


@dataclass(frozen=True, slots=True)
class Mxfp4(StoredWeight):
    """`blocks` uint8 [..., C, G, 16] and `scales` uint8 [..., C, G]; decoded it is [..., 32 G, C]."""

    blocks: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return mxfp4_shape(tuple(self.blocks.shape))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.blocks, self.scales)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return dequantize_mxfp4(self.blocks, self.scales, dtype)

    def to(self, device: torch.device) -> Mxfp4:
        return Mxfp4(self.blocks.to(device), self.scales.to(device))


@dataclass(frozen=True, slots=True)
class Int8(StoredWeight):
    """`weight` int8 [O, I] with an fp32 scale for each output, `scale` [O]; decoded it is [O, I], or `transposed`."""

    weight: Tensor
    scale: Tensor
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.weight.shape)
        return shape[::-1] if self.transposed else shape

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight, self.scale)

    def dense(self, dtype: torch.dtype) -> Tensor:
        dense_OI = (self.weight * self.scale.unsqueeze(1)).to(dtype)
        return dense_OI.t() if self.transposed else dense_OI

    def to(self, device: torch.device) -> Int8:
        return Int8(self.weight.to(device), self.scale.to(device), self.transposed)


def quantize_int8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric, to nearest: int8 [O, I] and the outputs' fp32 scales [O], so that the largest weight is 127."""
    scale_O = weight_OI.float().abs().amax(1).clamp_min(1e-30) / 127
    return torch.round(weight_OI.float() / scale_O.unsqueeze(1)).to(torch.int8), scale_O


def fp8_grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a weight of `shape` [..., R, C]; the last blocks may be ragged."""
    *lead, rows, columns = shape
    return (*lead, -(-rows // block[0]), -(-columns // block[1]))


def mxfp4_shape(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Decoded shape [..., 32 G, C] of `blocks` [..., C, G, 16]."""
    *lead, columns, groups, _ = blocks
    return (*lead, groups * MXFP4_GROUP, columns)


def dequantize_fp8_block(weight: Tensor, scale_inv: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """weight [..., R, C] float8 times its block's scale, computed in fp32 and rounded once to `dtype`.

    Scales are floats, or E8M0 exponents (float8_e8m0fnu or uint8). Raises CheckpointError when the grid does not fit.
    """
    if tuple(scale_inv.shape) != fp8_grid(tuple(weight.shape), block):
        raise CheckpointError(
            f"FP8 weight {list(weight.shape)} in blocks of {block[0]}x{block[1]} needs scales "
            f"{list(fp8_grid(tuple(weight.shape), block))}, got {list(scale_inv.shape)}"
        )
    rows, columns = weight.shape[-2:]
    scales = float_scales(scale_inv)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for i in range(scales.shape[-2]):  # one strip of blocks at a time, so that the fp32 scratch stays small
        strip = slice(i * block[0], min((i + 1) * block[0], rows))
        by_column = scales[..., i, :].repeat_interleave(block[1], dim=-1)[..., :columns]
        out[..., strip, :] = weight[..., strip, :].float() * by_column.unsqueeze(-2)
    return out


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """blocks uint8 [..., C, G, 16], scales uint8 [..., C, G] -> [..., 32 G, C], a transposed view of its rows.

    A byte holds two E2M1 values, the low nibble first; a group of 32 shares one E8M0 scale (a power of two).
    Raises CheckpointError when the two do not belong together.
    """
    if blocks.shape[:-1] != scales.shape or blocks.shape[-1] * 2 != MXFP4_GROUP:
        raise CheckpointError(
            f"MXFP4 blocks {list(blocks.shape)} do not fit scales {list(scales.shape)}: "
            f"expected {[*scales.shape, MXFP4_GROUP // 2]}"
        )
    *lead, groups, width = blocks.shape
    flat_blocks = blocks.reshape(-1, groups, width)
    flat_scales = scales.reshape(-1, groups)
    pairs = _byte_pairs().to(blocks.device)
    out = torch.empty(flat_blocks.shape[0], groups, MXFP4_GROUP, dtype=dtype, device=blocks.device)
    for start in range(0, out.shape[0], _ROWS_AT_A_TIME):
        part = slice(start, start + _ROWS_AT_A_TIME)
        values = F.embedding(flat_blocks[part].int(), pairs).flatten(-2)
        out[part] = values * _exponents(flat_scales[part]).unsqueeze(-1)
    return out.reshape(*lead, groups * MXFP4_GROUP).transpose(-1, -2)


def float_scales(scales: Tensor) -> Tensor:
    """Scales as fp32, from any float dtype or from E8M0 bytes."""
    return _exponents(scales) if scales.dtype == torch.uint8 else scales.float()


def _exponents(scales: Tensor) -> Tensor:
    """E8M0 bytes -> fp32 powers of two."""
    return torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - _E8M0_BIAS)


@cache
def _byte_pairs() -> Tensor:
    """[256, 2] fp32: the two E2M1 values in each byte, low nibble first."""
    values = torch.tensor(_MXFP4_VALUES, dtype=torch.float32)
    codes = torch.arange(256)
    return torch.stack([values[codes & 0xF], values[codes >> 4]], dim=-1)
