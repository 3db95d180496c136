"""Trunks whose caches are filled with anything, and steps of sequences that decode."""

from __future__ import annotations

import torch

from moeray.model.dispatched import summed
from moeray.model.loading import open_model
from moeray.model.paged import Decodes, Step
from moeray.model.trunk import Trunk
from moeray.settings.engine import EngineConfig

CPU = torch.device("cpu")
BLOCK, BLOCKS, VOCAB = 4, 60, 300


def load(path, dtype=torch.bfloat16, device=CPU, **engine):
    files = open_model(str(path), None, node="here")
    trunk = Trunk.load(files.checkpoint, files.family, files.weights, dtype, device, EngineConfig(**engine))
    trunk.cache.allocate(BLOCKS * BLOCK, dtype, device)
    generator = torch.Generator().manual_seed(0)
    for layer in trunk.cache.layers.values():
        for kept in (layer.k, layer.v):
            kept.copy_(torch.randn(kept.shape, generator=generator))
    return trunk


def decode_step(trunk, count, rng):
    """`count` sequences of any lengths, their blocks anywhere."""
    blocks = rng.sample(range(BLOCKS), BLOCKS)
    contexts = [rng.randint(1, BLOCK * (BLOCKS // count)) for _ in range(count)]
    tables = [[blocks.pop() for _ in range(-(-context // BLOCK))] for context in contexts]
    width = max(map(len, tables))
    slots = [table[-1] * BLOCK + (context - 1) % BLOCK for table, context in zip(tables, contexts, strict=True)]
    count_T, contexts_T, slots_T, tables_TW, ids_T = (
        torch.tensor(numbers, device=trunk.device)
        for numbers in (
            list(range(count)), contexts, slots, [table + [0] * (width - len(table)) for table in tables],
            [rng.randrange(3, VOCAB) for _ in range(count)],
        )
    )  # fmt: skip
    step = Step(trunk.cache, slots_T, Decodes(count_T, contexts_T, tables_TW, BLOCK), ())
    return ids_T, contexts_T - 1, step, count_T


@summed
def experts(layer, x_TD, ids_TK):
    """Each of them another function."""
    return x_TD.unsqueeze(1) * (1 + ids_TK.unsqueeze(-1) / 8).to(x_TD.dtype)
