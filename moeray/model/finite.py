"""Weights that are no numbers: which tensor of which file. Looked for where an output or a conversion is not finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from moeray.model.checkpoint import Checkpoint
from moeray.model.stored import StoredKeys, read_stored


def not_finite(checkpoint: Checkpoint, weights: Iterable[StoredKeys], row: int | None) -> str | None:
    """The first of these weights (of their rows `row` of dimension 0) that is not finite, by tensor and file; None
    where all are, as far as this node has their files. Nothing is fetched."""
    for stored in weights:
        if any(checkpoint.peek(key) is None for key in stored.keys):
            continue
        part = read_stored(checkpoint, stored, row)
        if part.dense(torch.float32).isfinite().all():
            continue
        scales = part.tensors[-1]
        of_scale = stored.scale is not None and scales.is_floating_point() and not scales.float().isfinite().all()
        key = stored.scale if of_scale and stored.scale is not None else stored.weight
        return f"tensor {key} in file {checkpoint.file_of(key)} is not finite"
    return None
