"""The engine's runner over a real trunk: sizes the KV cache, turns a batch into a step, returns logits."""

from __future__ import annotations

import logging
from itertools import pairwise

import psutil
import torch
from torch import Tensor

from moeray.engine.batch import Batch
from moeray.engine.runner import Computed, PackedBatch, pack
from moeray.engine.sampling import report_logprobs
from moeray.errors import ConfigError
from moeray.model.dispatched import Experts, Seconds, unheard
from moeray.model.paged import Decodes, Span, Step
from moeray.model.scoring import Scored
from moeray.model.trunk import Trunk
from moeray.settings.engine import EngineConfig
from moeray.types import TokenLogprobs

log = logging.getLogger(__name__)


class TrunkRunner:
    """Implements `Runner`. Owned by the step loop; `compute` may run for two halves at the same time."""

    def __init__(
        self, trunk: Trunk, config: EngineConfig, experts: Experts, eos_token_ids: tuple[int, ...],
        on_combine: Seconds = unheard,
    ) -> None:  # fmt: skip
        self._trunk = trunk
        self._on_combine = on_combine
        self._block_size = config.block_size
        self._experts = experts
        self.eos_token_ids = eos_token_ids
        self.vocab_size = trunk.vocab_size
        self.num_blocks = self._count_blocks(config)
        slots = self.num_blocks * config.block_size
        self.max_context = longest_context(config.max_context, trunk.max_context, slots)
        trunk.cache.allocate(slots, trunk.dtype, trunk.device)
        log.info(
            "KV cache: %d blocks of %d tokens, context up to %d", self.num_blocks, self._block_size, self.max_context
        )

    def _count_blocks(self, config: EngineConfig) -> int:
        if config.kv_blocks:
            return config.kv_blocks
        per_block = self._trunk.cache.bytes_per_slot(self._trunk.dtype) * config.block_size
        room = int(min(config.kv_cache_bytes, config.kv_cache_fraction * self._free_bytes()))
        if room < per_block:
            raise ConfigError(
                f"config key engine.kv_cache_bytes: {room} bytes are left for the KV cache but one block needs "
                f"{per_block}; free memory or raise engine.kv_cache_fraction"
            )
        wanted = -(-(config.max_context or self._trunk.max_context) // config.block_size) * config.max_running
        return min(room // per_block, wanted)

    def _free_bytes(self) -> int:
        if self._trunk.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self._trunk.device)[0])
        return int(psutil.virtual_memory().available)

    def run(self, batch: Batch) -> Computed:
        """As `Runner.run`."""
        return self.compute(batch, self._experts)

    def compute(self, batch: Batch, experts: Experts, half: int = 0) -> Computed:
        """The same, with these experts. `half`: see `Trunk.forward`."""
        packed = pack(batch, self._block_size)
        device = self._trunk.device
        scores: list[TokenLogprobs] = []

        def take(first: int, logits_RV: Tensor) -> None:
            part = slice(first, first + len(logits_RV))
            scores.extend(report_logprobs(logits_RV.float(), packed.next_tokens[part], packed.counts[part]))

        logits = self._trunk.forward(
            packed.token_ids_T.to(device),
            packed.position_ids_T.to(device),
            self._step(packed),
            packed.sample_index_S.to(device),
            experts,
            self._on_combine,
            half,
            Scored(packed.scored_P.to(device), take) if packed.next_tokens else None,
        )
        return Computed(logits, scores)

    def _step(self, packed: PackedBatch) -> Step:
        starts, device = packed.query_starts, self._trunk.device
        counts = [end - start for start, end in pairwise(starts)]
        single = [i for i, count in enumerate(counts) if count == 1]
        return Step(
            self._trunk.cache,
            packed.slots_T.to(device),
            self._decodes(packed, single) if single else None,
            tuple(self._span(packed, i) for i, count in enumerate(counts) if count > 1),
        )

    def _decodes(self, packed: PackedBatch, entries: list[int]) -> Decodes:
        tables = [packed.block_tables[i] for i in entries]
        longest, device = max(map(len, tables)), self._trunk.device
        return Decodes(
            torch.tensor([packed.query_starts[i] for i in entries], device=device),
            torch.tensor([packed.context_lens[i] for i in entries], device=device),
            torch.tensor([table + [0] * (longest - len(table)) for table in tables], device=device),
            self._block_size,
        )

    def _span(self, packed: PackedBatch, i: int) -> Span:
        start, end, context = packed.query_starts[i], packed.query_starts[i + 1], packed.context_lens[i]
        table = torch.tensor(packed.block_tables[i][: -(-context // self._block_size)])
        slots = (table[:, None] * self._block_size + torch.arange(self._block_size)).flatten()[:context]
        return Span(start, end - start, context, slots.to(self._trunk.device))


def longest_context(asked: int, own: int, slots: int) -> int:
    """The longest sequence: the one asked for, else the model's `own` as far as the cache's `slots` go. Raises
    ConfigError where one was asked for that cannot be had."""
    if asked > own:
        raise ConfigError(
            f"config key engine.max_context: {asked} tokens are more than the model's {own}; lower it, or leave it out"
        )
    if asked > slots:
        raise ConfigError(
            f"config key engine.max_context: {asked} tokens do not fit the KV cache of {slots}; lower it, or raise "
            "engine.kv_cache_bytes (or engine.kv_blocks)"
        )
    return asked or min(own, slots)
