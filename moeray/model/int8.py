"""Experts rounded to int8, kept in a folder of the node: made once, mapped by every process that hosts them.

A file holds one expert's slice of one parameter. It is written beside its place and renamed, so a file that is there is
whole, and what was made before a crash is kept.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_file

from moeray.errors import CheckpointError
from moeray.model.checkpoint import Checkpoint
from moeray.model.expert_tensor import ExpertTensor
from moeray.model.expert_weights import ExpertWeights, refusal
from moeray.model.formats import Int8, Plain, quantize_int8
from moeray.model.safetensors_file import SafetensorsFile

LAYOUT = 1
_BLOCK_BYTES = 4096
_BLOCKS = 256
"""Of all files together, or a few of each: on a cold disk each takes milliseconds."""


def int8_bytes(shape: Sequence[int], transposed: bool) -> int:
    """Bytes of the int8 form of weights [outputs, inputs], or `transposed`, with an fp32 scale for each output."""
    return math.prod(shape) + 4 * shape[1 if transposed else 0]


def _sample(path: Path, blocks: int) -> bytes:
    """So many blocks of a file, evenly spread. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return b"".join(os.pread(file.fileno(), _BLOCK_BYTES, size * i // blocks) for i in range(blocks))
    except OSError as error:
        raise CheckpointError(f"file {path} cannot be read: {error.strerror}; check its permissions") from error


class Int8Cache:
    """`folder` is this checkpoint's alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def of(cls, checkpoint: Checkpoint, cache_dir: Path) -> Int8Cache:
        """The one for these weights: by the checkpoint's fingerprint, and for a local folder its files' times and some
        of what is in them. They may be written anew under the same names, and times mean nothing in images that are
        built to be the same each time."""
        digest = hashlib.sha256(checkpoint.fingerprint.encode())
        if checkpoint.source.folder is not None:
            paths = sorted(checkpoint.source.folder.glob("*.safetensors"))
            for path in paths:
                digest.update(f"\n{path.name} {path.stat().st_mtime_ns}".encode())
                digest.update(_sample(path, max(4, _BLOCKS // len(paths))))
        return cls(cache_dir / f"int8-{LAYOUT}" / digest.hexdigest()[:32])

    def expert(self, name: str, expert: int, transposed: bool, weights: ExpertWeights) -> ExpertTensor:
        """The int8 form of an expert's slice, made where it is not there yet; that itself where it is not dense.

        `transposed`: whether that is [inputs, outputs]. Raises CheckpointError for weights that are not finite, and
        when the folder cannot be written.
        """
        path = self._folder / f"{name}.{expert}.safetensors"
        if not path.is_file():
            tensor = weights.expert(name, expert)
            if not all(isinstance(part, Plain) for part in tensor.parts):
                return tensor
            if not self._make(path, tensor, transposed):
                raise refusal(weights, name, expert)
        file = SafetensorsFile.open(path)
        return ExpertTensor((Int8(file.tensor("weight"), file.tensor("scale"), transposed),))

    def _make(self, path: Path, tensor: ExpertTensor, transposed: bool) -> bool:
        """False, and nothing is kept, where the weights are not finite."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self._folder / "lock"):
                if path.is_file():
                    return True  # another process was first
                dense = tensor.dense(torch.float32)
                weight_OI, scale_O = quantize_int8(dense.t() if transposed else dense)
                if not scale_O.isfinite().all():  # the largest of each output's weights, which NaN passes through
                    return False
                save_file({"weight": weight_OI.contiguous(), "scale": scale_O}, path.with_suffix(".part"))
                os.replace(path.with_suffix(".part"), path)
                return True
        except OSError as error:
            raise CheckpointError(
                f"the int8 form of the experts cannot be kept in {self._folder} ({error}); free space there, or set "
                "cache_dir or experts.quantization: none"
            ) from error
