"""Attention over a paged KV cache, plugged into transformers' modules by name.

A step packs the spans of many sequences into one row of T tokens. Positions are each sequence's own, so ragged packing
changes no output.

Shapes: T tokens of the step, H query heads, G key/value heads, D head size, L context length, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from moeray.errors import UnsupportedModelError
from moeray.model.kernels import keep
from moeray.model.kernels.attention import decode
from moeray.model.kernels.cuda_attention import decode_on_gpu
from moeray.model.latent import Latent
from moeray.model.paged import Decodes, LayerCache, Slot, Span, Step, current_step
from moeray.model.patterns import Pattern, draw

NAME = "moeray_paged"

_KERNELS = {"native": decode, "triton": decode_on_gpu}

# Arguments that attention modules pass beside q, k, v and that change nothing here: no dropout at inference, the mask
# pattern already holds the window, and positions are the step's own.
_INERT = frozenset(
    {"dropout", "sliding_window", "position_ids", "cache_position", "is_causal", "use_cache", "output_attentions",
     "output_hidden_states", "return_dict", "position_embeddings", "output_router_logits", "logits_to_keep",
     "num_items_in_batch", "layer_type", "max_length_q", "max_length_k", "deterministic"}
)  # fmt: skip


@dataclass(frozen=True)
class _Extra:
    scale: float
    softcap: float | None
    sinks_H: Tensor | None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks_H is None


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
    """transformers' attention interface. query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, Dv].

    From a module that keeps latents key and value are the latent [1, 1, T, R] and the rotated key [1, 1, T, P].
    """
    _check_call(module, query, attention_mask, kwargs)
    step = current_step.get()
    latent: Latent | None = getattr(module, "moeray_latent", None)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    own = _own(key[0].transpose(0, 1), value[0].transpose(0, 1), latent)
    pool = _keep(step, layer, own, latent is not None)
    extra = _Extra(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    q_THD = query[0].transpose(0, 1)
    decodes = step.decodes
    if decodes is not None and not step.prefills:  # the rows of a step are in order
        return _decode(q_THD, pool, latent, step, decodes, attention_mask, extra).unsqueeze(0), None
    out_THD = query.new_empty(*q_THD.shape[:2], value.shape[-1] if latent is None else latent.v_size)
    if decodes is not None:
        out_THD[decodes.rows_B] = _decode(q_THD[decodes.rows_B], pool, latent, step, decodes, attention_mask, extra)
    for span in step.prefills:
        out_THD[span.rows] = _prefill(q_THD[span.rows], own, pool, latent, span, attention_mask, extra)
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


def _own(k_TGD: Tensor, v_TGD: Tensor, latent: Latent | None) -> LayerCache:
    """The step's keys and values as the cache keeps them."""
    if latent is None:
        return LayerCache(k_TGD, v_TGD)
    k_TGD = torch.cat((k_TGD, v_TGD), dim=-1)
    return LayerCache(k_TGD, k_TGD[..., : latent.rank])


def _keep(step: Step, layer: int, own: LayerCache, shared: bool) -> LayerCache:
    """Write them to the layer's cache; in the trial step, learn their shapes and hand them on."""
    if layer not in step.cache.layers:
        step.cache.kept[layer] = Slot(own.k.shape[1], own.k.shape[2], own.v.shape[2], shared)
        return own
    pool = step.cache.layers[layer]
    keep(own.k, step.slots_T, pool.k)
    if not shared:
        keep(own.v, step.slots_T, pool.v)
    return pool


def _decode(
    q_BHD: Tensor,
    pool: LayerCache,
    latent: Latent | None,
    step: Step,
    decodes: Decodes,
    pattern: Pattern,
    extra: _Extra,
) -> Tensor:
    if latent is not None:
        q_BHD = latent.absorb(q_BHD)
    kernel = _KERNELS.get(step.cache.kernel)
    if kernel is None:
        out_BHD = _decode_torch(q_BHD, pool, decodes, pattern, extra)
    else:
        out_BHD = _decode_by(kernel, q_BHD, pool, decodes, pattern, extra)
    return out_BHD if latent is None else latent.values(out_BHD)


def _decode_by(
    kernel: Callable[..., Tensor], q_BHD: Tensor, pool: LayerCache, decodes: Decodes, pattern: Pattern, extra: _Extra
) -> Tensor:
    return kernel(
        q_BHD,
        pool.k,
        pool.v,
        decodes.tables_BW,
        *decodes.bounds(pattern),
        decodes.block_size,
        scale=extra.scale,
        softcap=extra.softcap,
        sinks_H=None if extra.sinks_H is None else extra.sinks_H.float(),
    )


def _decode_torch(q_BHD: Tensor, pool: LayerCache, decodes: Decodes, pattern: Pattern, extra: _Extra) -> Tensor:
    slots_BL, seen_BL = decodes.gathered(pattern)
    k_BGLD = pool.k[slots_BL].transpose(1, 2)
    v_BGLD = pool.v[slots_BL].transpose(1, 2)
    return _scaled_dot_product(q_BHD.unsqueeze(2), k_BGLD, v_BGLD, seen_BL[:, None, None, :], extra).squeeze(2)


def _prefill(
    q_NHD: Tensor, own: LayerCache, pool: LayerCache, latent: Latent | None, span: Span, pattern: Pattern, extra: _Extra
) -> Tensor:
    seen = span.seen(pattern)
    kept, at = (own, span.rows) if seen.slots_L is None else (pool, seen.slots_L)
    k_LGD, v_LGD = (kept.k[at], kept.v[at]) if latent is None else latent.expand(kept.k[at])
    q_1HND, k_1GLD, v_1GLD = (x.transpose(0, 1).unsqueeze(0) for x in (q_NHD, k_LGD, v_LGD))
    return _scaled_dot_product(q_1HND, k_1GLD, v_1GLD, seen.mask_NL, extra)[0].transpose(0, 1)


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, extra: _Extra) -> Tensor:
    """q [B, H, N, D], k and v [B, G, L, D], bool mask broadcastable to [B, H, N, L] -> [B, H, N, Dv]. Without a mask
    L is N, and each query sees the keys up to its own."""
    grouped = q.shape[1] != k.shape[1]
    if extra.plain:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=extra.scale, enable_gqa=grouped
        )
    if grouped:
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() * extra.scale
    if extra.softcap is not None:
        scores = extra.softcap * torch.tanh(scores / extra.softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    if extra.sinks_H is None:
        return torch.softmax(scores, dim=-1).to(v.dtype) @ v
    # A sink is one more key that every query sees, with a learned score and no value (gpt-oss).
    sinks = extra.sinks_H.float().reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1].to(v.dtype) @ v


AttentionInterface.register(NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, draw)
