"""A tiny runner whose logits follow from a sequence's whole history, read through a real paged cache array.

The KV of a token is a hash of the KV before it, the token and its position; logits are drawn from a hash of the whole
context, gathered slot by slot. A wrong slot, a stale block, a wrong position or order changes every token from there.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from moeray.engine.batch import Batch
from moeray.engine.engine import Engine
from moeray.engine.runner import Computed, pack
from moeray.engine.sampler import Sampler
from moeray.engine.sampling import report_logprobs
from moeray.engine.sequence import Sequence
from moeray.errors import MoerayError
from moeray.types import FinishReason, GenerationRequest, TokenLogprobs, TokenOutput

VOCAB = 29
EOS = 0
_MASK = (1 << 61) - 1


def _mix(*values: int) -> int:
    h = 0x1234567
    for value in values:
        h = ((h ^ value) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) & _MASK
        h ^= h >> 29
    return h


def _kv(before: int, token: int, position: int) -> int:
    return _mix(before, token, position)


def _logits(context: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(_mix(*context))
    return torch.randn(VOCAB, generator=generator) * 2.0


class HistoryRunner:
    """Fails with MoerayError in step `n` for each n of `fail_at`, half-way through writing the step's KV.

    `poison`: the logits of a context that holds this token are NaN.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_context: int,
        fail_at: frozenset[int] = frozenset(),
        poison: int = -1,
    ) -> None:
        self.num_blocks = num_blocks
        self.max_context = max_context
        self.eos_token_ids: tuple[int, ...] = (EOS,)
        self.vocab_size = VOCAB
        self.batches: list[Batch] = []
        self._block_size = block_size
        self._kv = [-1] * (num_blocks * block_size)
        self._fail_at = fail_at
        self._poison = poison

    def run(self, batch: Batch) -> Computed:
        packed = pack(batch, self._block_size)
        self.batches.append(batch)
        ids, positions, slots = (x.tolist() for x in (packed.token_ids_T, packed.position_ids_T, packed.slots_T))
        fails = len(self.batches) in self._fail_at
        contexts, scores = [], []
        for i, context_len in enumerate(packed.context_lens):
            table = packed.block_tables[i]
            for row in range(packed.query_starts[i], packed.query_starts[i + 1]):
                before = self._kv[self._slot(table, positions[row] - 1)] if positions[row] else 0
                self._kv[slots[row]] = _kv(before, ids[row], positions[row])
                if fails:
                    raise MoerayError("the expert actors are gone; start them again")
            contexts.append([self._kv[self._slot(table, p)] for p in range(context_len)])
            entry = batch.entries[i]
            for place in entry.scored:
                logits = self._row(entry.seq, contexts[i][: place + 1])
                count = entry.seq.sampling.prompt_logprobs
                scores += report_logprobs(logits[None], [entry.seq.tokens[place + 1]], [count])
        rows = [self._row(entry.seq, c) for entry, c in zip(batch.entries, contexts, strict=True) if entry.samples]
        return Computed(torch.stack(rows) if rows else torch.empty(0, VOCAB), scores)

    def _slot(self, table: list[int], position: int) -> int:
        return table[position // self._block_size] * self._block_size + position % self._block_size

    def _row(self, seq: Sequence, context: list[int]) -> Tensor:
        return torch.full((VOCAB,), torch.nan) if self._poison in seq.tokens else _logits(context)


def alone(request: GenerationRequest, max_context: int) -> tuple[list[int], FinishReason]:
    """What a request generates with no engine, no batch and no cache."""
    seq = Sequence(request, (EOS,))
    while (reason := seq.ended(max_context)) is None:
        context: list[int] = []
        for position, token in enumerate(seq.tokens):
            context.append(_kv(context[-1] if context else 0, token, position))
        seq.append(Sampler().sample(_logits(context)[None], [seq])[0].token_id)
    return seq.output_ids[len(request.output_ids) :], reason


def scores_alone(request: GenerationRequest) -> list[TokenLogprobs]:
    """The log probabilities of a prompt's tokens with no engine, no batch and no cache."""
    context: list[int] = []
    scores = []
    for position, (token, following) in enumerate(pairwise(request.prompt_ids)):
        context.append(_kv(context[-1] if context else 0, token, position))
        scores += report_logprobs(_logits(context)[None], [following], [request.sampling.prompt_logprobs or 0])
    return scores


class Collected:
    """The outputs of an engine, by request."""

    def __init__(self) -> None:
        self.scores: dict[str, list[TokenLogprobs]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}

    def take(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            assert output.request_id not in self.reasons, f"{output.request_id} goes on after its end"
            self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            self.scores.setdefault(output.request_id, []).extend(output.prompt_logprobs)
            if output.finish_reason is not None:
                self.reasons[output.request_id] = output.finish_reason


def drain(engine: Engine, limit: int = 5000) -> Collected:
    """Step until there is no work, checking the block accounts after each step."""
    collected = Collected()
    for _ in range(limit):
        if not engine.has_work:
            return collected
        collected.take(engine.step())
        engine.check()
    raise AssertionError(f"the engine has work left after {limit} steps: {engine.stats()}")
