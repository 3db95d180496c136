"""Steps that do nothing but decode are recorded, once for each number of sequences, and repeated from then on.

T sequences, each with one token of the step; W blocks of a table.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moeray.model.paged import Decodes, Step
from moeray.model.recording import Record, Recording, UnrepeatableError

log = logging.getLogger(__name__)

_KEPT = 32
"""Recordings, the latest used ones. One takes some kilobytes for each operation of the step."""

Logits = Callable[[Tensor, Tensor, Step, Tensor], Tensor]
"""(token ids [T], position ids [T], the step, the rows that sample [S]) -> logits [S, V]."""


@dataclass(frozen=True)
class _Inputs:
    """What a recording reads of a step; written anew before each repetition."""

    token_ids_T: Tensor
    position_ids_T: Tensor
    slots_T: Tensor
    contexts_T: Tensor
    tables_TW: Tensor

    @classmethod
    def allocate(cls, count: int, width: int, device: torch.device) -> _Inputs:
        numbers_T = torch.zeros(4, count, dtype=torch.int64, device=device)
        tables_TW = torch.zeros(count, width, dtype=torch.int64, device=device)
        return cls(numbers_T[0], numbers_T[1], numbers_T[2], numbers_T[3], tables_TW)

    def write(self, token_ids_T: Tensor, position_ids_T: Tensor, step: Step, decodes: Decodes) -> None:
        self.token_ids_T.copy_(token_ids_T)
        self.position_ids_T.copy_(position_ids_T)
        self.slots_T.copy_(step.slots_T)
        self.contexts_T.copy_(decodes.contexts_B)
        self.tables_TW[:, : decodes.tables_BW.shape[1]].copy_(decodes.tables_BW)

    def step(self, like: Step, rows_T: Tensor, block_size: int) -> Step:
        return Step(like.cache, self.slots_T, Decodes(rows_T, self.contexts_T, self.tables_TW, block_size), ())


class RecordedSteps:
    """Computes logits with `compute`, or by repeating what it did in a like step, noted by `record`. For one cache, for
    one thread at a time. `is_on`: until a step is found that cannot be repeated."""

    def __init__(self, compute: Logits, record: Record) -> None:
        self._compute = compute
        self._record = record
        self._known: OrderedDict[int, tuple[_Inputs, Recording]] = OrderedDict()
        self._last = 0
        self.is_on = True

    def run(self, token_ids_T: Tensor, position_ids_T: Tensor, step: Step, sample_index_S: Tensor) -> Tensor:
        """Logits [S, V]. A number of sequences that comes a second time in succession is recorded."""
        count, last = len(token_ids_T), self._last
        decodes = step.decodes
        if decodes is None or step.prefills or len(sample_index_S) != count or not self.is_on:
            self._last = 0
            return self._compute(token_ids_T, position_ids_T, step, sample_index_S)
        self._last = count
        known = self._known.get(count)
        if known is not None:
            self._known.move_to_end(count)
            inputs, recording = known
            inputs.write(token_ids_T, position_ids_T, step, decodes)
            return recording.repeat().clone()
        if last != count:
            return self._compute(token_ids_T, position_ids_T, step, sample_index_S)
        return self._recorded(token_ids_T, position_ids_T, step, decodes)

    def _recorded(self, token_ids_T: Tensor, position_ids_T: Tensor, step: Step, decodes: Decodes) -> Tensor:
        blocks = max(len(layer.k) for layer in step.cache.layers.values()) // decodes.block_size
        inputs = _Inputs.allocate(len(token_ids_T), blocks, token_ids_T.device)
        inputs.write(token_ids_T, position_ids_T, step, decodes)
        rows_T = torch.arange(len(token_ids_T), device=token_ids_T.device)

        def compute() -> Tensor:
            like = inputs.step(step, rows_T, decodes.block_size)  # anew: it keeps what was worked out of its inputs
            return self._compute(inputs.token_ids_T, inputs.position_ids_T, like, rows_T)

        try:
            recording = self._record(compute)
        except UnrepeatableError as error:
            log.warning("decode steps are computed anew each time, slower: %s", error)
            self.is_on = False
            return self._compute(token_ids_T, position_ids_T, step, rows_T)
        self._known[len(token_ids_T)] = inputs, recording
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return recording.result.clone()
