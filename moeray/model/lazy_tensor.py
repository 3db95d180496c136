"""A checkpoint's tensor that is read when it is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moeray.model.formats import StoredWeight


class LazyTensor:
    """A trunk tensor that is read when indexed, as transformers' loader does with `tensor[...]`.

    Quantised weights come decoded to `dtype`; plain ones are views of the memory map in their own dtype.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[], StoredWeight], name: str, own: bool = False
    ) -> None:
        """`own`: each time a copy that may be written to."""
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.name = name
        self._read = read
        self._own = own

    def __getitem__(self, index: Any) -> Tensor:
        values = self._read().dense(self.dtype)[index]
        return values.clone() if self._own else values

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __repr__(self) -> str:
        return f"LazyTensor({self.name}, {list(self.shape)}, {self.dtype})"
