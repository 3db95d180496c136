"""One expert's weights of a fused parameter, as they are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeray.model.formats import Plain, StoredWeight

_PLAIN = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ExpertTensor:
    """One expert's slice of a fused parameter, without the expert dimension: `parts` side by side along `cat_dim`.

    Each part stays as stored, a view of the checkpoint's map where the family's operations allow it.
    """

    parts: tuple[StoredWeight, ...]
    cat_dim: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        if len(self.parts) > 1:
            shape[self.cat_dim] = sum(part.shape[self.cat_dim] for part in self.parts)
        return tuple(shape)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The decoded slice; a view of the map for a single plain part that already has `dtype`."""
        dense = [part.dense(dtype) for part in self.parts]
        return dense[0] if len(dense) == 1 else torch.cat(dense, dim=self.cat_dim)

    def looks_finite(self) -> bool:
        """Whether the plain parts, and the floating scales of others, hold numbers alone."""
        plain = (tensor for part in self.parts for tensor in part.tensors if tensor.dtype in _PLAIN)
        return all(bool(tensor.isfinite().all()) for tensor in plain)

    def fits(self, wanted: tuple[int, ...]) -> bool:
        """Whether it has that shape, each part as far as `cat_dim` leaves it to them."""
        dim, parts = self.cat_dim, [part.shape for part in self.parts]
        return (
            all(len(shape) == len(wanted) for shape in parts)
            and all(s[:dim] + s[dim + 1 :] == wanted[:dim] + wanted[dim + 1 :] for s in parts)
            and self.shape == wanted
        )

    def to(self, device: torch.device) -> ExpertTensor:
        return ExpertTensor(tuple(part.to(device) for part in self.parts), self.cat_dim)

    def by_outputs(self, transposed: bool) -> ExpertTensor:
        """The same, each output's weights together in memory: a copy where a plain part's lie `transposed`."""
        if not transposed:
            return self
        parts = (Plain(p.tensor.t().contiguous().t()) if isinstance(p, Plain) else p for p in self.parts)
        return ExpertTensor(tuple(parts), self.cat_dim)
