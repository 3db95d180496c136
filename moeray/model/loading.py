"""From a model's name to what an actor needs of it: checkpoint, family and the map between them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from moeray.config import Config, DType
from moeray.errors import CheckpointError, ConfigError
from moeray.model.checkpoint import Checkpoint, resolve
from moeray.model.experts import ExpertBank
from moeray.model.family import ExpertsLayer, Family, load_family
from moeray.model.generation import generation_config
from moeray.model.int8 import Int8Cache, int8_bytes
from moeray.model.slices import WeightMap
from moeray.settings.experts import Quantization

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFiles:
    """A model opened but not loaded: no weights are in memory."""

    checkpoint: Checkpoint
    family: Family
    weights: WeightMap

    def expert_counts(self) -> dict[int, int]:
        """MoE layer -> number of experts."""
        return {layer: moe.num_experts for layer, moe in self.family.layers.items()}

    def expert_bytes(self, quantization: Quantization) -> dict[int, int]:
        """MoE layer -> bytes that one of its experts takes in memory, under `experts.quantization`."""
        return {
            layer: sum(self._bytes_of(moe, parameter, quantization) for parameter in moe.shapes)
            for layer, moe in self.family.layers.items()
        }

    def _bytes_of(self, moe: ExpertsLayer, parameter: str, quantization: Quantization) -> int:
        stored = self.weights.expert_bytes(f"{moe.name}.{parameter}")
        if quantization == "none" or parameter.endswith("_bias"):
            return stored
        return min(stored, int8_bytes(moe.shapes[parameter][1:], moe.is_transposed))  # what is smaller stays as it is

    def dtype(self, asked: DType) -> torch.dtype:
        """The dtype to compute in: the one asked for, else the checkpoint's own, else bfloat16."""
        if asked != "auto":
            return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[asked]
        stored = self.checkpoint.config.dtype
        return stored if isinstance(stored, torch.dtype) and stored.is_floating_point else torch.bfloat16


def open_model(model: str, revision: str | None, *, node: str) -> ModelFiles:
    """Open a local folder or hub id on this node. Raises CheckpointError, UnsupportedModelError."""
    checkpoint = Checkpoint.open(resolve(model, revision, node=node))
    family = load_family(checkpoint.config)
    weights = WeightMap.build(family.full, checkpoint, family.expert_counts())
    log.info("opened %s: %s, %d MoE layers", model, checkpoint.config.model_type, len(family.layers))
    return ModelFiles(checkpoint, family, weights)


def open_bank(files: ModelFiles, config: Config, device: torch.device) -> ExpertBank:
    """An empty bank for experts as the config wants them. Raises ConfigError where `experts.kernel` cannot be had."""
    int8 = None
    if config.experts.quantization == "int8":
        int8 = Int8Cache.of(files.checkpoint, config.cache_folder)
    dtype = files.dtype(config.dtype)
    return ExpertBank(files.family, files.weights, dtype, device, config.experts.kernel, int8)


def pick_device(asked: str) -> torch.device:
    """`auto` is the GPU where there is one, else the CPU. Raises ConfigError for cuda without a GPU."""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for but this actor sees no GPU; set num_gpus, or device: cpu")
    return torch.device(asked)


def eos_token_ids(files: ModelFiles) -> tuple[int, ...]:
    """The tokens that end a sequence: generation_config.json's, else config.json's. Raises CheckpointError."""
    advice = generation_config(files.checkpoint.source.metadata_dir())
    eos = advice.get("eos_token_id", files.checkpoint.config.eos_token_id)
    if eos is None:
        return ()
    ids = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    if not all(type(token) is int for token in ids):
        raise CheckpointError(
            f"eos_token_id of generation_config.json or config.json must be a token id or a list of them, got {eos!r}"
        )
    return ids
