"""The place of the experts in transformers' modules: rows go out to wherever the experts are.

T tokens of a step, D hidden size, K experts a token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeray.model.kernels import combine
from moeray.model.recording import perform

NAME = "moeray_dispatched"

ExpertRows = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, x [T, D], expert ids [T, K]) -> each chosen expert's output, unweighted [T, K, D]."""

Seconds = Callable[[float], None]
"""Takes a duration."""

_expert_rows: ContextVar[ExpertRows] = ContextVar("moeray_expert_rows")
_on_combine: ContextVar[Seconds] = ContextVar("moeray_on_combine")


def unheard(seconds: float) -> None:
    """Nobody wants to know."""


@contextmanager
def dispatching(expert_rows: ExpertRows, on_combine: Seconds = unheard) -> Iterator[None]:
    """Within the block, the modules' experts are `expert_rows`; `on_combine` hears how long each layer's sum took."""
    rows_token, combine_token = _expert_rows.set(expert_rows), _on_combine.set(on_combine)
    try:
        yield
    finally:
        _expert_rows.reset(rows_token)
        _on_combine.reset(combine_token)


def _experts(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """transformers' experts interface: send rows out, weigh and sum what comes back in the order of k."""
    x_TD = x.reshape(-1, x.shape[-1])
    ids_TK = ids.reshape(x_TD.shape[0], -1)
    out_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    perform(_dispatch, module, x_TD, ids_TK, weights.reshape(ids_TK.shape), out_TD)
    return out_TD.reshape(x.shape)


def _dispatch(module: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, out_TD: Tensor) -> None:
    rows_TKD = _expert_rows.get()(module.moeray_layer, x_TD, ids_TK)
    began = time.perf_counter()
    if module.has_post_expert_norm:
        rows_TKD = module.post_expert_norm(rows_TKD)
    combine(rows_TKD, weights_TK, out_TD)
    _on_combine.get()(time.perf_counter() - began)


ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
