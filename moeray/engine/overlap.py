"""Dual-batch overlap: a step's batch as two halves, so that the trunk computes one while the experts compute the other.

Each half has a thread and a dispatcher. They take turns at the trunk, whose threads would else be more than the cores;
a half gives its turn away while it waits for its rows. Source of the idea: DeepSeek-V3's two micro-batches.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import torch
from torch import Tensor

from moeray.engine.batch import Batch
from moeray.engine.runner import Computed, Runner
from moeray.engine.trials import Trials
from moeray.engine.trunk_runner import TrunkRunner
from moeray.model.dispatched import ExpertRows, Sum
from moeray.settings.engine import Overlap


def halves(batch: Batch) -> tuple[Batch, Batch] | None:
    """The batch's entries in their order, cut where the two parts' tokens differ least; None where there is but one."""
    if len(batch.entries) < 2:
        return None
    sizes = list(accumulate(entry.count for entry in batch.entries))
    cut = min(range(1, len(sizes)), key=lambda i: abs(2 * sizes[i - 1] - sizes[-1]))
    return Batch(batch.entries[:cut]), Batch(batch.entries[cut:])


def may_overlap(overlap: Overlap, device: torch.device, node: str, nodes: Collection[str]) -> bool:
    """Whether halves are computed at all, or tried: by default where the trunk, on this device of this node, shares no
    cores with some of the experts, which are on `nodes`."""
    if overlap != "auto":
        return overlap == "on"
    return device.type != "cpu" or any(other != node for other in nodes)


def overlapped(
    whole: TrunkRunner, rows: tuple[ExpertRows, ExpertRows], overlap: Overlap, may_pay: Callable[[], bool]
) -> Runner:
    """The runner as the config wants it. `rows`: what reaches the experts, for either half; `may_pay`: whether `auto`
    is to try at this step (see `may_overlap`)."""
    if overlap == "off":
        return whole
    return OverlapRunner(whole, rows, None if overlap == "on" else may_pay)


class OverlapRunner:
    """Implements `Runner`. `may_pay`: where it says so, both ways are tried for each kind of batch and the faster one
    is kept; None: every batch that has two halves is computed so."""

    def __init__(
        self, whole: TrunkRunner, rows: tuple[ExpertRows, ExpertRows], may_pay: Callable[[], bool] | None = None
    ) -> None:
        self._whole = whole
        self._rows = rows
        self._may_pay = may_pay
        self._trials = Trials()
        self.max_context = whole.max_context
        self.eos_token_ids = whole.eos_token_ids
        self.vocab_size = whole.vocab_size
        self.num_blocks = whole.num_blocks

    def run(self, batch: Batch) -> Computed:
        """As `Runner.run`."""
        parts = halves(batch)
        if parts is None:
            return self._whole.run(batch)
        if self._may_pay is None:
            return self._both(*parts)
        return self._faster(batch, parts) if self._may_pay() else self._whole.run(batch)

    def _faster(self, batch: Batch, parts: tuple[Batch, Batch]) -> Computed:
        tokens = batch.num_tokens
        kind = batch.num_decodes == tokens, tokens.bit_length()
        overlap, began = self._trials.next(kind), time.perf_counter()
        computed = self._both(*parts) if overlap else self._whole.run(batch)
        self._trials.note(kind, overlap, (time.perf_counter() - began) / tokens)
        return computed

    def _both(self, first: Batch, second: Batch) -> Computed:
        trunk = threading.Lock()
        with ThreadPoolExecutor(1, thread_name_prefix="second-half") as other:
            later = other.submit(self._half, second, 1, trunk)
            logits, scores = self._half(first, 0, trunk)
            more_logits, more_scores = later.result()
            return Computed(torch.cat([logits, more_logits]), scores + more_scores)

    def _half(self, batch: Batch, half: int, trunk: threading.Lock) -> Computed:
        expert_rows = self._rows[half]

        def experts(layer: int, x_TD: Tensor, ids_TK: Tensor, total: Sum) -> None:
            trunk.release()
            try:
                rows_TKD = expert_rows(layer, x_TD, ids_TK)
            finally:
                trunk.acquire()
            total.of(rows_TKD)

        with trunk:
            return self._whole.compute(batch, experts, half)
