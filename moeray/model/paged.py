"""The paged KV cache and what attention needs to know of a step.

T tokens of the step, B decoding sequences, S slots of a layer's cache, G key/value heads, L context length, W blocks of
a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from moeray.errors import UnsupportedModelError
from moeray.model.pages import zeros_on_demand
from moeray.model.patterns import Pattern
from moeray.settings.engine import AttentionKernel


@dataclass(frozen=True)
class Slot:
    """What a layer keeps of a token: `groups` keys of `k_size`, and values of `v_size`.

    `shared`: the value is the beginning of the key (the latents of MLA) and takes no room of its own.
    """

    groups: int
    k_size: int
    v_size: int
    shared: bool = False

    @property
    def numel(self) -> int:
        return self.groups * (self.k_size + (0 if self.shared else self.v_size))


@dataclass
class LayerCache:
    """Keys and values of one layer, one row a slot: k [S, G, Dk], v [S, G, Dv]."""

    k: Tensor
    v: Tensor

    @classmethod
    def allocate(cls, slots: int, slot: Slot, dtype: torch.dtype, device: torch.device) -> LayerCache:
        k = zeros_on_demand((slots, slot.groups, slot.k_size), dtype, device)
        if slot.shared:
            return cls(k, k[..., : slot.v_size])
        return cls(k, zeros_on_demand((slots, slot.groups, slot.v_size), dtype, device))


@dataclass
class PagedCache:
    """The pools of every layer; allocated by `allocate` once a trial step has shown what each layer keeps.

    `kernel`: what decoding sequences attend with.
    """

    kernel: AttentionKernel = "torch"
    kept: dict[int, Slot] = field(default_factory=dict)
    layers: dict[int, LayerCache] = field(default_factory=dict)

    def bytes_per_slot(self, dtype: torch.dtype) -> int:
        return sum(slot.numel for slot in self.kept.values()) * dtype.itemsize

    def allocate(self, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        for layer, slot in self.kept.items():
            self.layers[layer] = LayerCache.allocate(slots, slot, dtype, device)


@dataclass(frozen=True)
class Seen:
    """The keys that N tokens of a sequence may see: those in slots `slots_L`, None where they are the tokens' own;
    `mask_NL`: which of them each token sees (bool), None where they are all up to its own."""

    slots_L: Tensor | None
    mask_NL: Tensor | None


@dataclass(frozen=True)
class Span:
    """Several tokens of one sequence: rows [start, start + count) of T, context length `context` after it."""

    start: int
    count: int
    context: int
    slots_L: Tensor
    _known: dict[Pattern, Seen] = field(default_factory=dict, repr=False, compare=False)

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.count)

    def seen(self, pattern: Pattern) -> Seen:
        """What its tokens see by this pattern."""
        if pattern not in self._known:
            self._known[pattern] = self._see(pattern)
        return self._known[pattern]

    def _see(self, pattern: Pattern) -> Seen:
        begin, device = self.context - self.count, self.slots_L.device
        first = int(pattern.first_keys(torch.tensor(begin)))
        if begin == 0 and pattern.kind == "causal":
            return Seen(None, None)
        queries, keys = (torch.arange(at, self.context, device=device) for at in (begin, first))
        return Seen(self.slots_L[first:] if begin else None, pattern.visible(queries, keys))


@dataclass(frozen=True)
class Decodes:
    """One token of each of B sequences: row `rows_B` of the step, the last of `contexts_B` tokens.

    Token i of a sequence is in slot `tables_BW[b, i // block_size] * block_size + i % block_size`. All int64, on the
    trunk's device.
    """

    rows_B: Tensor
    contexts_B: Tensor
    tables_BW: Tensor
    block_size: int
    _known: dict[tuple[str, Pattern], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def bounds(self, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """The keys that each query sees: from the first, int64 [B], to before the end, int64 [B]."""
        key = "bounds", pattern
        if key not in self._known:
            self._known[key] = pattern.first_keys(self.contexts_B - 1), self.contexts_B
        return self._known[key]

    def gathered(self, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """The slots of these keys, [B, L], and which of them are there, bool [B, L]."""
        key = "gathered", pattern
        if key not in self._known:
            first_B, end_B = self.bounds(pattern)
            at_BL = first_B[:, None] + torch.arange(int((end_B - first_B).max()), device=first_B.device)
            seen_BL = at_BL < end_B[:, None]
            at_BL = torch.where(seen_BL, at_BL, first_B[:, None])
            slots_BL = self.tables_BW.gather(1, at_BL // self.block_size) * self.block_size + at_BL % self.block_size
            self._known[key] = slots_BL, seen_BL
        return self._known[key]


@dataclass(frozen=True)
class Step:
    """What attention needs of a step. `slots_T`: where each token's key and value go."""

    cache: PagedCache
    slots_T: Tensor
    decodes: Decodes | None
    prefills: tuple[Span, ...]


current_step: ContextVar[Step] = ContextVar("moeray_step")


@contextmanager
def attending(step: Step) -> Iterator[None]:
    """Within the block, the modules' attention works on `step`."""
    token = current_step.set(step)
    try:
        yield
    finally:
        current_step.reset(token)


class PassThroughCache(Cache):  # type: ignore[misc]
    """The cache object that transformers' modules see: it stores nothing and hands k and v on to attention.

    Any other use of a cache (recurrent or convolution state, an indexer) raises UnsupportedModelError.
    """

    def __init__(self) -> None:
        self.layers: list[Any] = []

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedModelError(
            "the model keeps state beside keys and values (recurrent, convolution or index state), "
            "which the paged KV cache cannot hold; choose a pure attention family"
        )

    get_conv_state = update_conv_state = get_recurrent_state = update_recurrent_state = _refuse
    update_indexer = has_previous_state = early_initialization = _refuse
