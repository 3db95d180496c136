"""The trunk: everything of the model but its experts, loaded from the same files and run by transformers' modules.

Shapes: T tokens of a step (several sequences packed), D hidden size, K experts a token, V vocabulary, S sampled rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moeray.errors import CheckpointError
from moeray.model import attention, dispatched
from moeray.model.attention_kernels import choose_attention
from moeray.model.bars import without_bars
from moeray.model.building import BUILDING
from moeray.model.checkpoint import Checkpoint
from moeray.model.dispatched import Experts, Seconds, dispatching, unheard
from moeray.model.family import Family, is_experts, model_class, without_experts
from moeray.model.graphs import capturing
from moeray.model.latent import is_latent, keep_latents
from moeray.model.linears import choose_linear
from moeray.model.paged import PagedCache, PassThroughCache, Step, attending
from moeray.model.recorded_steps import RecordedSteps
from moeray.model.recording import Memory, Record, record
from moeray.model.scoring import Scored, computed_once, keep_output
from moeray.model.selfcheck import SelfCheck
from moeray.model.slices import WeightMap
from moeray.settings.engine import EngineConfig

HALVES = 2
"""So many steps may be computed at the same time."""


class Trunk:
    """A loaded trunk. The router's step loop owns it; at most two threads compute, each its own half.

    `max_context`: the longest sequence for which the family's positions are exact.
    """

    def __init__(self, model: PreTrainedModel, family: Family, dtype: torch.dtype, device: torch.device) -> None:
        self.model = model
        self.family = family
        self.dtype = dtype
        self.device = device
        self.max_context = max_context(family.config)
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self.cache = PagedCache()
        self._decoding: list[RecordedSteps] = []

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        family: Family,
        weights: WeightMap,
        dtype: torch.dtype,
        device: torch.device,
        config: EngineConfig | None = None,
    ) -> Trunk:
        """Read the trunk's tensors and no others. Raises CheckpointError, ConfigError, UnsupportedModelError."""
        with BUILDING:
            return cls._load(checkpoint, family, weights, dtype, device, config or EngineConfig())

    @classmethod
    def _load(
        cls, checkpoint: Checkpoint, family: Family, weights: WeightMap, dtype: torch.dtype, device: torch.device,
        engine: EngineConfig,
    ) -> Trunk:  # fmt: skip
        kernel = choose_attention(engine.attention, dtype, device)
        linear = choose_linear(engine.linear, dtype, device)
        trunk_class = without_experts(model_class(checkpoint.config))
        with without_bars():
            model, info = trunk_class.from_pretrained(
                None,
                config=checkpoint.config,
                state_dict=weights.trunk_state_dict(dtype),
                dtype=dtype,
                device_map={"": str(device)} if device.type != "cpu" else None,
                output_loading_info=True,
            )
        for kind in ("missing_keys", "mismatched_keys"):
            if info[kind]:
                raise CheckpointError(
                    f"tensor {sorted(map(str, info[kind]))[0]} of the trunk could not be loaded "
                    f"({kind.replace('_', ' ')}); the checkpoint does not fit its config.json"
                )
        names = {moe.name: moe.layer for moe in family.layers.values()}
        for name, module in model.named_modules():
            if is_experts(module):
                module.moeray_layer = names[name]
            if is_latent(module):
                keep_latents(module, attention.NAME)
        keep_output(model)
        trunk = cls(model.eval().requires_grad_(False), family, dtype, device)
        trunk.cache.kernel = kernel
        trunk.attend_with(attention.NAME)
        check = SelfCheck(trunk)
        check.verify(linear)
        can_record = kernel == ("native" if device.type == "cpu" else "triton")
        if can_record and not engine.eager and check.repeats(_recording(device)):
            trunk._decoding = [RecordedSteps(trunk.compute, _recording(device)) for _ in range(HALVES)]
        return trunk

    @torch.inference_mode()
    def forward(
        self, token_ids_T: Tensor, position_ids_T: Tensor, step: Step, sample_index_S: Tensor, experts: Experts,
        on_combine: Seconds = unheard, half: int = 0, scored: Scored | None = None,
    ) -> Tensor:  # fmt: skip
        """One step over packed sequences: logits [S, V] of the rows `sample_index_S`, in the trunk's dtype or
        fp32. Those of the rows of `scored` go to its `take`, before this returns. Of steps that are computed at the
        same time, by two threads, each is another `half`, 0 or 1."""
        with dispatching(experts, on_combine):
            if scored is not None:
                return self._scored(token_ids_T, position_ids_T, step, sample_index_S, scored)
            if self._decoding and step.cache is self.cache:
                return self._decoding[half].run(token_ids_T, position_ids_T, step, sample_index_S)
            return self.compute(token_ids_T, position_ids_T, step, sample_index_S)

    def compute(self, token_ids_T: Tensor, position_ids_T: Tensor, step: Step, sample_index_S: Tensor) -> Tensor:
        """The same by the modules, within `dispatching`."""
        with attending(step):
            out = self.model(
                input_ids=token_ids_T.unsqueeze(0),
                position_ids=position_ids_T.unsqueeze(0),
                past_key_values=PassThroughCache(),
                use_cache=True,
                logits_to_keep=sample_index_S,
            )
        logits: Tensor = out.logits[0]
        return logits if logits.shape[0] == sample_index_S.shape[0] else logits[sample_index_S]

    def _scored(
        self, token_ids_T: Tensor, position_ids_T: Tensor, step: Step, sample_index_S: Tensor, scored: Scored
    ) -> Tensor:
        with computed_once():
            logits = self.compute(token_ids_T, position_ids_T, step, sample_index_S)
            for first, rows_R in scored.pieces(self.vocab_size):
                scored.take(first, self.compute(token_ids_T, position_ids_T, step, rows_R))
        return logits

    def attend_with(self, name: str) -> None:
        """Have the modules call the attention of this name, and the experts that are dispatched."""
        for module in self.model.modules():
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig):
                config._attn_implementation = name
                config._experts_implementation = dispatched.NAME


def _recording(device: torch.device) -> Record:
    return partial(record, memory=Memory()) if device.type == "cpu" else capturing(device)


def max_context(config: PreTrainedConfig) -> int:
    """The longest context whose positions do not depend on the other sequences of a batch.

    `dynamic` and `longrope` positions change once any sequence of the batch passes the original length, so these
    families end there.
    """
    longest = int(getattr(config, "max_position_embeddings", 0) or 1 << 20)
    for rope in _rope_parameters(config):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            longest = min(longest, int(original or longest))
    return longest


def _rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]
