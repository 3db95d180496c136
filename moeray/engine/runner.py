"""What computes a step: the protocol, and a batch packed into the tensors that any runner needs.

Shapes: T tokens of the step, S sampled entries, P rows that are scored, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moeray.engine.batch import Batch
from moeray.types import TokenLogprobs


class Computed(NamedTuple):
    """What came of a batch: logits of the entries that sample, in order, and the log probabilities of what follows each
    row that is scored (`Entry.scored`), entry by entry."""

    logits_SV: Tensor
    scores: list[TokenLogprobs]


class Runner(Protocol):
    """Computes batches over a KV cache of `num_blocks` blocks. Owned by the engine's thread."""

    max_context: int
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    num_blocks: int

    def run(self, batch: Batch) -> Computed:
        """Write the KV of the batch's tokens and return what they lead to.

        Raises MoerayError where the step could not be computed; running the same tokens again is then allowed.
        """
        ...


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A batch's entries laid end to end.

    `token_ids_T`, `position_ids_T`, `slots_T`: int64 [T]; the slot of a token is where its KV goes in the cache.
    `query_starts`: entry i is rows query_starts[i] to query_starts[i + 1]. `context_lens`: tokens of entry i that
    attention sees, this step's included; their KV is in `block_tables[i]`.
    `sample_index_S`: int64 [S], the last row of each entry that samples. `scored_P`: int64 [P], the rows that are
    scored; `next_tokens` are the prompt's tokens behind them, and `counts` the alternatives to report beside each.
    """

    token_ids_T: Tensor
    position_ids_T: Tensor
    slots_T: Tensor
    query_starts: list[int]
    context_lens: list[int]
    block_tables: list[list[int]]
    sample_index_S: Tensor
    scored_P: Tensor
    next_tokens: list[int]
    counts: list[int]


def pack(batch: Batch, block_size: int) -> PackedBatch:
    """Lay the entries of a batch end to end, in order. Tensors are on the CPU."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    scored: list[int] = []
    next_tokens: list[int] = []
    counts: list[int] = []
    for entry in batch.entries:
        if wanted := entry.scored:
            row = len(tokens) - entry.start
            scored += range(wanted.start + row, wanted.stop + row)
            next_tokens += entry.seq.tokens[wanted.start + 1 : wanted.stop + 1]
            counts += [entry.seq.sampling.prompt_logprobs or 0] * len(wanted)
        span = range(entry.start, entry.start + entry.count)
        table = entry.seq.block_table
        tokens += entry.seq.tokens[span.start : span.stop]
        positions += span
        slots += [table[p // block_size] * block_size + p % block_size for p in span]
    starts = list(accumulate((entry.count for entry in batch.entries), initial=0))
    return PackedBatch(
        token_ids_T=torch.tensor(tokens, dtype=torch.int64),
        position_ids_T=torch.tensor(positions, dtype=torch.int64),
        slots_T=torch.tensor(slots, dtype=torch.int64),
        query_starts=starts,
        context_lens=[entry.start + entry.count for entry in batch.entries],
        block_tables=[list(entry.seq.block_table) for entry in batch.entries],
        sample_index_S=torch.tensor(
            [end - 1 for end, entry in zip(starts[1:], batch.entries, strict=True) if entry.samples], dtype=torch.int64
        ),
        scored_P=torch.tensor(scored, dtype=torch.int64),
        next_tokens=next_tokens,
        counts=counts,
    )
