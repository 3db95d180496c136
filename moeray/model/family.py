"""What a model family is to moeray: a trunk, and experts that answer transformers' experts interface.

Nothing here knows a family by name. A family is accepted when its causal language model has experts of the interface
and refused, with the reason, when it needs what moeray does not have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moeray.errors import UnsupportedModelError, in_a_line
from moeray.model.building import BUILDING

_LAYER_IN_NAME = re.compile(r"\.(\d+)\.")
_EXPERT_STATE = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")


@dataclass(frozen=True)
class ExpertsLayer:
    """The experts of one MoE layer, as the family's own module describes them.

    `shapes`: fused parameter name (within the module) -> shape, the expert dimension first.
    `module`: the family's experts module without its parameters; it still owns the activation.
    """

    layer: int
    name: str
    module: nn.Module
    num_experts: int
    shapes: dict[str, tuple[int, ...]]

    @property
    def up_name(self) -> str:
        return "gate_up_proj" if self.module.has_gate else "up_proj"

    @property
    def is_transposed(self) -> bool:
        return bool(self.module.is_transposed)

    def parameters(self) -> tuple[str, ...]:
        """Full names of the fused parameters."""
        return tuple(f"{self.name}.{parameter}" for parameter in self.shapes)

    def activate(self, up_RI: Tensor) -> Tensor:
        """Gate (or activate) the up projection's output: [R, 2I] or [R, I] -> [R, I]."""
        module: Any = self.module
        out_RI: Tensor = module._apply_gate(up_RI) if module.has_gate else module.act_fn(up_RI)
        return out_RI


@dataclass(frozen=True)
class Family:
    """A model on the meta device: `full` has every parameter (shapes only), `layers` its MoE layers by index."""

    config: PreTrainedConfig
    full: PreTrainedModel
    layers: dict[int, ExpertsLayer]

    def expert_counts(self) -> dict[str, int]:
        """Full name of each fused expert parameter -> number of experts."""
        return {name: moe.num_experts for moe in self.layers.values() for name in moe.parameters()}


def is_experts(module: nn.Module) -> bool:
    """Whether the module answers transformers' experts interface (its decorator leaves these attributes)."""
    return all(hasattr(module, name) for name in _EXPERT_STATE) and hasattr(module, "num_experts")


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The family's causal language model. Raises UnsupportedModelError."""
    for part in ("vision_config", "audio_config", "text_config", "thinker_config"):
        if getattr(config, part, None) is not None:
            raise UnsupportedModelError(
                f"model type {config.model_type!r} is multimodal (its config has {part}); moeray serves text only"
            )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"model type {config.model_type!r} is an encoder-decoder; moeray serves decoders")
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise UnsupportedModelError(f"model type {config.model_type!r} has no causal language model in transformers")
    found = mapping[type(config)]
    cls: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return cls


def load_family(config: PreTrainedConfig) -> Family:
    """Build the family on the meta device (no memory) and find its experts. Raises UnsupportedModelError."""
    cls = model_class(config)
    config._experts_implementation = None
    try:
        with BUILDING, torch.device("meta"):
            full = cls._from_config(config)
    except MemoryError:
        raise
    except Exception as error:  # whatever the family raises for values that it did not expect
        raise UnsupportedModelError(
            f"model type {config.model_type!r} cannot be built by its config.json: {in_a_line(error)}"
        ) from error
    if index := next((name for name, _ in full.named_modules() if name.rpartition(".")[2] == "indexer"), None):
        raise UnsupportedModelError(
            f"model type {config.model_type!r} has an index that chooses what each token attends to ({index}), which "
            "moeray does not have; give a model of another family"
        )
    layers: dict[int, ExpertsLayer] = {}
    for name, module in full.named_modules():
        if not is_experts(module):
            continue
        moe = _experts_layer(config, name, module, len(layers))
        if moe.layer in layers:
            raise UnsupportedModelError(
                f"model type {config.model_type!r} has two sets of experts in layer {moe.layer} "
                f"({layers[moe.layer].name} and {name}); moeray dispatches one set a layer"
            )
        layers[moe.layer] = moe
    if not layers:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} has no experts of transformers' experts interface; "
            "a dense Llama-like checkpoint can be made into one by `moeray upcycle`"
        )
    return Family(config, full, layers)


def _experts_layer(config: PreTrainedConfig, name: str, module: Any, ordinal: int) -> ExpertsLayer:
    found = _LAYER_IN_NAME.search(name)
    shapes = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
    count = int(module.num_experts)
    odd = [key for key, shape in shapes.items() if shape[0] != count]
    if odd or not shapes:
        raise UnsupportedModelError(
            f"model type {config.model_type!r}: {name}.{odd[0] if odd else '*'} is not a fused tensor of "
            f"{count} experts, so its experts cannot be placed one by one"
        )
    return ExpertsLayer(int(found[1]) if found else ordinal, name, module, count, shapes)


def without_experts(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass whose experts own no parameters, so that loading it reads and allocates the trunk alone.

    It keeps the class's name and module, by which transformers looks up checkpoint conversions.
    """

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        for module in self.modules():
            if is_experts(module):
                for key in [key for key, _ in module.named_parameters(recurse=False)]:
                    delattr(module, key)
                module._is_hf_initialized = True  # nothing is left for transformers to initialise

    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})
