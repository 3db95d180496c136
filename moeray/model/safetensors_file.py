"""One safetensors file: its validated header, and tensors as views of a read-only memory map."""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeray.errors import CheckpointError
from moeray.model.pages import prefer_large

_MAX_HEADER_BYTES = 100 << 20
_LFS_POINTER = b"version "
"""What these begin with."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""By their names in a header."""

# torch warns once per process that a tensor over a read-only buffer must not be written. Nothing writes weights, and
# a write would fault rather than corrupt the file, so the one warning is spent here.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of a tensor. `offset`: bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    offset: int


class SafetensorsFile:
    """The header is read and checked at once; the map is made by `open` and lives as long as a tensor over it."""

    def __init__(self, path: Path, map_: mmap.mmap, tensors: dict[str, TensorInfo]) -> None:
        self.path = path
        self.tensors = tensors
        self._map = map_

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Map the file, read-only and shared with every process that maps it. Raises CheckpointError."""
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                tensors = _read_header(path, file.read(8), file, size)
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                prefer_large(memory)
                return cls(path, memory, tensors)
        except OSError as error:
            raise CheckpointError(f"file {path} cannot be read: {error.strerror}; check its permissions") from error

    def info(self, key: str) -> TensorInfo:
        """Raises CheckpointError when the file has no such tensor."""
        found = self.tensors.get(key)
        if found is None:
            raise CheckpointError(f"tensor {key} is not in file {self.path}; fetch the file and its index again")
        return found

    def tensor(self, key: str) -> Tensor:
        """A CPU view of the map; never write to it. Raises CheckpointError."""
        info = self.info(key)
        count = math.prod(info.shape)
        if count == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        if info.offset % info.dtype.itemsize:  # kernels want aligned elements; only such a tensor is copied
            raw = bytearray(self._map[info.offset : info.offset + info.nbytes])
            return torch.frombuffer(raw, dtype=info.dtype).reshape(info.shape)
        return torch.frombuffer(self._map, dtype=info.dtype, count=count, offset=info.offset).reshape(info.shape)


def _read_header(path: Path, prefix: bytes, file: Any, size: int) -> dict[str, TensorInfo]:
    if prefix == _LFS_POINTER:
        raise CheckpointError(
            f"file {path} is a Git LFS pointer in the place of weights; run git lfs pull in its folder"
        )
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= _MAX_HEADER_BYTES:
        raise CheckpointError(f"file {path} is not safetensors (no valid header length); fetch it again or convert it")
    if 8 + length > size:
        raise CheckpointError(f"file {path} is truncated within its header ({size} bytes); fetch it again")
    try:
        header = json.loads(file.read(length))
    except ValueError as error:
        raise CheckpointError(f"file {path} has a header that is not JSON; fetch it again or convert it") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"file {path} has a header that is not a JSON object; fetch it again or convert it")
    header.pop("__metadata__", None)
    return {key: _entry(path, key, entry, 8 + length, size) for key, entry in header.items()}


def _entry(path: Path, key: str, entry: Any, start: int, size: int) -> TensorInfo:
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"file {path}: the header's entry of tensor {key} is malformed; fetch the file again")
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise CheckpointError(f"file {path}: tensor {key} has dtype {dtype_name!r}, which moeray does not read")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"file {path}: tensor {key} of shape {list(shape)} and dtype {dtype_name} does not fill its "
            f"{end - begin} bytes; fetch the file again"
        )
    if start + end > size:
        raise CheckpointError(
            f"file {path} is truncated: tensor {key} ends at byte {start + end}, the file has {size}; fetch it again"
        )
    return TensorInfo(dtype, shape, end - begin, start + begin)
