"""Writing sharded safetensors as a stream: each tensor is made when its turn comes and dropped when it is written."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to write. `make` is called once, when the tensor's bytes are due."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_shards(
    folder: Path,
    entries: Iterable[Entry],
    dtype: torch.dtype,
    *,
    shard_bytes: int = 512 << 20,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write `entries` in order, cast to `dtype`, as model-0000i-of-0000n.safetensors and their index.

    `progress` gets bytes written and bytes in all. Raises OSError.
    """
    shards: list[list[Entry]] = [[]]
    filled = total = 0
    for entry in entries:
        size = math.prod(entry.shape) * dtype.itemsize
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
        total += size
    done = 0
    files: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        files.update(dict.fromkeys((entry.name for entry in shard), name))
        for written in _write_shard(folder / name, shard, dtype):
            done += written
            progress(done, total)
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(path: Path, shard: list[Entry], dtype: torch.dtype) -> Iterator[int]:
    """Write one file, yielding each tensor's bytes when they are written."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in shard:
        end = offset + math.prod(entry.shape) * dtype.itemsize
        header[entry.name] = {"dtype": _NAMES[dtype], "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)  # the data starts aligned, as far as the tensors' sizes keep it so
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for entry in shard:
            tensor = entry.make().to(dtype).contiguous()
            assert tuple(tensor.shape) == entry.shape, f"{entry.name}: {tuple(tensor.shape)} != {entry.shape}"
            yield file.write(tensor.view(-1).view(torch.uint8).numpy().data)
