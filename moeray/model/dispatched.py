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

from moeray.model.kernels.combine import Combining, combine, combining
from moeray.model.recording import perform

NAME = "moeray_dispatched"

ExpertRows = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, x [T, D], expert ids [T, K]) -> each chosen expert's output, unweighted [T, K, D]."""

Experts = Callable[[int, Tensor, Tensor, "Sum"], None]
"""(layer, x [T, D], expert ids [T, K], what their outputs come to)."""

Seconds = Callable[[float], None]
"""Takes a duration."""

_experts: ContextVar[Experts] = ContextVar("moeray_experts")
_on_combine: ContextVar[Seconds] = ContextVar("moeray_on_combine")


class Sum:
    """The weighted sum of every token's outputs, in the order of k, which goes to `out_TD`. `norm`: what is done with
    each output before. `seconds`: what it took, once it is done."""

    __slots__ = ("norm", "out_TD", "seconds", "weights_TK")

    def __init__(self, weights_TK: Tensor, out_TD: Tensor, norm: Callable[[Tensor], Tensor] | None = None) -> None:
        self.weights_TK = weights_TK
        self.out_TD = out_TD
        self.norm = norm
        self.seconds = 0.0

    def of(self, rows_TKD: Tensor) -> None:
        """Of these outputs."""
        began = time.perf_counter()
        combine(rows_TKD if self.norm is None else self.norm(rows_TKD), self.weights_TK, self.out_TD)
        self.seconds = time.perf_counter() - began

    def in_c(self) -> Combining | None:
        """What the part in C takes to do it; None where it cannot."""
        return combining(self.weights_TK, self.out_TD) if self.norm is None else None


def unheard(seconds: float) -> None:
    """Nobody wants to know."""


def summed(rows: ExpertRows) -> Experts:
    """Experts whose outputs are summed up once all are there."""
    return lambda layer, x_TD, ids_TK, total: total.of(rows(layer, x_TD, ids_TK))


@contextmanager
def dispatching(experts: Experts, on_combine: Seconds = unheard) -> Iterator[None]:
    """Within the block, these are the modules' experts; `on_combine` hears how long each layer's sum took."""
    experts_token, combine_token = _experts.set(experts), _on_combine.set(on_combine)
    try:
        yield
    finally:
        _experts.reset(experts_token)
        _on_combine.reset(combine_token)


def _run_experts(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """transformers' experts interface: send rows out, weigh and sum what comes back in the order of k."""
    x_TD = x.reshape(-1, x.shape[-1])
    ids_TK = ids.reshape(x_TD.shape[0], -1)
    out_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    perform(_dispatch, module, x_TD, ids_TK, weights.reshape(ids_TK.shape), out_TD)
    return out_TD.reshape(x.shape)


def _dispatch(module: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, out_TD: Tensor) -> None:
    total = Sum(weights_TK, out_TD, module.post_expert_norm if module.has_post_expert_norm else None)
    _experts.get()(module.moeray_layer, x_TD, ids_TK, total)
    _on_combine.get()(total.seconds)


ALL_EXPERTS_FUNCTIONS.register(NAME, _run_experts)
