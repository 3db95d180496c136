"""From checkpoint tensors to logical weights: a quantised weight and its scales are one weight with one name."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from moeray.errors import CheckpointError
from moeray.model.checkpoint import Checkpoint, Quantization, Scheme
from moeray.model.formats import FP8_DTYPES, Fp8Block, Mxfp4, Plain, StoredWeight, fp8_grid, mxfp4_shape

_SCALE, _ACTIVATION = "_scale_inv", ("activation_scale", "input_scale")
_BLOCKS, _SCALES = "_blocks", "_scales"


@dataclass(frozen=True, slots=True)
class StoredKeys:
    """The checkpoint tensors that make up one logical weight; `scale` is None for a plain one."""

    weight: str
    scale: str | None = None
    scheme: Scheme = Scheme.NONE

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.weight,) if self.scale is None else (self.weight, self.scale)


def logical_weights(keys: Iterable[str], quantization: Quantization) -> dict[str, StoredKeys]:
    """Logical name -> its checkpoint tensors. Scales of activations are left out: activations are not quantised."""
    present = set(keys)
    if quantization.scheme is Scheme.FP8_BLOCK:
        return {
            key: StoredKeys(key, key + _SCALE, Scheme.FP8_BLOCK) if key + _SCALE in present else StoredKeys(key)
            for key in present
            if not key.endswith(_ACTIVATION) and not (key.endswith(_SCALE) and key.removesuffix(_SCALE) in present)
        }
    if quantization.scheme is Scheme.MXFP4:
        return dict(_mxfp4_weight(key, present) for key in present if not _is_mxfp4_scale(key, present))
    return {key: StoredKeys(key) for key in present}


def _is_mxfp4_scale(key: str, present: set[str]) -> bool:
    return key.endswith(_SCALES) and key.removesuffix(_SCALES) + _BLOCKS in present


def _mxfp4_weight(key: str, present: set[str]) -> tuple[str, StoredKeys]:
    name = key.removesuffix(_BLOCKS)
    if name == key or name + _SCALES not in present:
        return key, StoredKeys(key)
    return name, StoredKeys(key, name + _SCALES, Scheme.MXFP4)


def stored_shape(checkpoint: Checkpoint, stored: StoredKeys) -> tuple[int, ...]:
    """The logical shape, from the header. Raises CheckpointError, also when the scales do not fit."""
    info = checkpoint.info(stored.weight)
    if stored.scale is None:
        if info.dtype in FP8_DTYPES:
            raise CheckpointError(
                f"tensor {stored.weight} in file {checkpoint.file_of(stored.weight)} is {info.dtype} but has no "
                f"{stored.weight}{_SCALE}; fetch the checkpoint again, with the quantization_config of its config.json"
            )
        return info.shape
    found = checkpoint.info(stored.scale).shape
    if stored.scheme is Scheme.MXFP4:
        wanted, shape = info.shape[:-1], mxfp4_shape(info.shape)
    else:
        assert checkpoint.quantization.block is not None
        wanted, shape = fp8_grid(info.shape, checkpoint.quantization.block), info.shape
    if found != wanted:
        raise CheckpointError(
            f"tensor {stored.scale} in file {checkpoint.file_of(stored.scale)} has shape {list(found)}, but "
            f"{stored.weight} needs {list(wanted)}; the checkpoint does not fit its config.json"
        )
    return shape


def check_floating(checkpoint: Checkpoint, stored: StoredKeys) -> None:
    """Raises CheckpointError for whole numbers in a weight or its scales, unless the scheme says what they mean."""
    if stored.scheme is Scheme.MXFP4:
        return
    for key in stored.keys:
        dtype = checkpoint.info(key).dtype
        if not dtype.is_floating_point:
            raise CheckpointError(
                f"tensor {key} in file {checkpoint.file_of(key)} is {dtype}, quantised in a way that config.json does "
                "not name; use a bf16, fp16, fp32, FP8 block or MXFP4 checkpoint of the model"
            )


def read_stored(checkpoint: Checkpoint, stored: StoredKeys, row: int | None = None) -> StoredWeight:
    """The weight, or its row `row` of dimension 0, as views of the memory map. Raises CheckpointError."""
    stored_shape(checkpoint, stored)
    tensors = [checkpoint.tensor(k) if row is None else checkpoint.slice(k, row) for k in stored.keys]
    if stored.scheme is Scheme.MXFP4:
        return Mxfp4(*tensors)
    if stored.scheme is Scheme.FP8_BLOCK:
        assert checkpoint.quantization.block is not None
        return Fp8Block(tensors[0], tensors[1], checkpoint.quantization.block)
    return Plain(tensors[0])


def estimated_bytes(shape: tuple[int, ...], scheme: Scheme, block: tuple[int, int] | None, dtype: torch.dtype) -> int:
    """Stored bytes of a weight of logical `shape` whose file is not at hand."""
    count = math.prod(shape)
    if scheme is Scheme.MXFP4:
        return count // 2 + count // 32
    if scheme is Scheme.FP8_BLOCK:
        assert block is not None
        return count + 4 * math.prod(fp8_grid(shape, block))
    return count * dtype.itemsize
