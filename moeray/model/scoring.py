"""Logits of many of a step's rows, a piece at a time: all at once, those of a long prompt would take gigabytes.

What a family does behind its decoder (the head, its scaling, caps) is its own; so a piece is what the whole model makes
of the decoder's one output, which is kept for as long as pieces are asked for.

T tokens of the step, P rows whose logits are asked for, R those of a piece, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from moeray.errors import UnsupportedModelError

PIECE_BYTES = 64 << 20
"""The logits of a piece take so much in fp32."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The rows of a step [P], int64 in rising order, whose logits go to `take`: (their first place in `rows_P`, logits
    [R, V] in any float dtype), one call a piece. `take` keeps none of it."""

    rows_P: Tensor
    take: Callable[[int, Tensor], None]

    def pieces(self, vocab_size: int) -> Iterator[tuple[int, Tensor]]:
        """(the first place, the rows [R]) of each piece."""
        size = max(1, PIECE_BYTES // (4 * vocab_size))
        for first in range(0, len(self.rows_P), size):
            yield first, self.rows_P[first : first + size]


class _Kept:
    """The decoder's output, once there is one."""

    def __init__(self) -> None:
        self.output: Any = None


_kept: ContextVar[_Kept | None] = ContextVar("moeray_kept", default=None)


def keep_output(model: PreTrainedModel) -> None:
    """Make the decoder of `model` compute once within `computed_once`. Raises UnsupportedModelError where there is
    none beside the model itself."""
    decoder = model.base_model
    if decoder is model:
        raise UnsupportedModelError(f"model class {type(model).__name__} has no decoder beside its head; serve another")
    compute = decoder.forward

    @wraps(compute)
    def forward(*args: Any, **kwargs: Any) -> Any:
        kept = _kept.get()
        if kept is None:
            return compute(*args, **kwargs)
        if kept.output is None:
            kept.output = compute(*args, **kwargs)
        return kept.output

    decoder.forward = forward


@contextmanager
def computed_once() -> Iterator[None]:
    """Within the block the decoder computes at its first call, and gives the same output again at the others."""
    token = _kept.set(_Kept())
    try:
        yield
    finally:
        _kept.reset(token)
