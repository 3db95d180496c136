"""Which keys a query sees: the family's own mask function is probed and its pattern recognised.

transformers asks a mask function for a mask and hands it to attention; ours answers with the pattern that the family's
function draws (causal, sliding, chunked) and refuses any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moeray.errors import UnsupportedModelError
from moeray.model.recording import unrecorded


@dataclass(frozen=True)
class Pattern:
    """Which keys a query at position q may see, all at or before q.

    kind "causal": every one; "sliding": the last `size` ones; "chunked": those in q's own chunk of `size`.
    """

    kind: str
    size: int = 0

    def first_keys(self, q_N: Tensor) -> Tensor:
        """Position of the first visible key of each, int64 [N]."""
        if self.kind == "sliding":
            return (q_N - (self.size - 1)).clamp(min=0)
        if self.kind == "chunked":
            return q_N - q_N % self.size
        return torch.zeros_like(q_N)

    def visible(self, q_N: Tensor, k_L: Tensor) -> Tensor:
        """Bool [N, L] for positions `q_N` [N] and `k_L` [L]."""
        seen = k_L[None] <= q_N[:, None]
        if self.kind == "sliding":
            seen &= k_L[None] > q_N[:, None] - self.size
        if self.kind == "chunked":
            seen &= k_L[None] // self.size == q_N[:, None] // self.size
        return seen


def draw(
    mask_function: Any,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **_: Any,
) -> Pattern:
    """transformers' mask interface: answer with the pattern that `mask_function` draws."""
    if attention_mask is not None or use_vmap:
        raise UnsupportedModelError(
            "the model draws an attention mask of its own (beyond causal, sliding or chunked), which moeray cannot page"
        )
    with unrecorded():  # a family's pattern is the same in every step
        return _recognise(_Probe(mask_function, local_size))


@dataclass(frozen=True, eq=False)
class _Probe:
    function: Any
    local_size: int | None

    def drawn(self, length: int) -> Tensor:
        q = torch.arange(length)
        zero = torch.tensor(0)
        return torch.as_tensor(self.function(zero, zero, q[:, None], q[None, :])).expand(length, length)


def _recognise(probe: _Probe) -> Pattern:
    size = probe.local_size
    # Long enough to see where a window or chunk ends; capped, since beyond the cap no shorter pattern looks the same.
    length = min(4 * size + 3, 512) if size else 64
    drawn = probe.drawn(length)
    for pattern in _candidates(size):
        near = torch.equal(drawn, _expected(pattern, length))
        if near and (size is None or size < length // 2 or _far_agrees(probe, pattern)):
            return pattern
    raise UnsupportedModelError(
        "the model's attention mask is neither causal, sliding nor chunked, so it cannot be paged; "
        "choose a family with one of these"
    )


def _candidates(size: int | None) -> tuple[Pattern, ...]:
    return (Pattern("causal"),) if size is None else (Pattern("sliding", size), Pattern("chunked", size))


@lru_cache(maxsize=32)
def _expected(pattern: Pattern, length: int) -> Tensor:
    positions = torch.arange(length)
    return pattern.visible(positions, positions)


def _far_agrees(probe: _Probe, pattern: Pattern) -> bool:
    """Compare at positions around the window's and the chunk's borders, where near positions show nothing."""
    size, zero = pattern.size, torch.tensor(0)
    q = torch.tensor([size - 1, size, size + 1, 2 * size - 1, 2 * size, 2 * size + 1])
    k = torch.tensor([0, 1, 2, size - 1, size, size + 1, 2 * size - 1, 2 * size])
    drawn = torch.as_tensor(probe.function(zero, zero, q[:, None], k[None, :]))
    return torch.equal(drawn.expand(len(q), len(k)), pattern.visible(q, k))
