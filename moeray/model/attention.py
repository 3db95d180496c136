"""Attention over a paged KV cache, plugged into transformers' modules by name.

A step packs the spans of many sequences into one row of T tokens. transformers asks a mask function for a mask and
hands it to attention; ours answers with the *pattern* that the family's own mask function draws (causal, sliding,
chunked), read off by probing it, and refuses any other. Positions are each sequence's own, so ragged packing changes
no output.

Shapes: T tokens of the step, H query heads, G key/value heads, D head size, L context length, B sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from moeray.errors import UnsupportedModelError

NAME = "moeray_paged"

# Arguments that attention modules pass beside q, k, v and that change nothing here: no dropout at inference, the mask
# pattern already holds the window, and positions are the step's own.
_INERT = frozenset(
    {"dropout", "sliding_window", "position_ids", "cache_position", "is_causal", "use_cache", "output_attentions",
     "output_hidden_states", "return_dict", "position_embeddings", "output_router_logits", "logits_to_keep",
     "num_items_in_batch", "layer_type", "max_length_q", "max_length_k", "deterministic"}
)  # fmt: skip


@dataclass(frozen=True)
class Pattern:
    """Which keys a query at position q may see, all at or before q.

    kind "causal": every one; "sliding": the last `size` ones; "chunked": those in q's own chunk of `size`.
    """

    kind: str
    size: int = 0

    def first_key(self, q: int) -> int:
        """Position of the first visible key."""
        if self.kind == "sliding":
            return max(0, q - self.size + 1)
        if self.kind == "chunked":
            return q - q % self.size
        return 0

    def visible(self, q_N: Tensor, k_L: Tensor) -> Tensor:
        """Bool [N, L] for positions `q_N` [N] and `k_L` [L]."""
        seen = k_L[None] <= q_N[:, None]
        if self.kind == "sliding":
            seen &= k_L[None] > q_N[:, None] - self.size
        if self.kind == "chunked":
            seen &= k_L[None] // self.size == q_N[:, None] // self.size
        return seen


@dataclass
class LayerCache:
    """Keys and values of one layer, one row a slot: k [S, G, Dk], v [S, G, Dv]."""

    k: Tensor
    v: Tensor


@dataclass
class PagedCache:
    """The pools of every layer; allocated by `allocate` once a trial step has shown each layer's key/value shape.

    `shapes`: layer -> ((G, Dk), (G, Dv)).
    """

    shapes: dict[int, tuple[tuple[int, int], tuple[int, int]]] = field(default_factory=dict)
    layers: dict[int, LayerCache] = field(default_factory=dict)

    def bytes_per_slot(self, dtype: torch.dtype) -> int:
        return sum(g * d for pair in self.shapes.values() for g, d in pair) * dtype.itemsize

    def allocate(self, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        for layer, (k, v) in self.shapes.items():
            self.layers[layer] = LayerCache(
                torch.zeros(slots, *k, dtype=dtype, device=device), torch.zeros(slots, *v, dtype=dtype, device=device)
            )


@dataclass(frozen=True)
class Span:
    """One sequence's part of the step: rows [start, start + count) of T, context length `context` after it."""

    start: int
    count: int
    context: int
    slots_L: Tensor


@dataclass(frozen=True)
class Step:
    """What attention needs of a step. `slots_T`: where each token's key and value go.

    `decodes` are spans of one token, batched together; `prefills` run one by one.
    """

    cache: PagedCache
    slots_T: Tensor
    decodes: tuple[Span, ...]
    prefills: tuple[Span, ...]


_step: ContextVar[Step] = ContextVar("moeray_step")


@contextmanager
def attending(step: Step) -> Iterator[None]:
    """Within the block, the modules' attention works on `step`."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


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


def _mask(
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


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, Dv]."""
    _check_call(module, query, attention_mask, kwargs)
    step = _step.get()
    k_TGD, v_TGD = key[0].transpose(0, 1), value[0].transpose(0, 1)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layer not in step.cache.layers:  # the trial step: learn the shapes, attend within the step
        step.cache.shapes[layer] = ((k_TGD.shape[1], k_TGD.shape[2]), (v_TGD.shape[1], v_TGD.shape[2]))
        pool = LayerCache(k_TGD, v_TGD)
    else:
        pool = step.cache.layers[layer]
        pool.k.index_copy_(0, step.slots_T, k_TGD)
        pool.v.index_copy_(0, step.slots_T, v_TGD)
    extra = _Extra(scale, softcap, s_aux)
    q_THD = query[0].transpose(0, 1)
    out_THD = query.new_empty(q_THD.shape[0], q_THD.shape[1], value.shape[-1])
    if step.decodes:
        rows = torch.tensor([span.start for span in step.decodes], device=query.device)
        out_THD[rows] = _decode(q_THD[rows], pool, step.decodes, attention_mask, extra)
    for span in step.prefills:
        rows_of = slice(span.start, span.start + span.count)
        out_THD[rows_of] = _prefill(q_THD[rows_of], pool, span, attention_mask, extra)
    return out_THD.unsqueeze(0), None


def _check_call(module: nn.Module, query: Tensor, pattern: Any, kwargs: dict[str, Any]) -> None:
    kind = type(module).__name__
    unknown = [key for key, value in kwargs.items() if value is not None and key not in _INERT]
    if unknown:
        raise UnsupportedModelError(f"{kind} passes {unknown[0]!r} to attention, which the paged attention lacks")
    if not isinstance(pattern, Pattern):
        raise UnsupportedModelError(f"{kind} brings an attention mask of its own, which moeray cannot page")
    if query.shape[0] != 1 or not isinstance(getattr(module, "layer_idx", None), int):
        raise UnsupportedModelError(f"{kind} does not say which layer it is (no layer_idx), so its keys cannot be kept")


@dataclass(frozen=True)
class _Extra:
    scale: float
    softcap: float | None
    sinks_H: Tensor | None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks_H is None


def _decode(q_BHD: Tensor, pool: LayerCache, spans: tuple[Span, ...], pattern: Pattern, extra: _Extra) -> Tensor:
    firsts = [pattern.first_key(span.context - 1) for span in spans]
    lengths = [span.context - first for span, first in zip(spans, firsts, strict=True)]
    longest = max(lengths)
    index_BL = torch.zeros(len(spans), longest, dtype=torch.int64, device=q_BHD.device)
    for row, (span, first, length) in enumerate(zip(spans, firsts, lengths, strict=True)):
        index_BL[row, :length] = span.slots_L[first : span.context]
    k_BGLD = pool.k[index_BL].transpose(1, 2)
    v_BGLD = pool.v[index_BL].transpose(1, 2)
    seen_BL = torch.arange(longest, device=q_BHD.device)[None] < torch.tensor(lengths, device=q_BHD.device)[:, None]
    mask = None if min(lengths) == longest else seen_BL[:, None, None, :]
    return _scaled_dot_product(q_BHD.unsqueeze(2), k_BGLD, v_BGLD, mask, extra).squeeze(2)


def _prefill(q_NHD: Tensor, pool: LayerCache, span: Span, pattern: Pattern, extra: _Extra) -> Tensor:
    begin = span.context - span.count
    first = pattern.first_key(begin)
    slots = span.slots_L[first : span.context]
    k_1GLD = pool.k[slots].transpose(0, 1).unsqueeze(0)
    v_1GLD = pool.v[slots].transpose(0, 1).unsqueeze(0)
    device = q_NHD.device
    mask = pattern.visible(
        torch.arange(begin, span.context, device=device), torch.arange(first, span.context, device=device)
    )
    out = _scaled_dot_product(q_NHD.transpose(0, 1).unsqueeze(0), k_1GLD, v_1GLD, mask[None, None], extra)
    return out[0].transpose(0, 1)


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, extra: _Extra) -> Tensor:
    """q [B, H, N, D], k and v [B, G, L, D], bool mask broadcastable to [B, H, N, L] -> [B, H, N, Dv]."""
    grouped = q.shape[1] != k.shape[1]
    if extra.plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=extra.scale, enable_gqa=grouped)
    if grouped:
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() * extra.scale
    if extra.softcap is not None:
        scores = extra.softcap * torch.tanh(scores / extra.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if extra.sinks_H is None:
        return torch.softmax(scores, dim=-1).to(v.dtype) @ v
    # A sink is one more key that every query sees, with a learned score and no value (gpt-oss).
    sinks = extra.sinks_H.float().reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1].to(v.dtype) @ v


AttentionInterface.register(NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)
