"""A frame's tensors as bytes, and bytes as its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch

from moeray.buffers import aligned
from moeray.errors import WireError
from moeray.wire.spans import MAX_DIMS, MAX_TENSORS, Span

# A dtype's code on the wire is its index here: append only, and to spans.SIZES.
DTYPES: tuple[torch.dtype, ...] = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
)
CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
# numpy does not know these, so their bytes go as whole numbers of the same size.
_FOREIGN = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}


class Tensors(Sequence[torch.Tensor]):
    """Those of a received frame, made when they are asked for: views of `memory` from byte `start` on."""

    __slots__ = ("memory", "spans", "start")

    def __init__(self, memory: memoryview, start: int, spans: list[Span]) -> None:
        self.memory = memory
        self.start = start
        self.spans = spans

    def __len__(self) -> int:
        return len(self.spans)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | Sequence[torch.Tensor]:
        if isinstance(index, slice):
            return Tensors(self.memory, self.start, self.spans[index])
        code, shape, elements, offset = self.spans[index]
        if not elements:
            return torch.empty(shape, dtype=DTYPES[code])
        flat = torch.frombuffer(self.memory, dtype=DTYPES[code], count=elements, offset=self.start + offset)
        return flat if len(shape) == 1 else flat.view(shape)


def flatten(tensors: Sequence[torch.Tensor]) -> tuple[list[memoryview], int]:
    """See `frame.chunks_of`."""
    if len(tensors) > MAX_TENSORS:
        raise WireError(f"a frame carries at most {MAX_TENSORS} tensors, got {len(tensors)}; stack them")
    chunks = []
    total = 0
    for tensor in tensors:
        if not tensor.is_cpu or tensor.dtype not in CODES or tensor.layout is not torch.strided:
            raise _refusal(tensor)
        if tensor.dim() > MAX_DIMS:
            raise WireError(f"a tensor of {tensor.dim()} dimensions is over the wire's {MAX_DIMS}; flatten it")
        chunk = _bytes_of(tensor)
        chunks.append(chunk)
        total += aligned(chunk.nbytes)
    return chunks, total


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype in _FOREIGN:
        tensor = tensor.view(_FOREIGN[tensor.dtype])
    return tensor.contiguous().numpy().data.cast("B")


def _refusal(tensor: torch.Tensor) -> WireError:
    if not tensor.is_cpu:
        return WireError(f"a tensor on {tensor.device} cannot be sent; move it to the CPU first")
    if tensor.layout is not torch.strided:
        return WireError(f"a tensor of layout {tensor.layout} cannot be sent; make it dense first")
    return WireError(f"dtype {tensor.dtype} is not carried; send one of {', '.join(str(d)[6:] for d in DTYPES)}")
