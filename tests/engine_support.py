"""A real runner for engine tests: a tiny model of hashes, computed through a paged cache as a trunk would.

The next token depends on every token and position of the context as read back from the cache, so a wrong slot, a stale
block or a wrong position changes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeray.engine.runner import pack
from moeray.engine.scheduler import Batch

VOCAB = 97
_PRIME = (1 << 31) - 1


class HashRunner:
    """Implements `Runner`. `spans` records the tokens of each step: (prefill tokens, decode tokens)."""

    def __init__(self, num_blocks: int, block_size: int, max_context: int = 512, eos: tuple[int, ...] = ()) -> None:
        self.num_blocks, self.max_context, self.vocab_size, self.eos_token_ids = num_blocks, max_context, VOCAB, eos
        self._block_size = block_size
        self._kv = [0] * (num_blocks * block_size)
        self.spans: list[tuple[int, int]] = []

    def run(self, batch: Batch) -> Tensor:
        packed = pack(batch, self._block_size)
        for token, position, slot in zip(
            packed.token_ids_T.tolist(), packed.position_ids_T.tolist(), packed.slots_T.tolist(), strict=True
        ):
            self._kv[slot] = (token * 1_000_003 + position * 7_919 + 1) % _PRIME
        decodes = sum(entry.count for entry in batch.entries if entry.count == 1 and entry.start > 0)
        self.spans.append((len(packed.token_ids_T) - decodes, decodes))
        rows = [
            self._logits(packed.block_tables[i], packed.context_lens[i])
            for i, entry in enumerate(batch.entries)
            if entry.samples
        ]
        return torch.stack(rows) if rows else torch.empty(0, VOCAB)

    def _logits(self, table: list[int], context: int) -> Tensor:
        state = 17
        for position in range(context):
            slot = table[position // self._block_size] * self._block_size + position % self._block_size
            state = (state * 31 + self._kv[slot]) % _PRIME
        return torch.randn(VOCAB, generator=torch.Generator().manual_seed(state)) * 3
