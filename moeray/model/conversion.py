"""transformers' conversion of checkpoint names to parameters, worked out by name before any tensor is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moeray.errors import CheckpointError, UnsupportedModelError
from moeray.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Recipe:
    """How one or more parameters (`targets`) are made of checkpoint tensors.

    `sources`: the converter's source pattern -> names of the tensors that match it, in the order in which they are
    merged (for experts: by expert). `converter` is None for a mere renaming.
    """

    targets: tuple[str, ...]
    sources: dict[str, tuple[str, ...]]
    converter: WeightConverter | None

    @property
    def tensors(self) -> list[str]:
        """Names of all source tensors."""
        return [key for keys in self.sources.values() for key in keys]

    @property
    def merges(self) -> bool:
        """Whether the expert dimension is made by stacking one tensor per expert."""
        return self.converter is not None and isinstance(self.converter.operations[0], MergeModulelist)

    @property
    def cat_dim(self) -> int | None:
        """The dimension of an expert's slice along which its sources lie side by side; None for any other recipe."""
        if self.converter is None:
            return 0
        match self.converter.operations:
            case [MergeModulelist(dim=0)] if len(self.sources) == 1:
                return 0
            case [MergeModulelist(dim=0), Concatenate(dim=dim)] if dim >= 1:
                return int(dim) - 1
        return None

    def run(self, tensors: Mapping[str, Tensor | list[Tensor]], model: Any) -> dict[str, Tensor]:
        """Run the operations on a tensor (or a list to merge) per source pattern: target name -> tensor."""
        if self.converter is None:
            value = next(iter(tensors.values()))
            return {self.targets[0]: value[0] if isinstance(value, list) else value}
        converter = deepcopy(self.converter)
        for pattern, value in tensors.items():
            converter.collected_tensors[pattern] = list(value) if isinstance(value, list) else [value]
        made = converter.convert(self.targets[0], model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def shapes(self, shapes: Mapping[str, list[tuple[int, ...]]], model: Any) -> dict[str, tuple[int, ...]]:
        """The targets' shapes, given those of the sources."""
        tensors = {key: [torch.empty(shape, device="meta") for shape in of] for key, of in shapes.items()}
        return {name: tuple(value.shape) for name, value in self.run(tensors, model).items()}

    def describe(self) -> str:
        return str(self.converter.operations) if self.converter else "renaming"


class OneExpertModel:
    """The model as operations see it when they convert one expert: its fused parameters have one row."""

    def __init__(self, model: PreTrainedModel, experts: Mapping[str, int]) -> None:
        self.config = model.config
        self._model = model
        self._experts = experts

    def get_parameter(self, name: str) -> Tensor:
        value: Tensor = self._model.get_parameter(name)
        return value[:1] if name in self._experts else value


class Conversion:
    """Names only. `model` has every parameter, on any device."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._names: dict[str, Tensor] = dict(model.state_dict())
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: c for c in self._converters for pattern in c.source_patterns}

    def target_of(self, key: str) -> tuple[str, str | None]:
        """(first parameter that the tensor goes into, the converter's source pattern or None)."""
        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self._names)
        if target not in self._names and key in self._names:
            target, pattern = rename_source_key(key, [], [], prefix, self._names)
        return target, pattern

    def recipes(self, keys: Iterable[str]) -> tuple[list[Recipe], list[str]]:
        """Recipes of all parameters that `keys` feed, and the keys that feed none and that the family does not
        expect to be left over."""
        sources: dict[str, dict[str, list[str]]] = {}
        unexpected: list[str] = []
        for key in sorted(keys, key=dot_natural_key):
            target, pattern = self.target_of(key)
            if target not in self._names:
                unexpected.append(key)
            elif pattern is not None:
                sources.setdefault(target, {}).setdefault(pattern, []).append(key)
            else:  # two names for one parameter: transformers takes the first
                sources.setdefault(target, {key: [key]})
        recipes = [self._recipe(target, of) for target, of in sources.items()]
        return recipes, [key for key in unexpected if not self._may_be_left(key)]

    def _recipe(self, target: str, sources: dict[str, list[str]]) -> Recipe:
        converter = self._by_pattern.get(next(iter(sources)))
        if converter is None:
            return Recipe((target,), {key: tuple(keys) for key, keys in sources.items()}, None)
        first, *others = converter.target_patterns
        targets = (target, *(target.replace(first, other) for other in others))
        ordered = {pattern: tuple(sources[pattern]) for pattern in converter.source_patterns if pattern in sources}
        return Recipe(targets, ordered, converter)

    def _may_be_left(self, key: str) -> bool:
        patterns = set(self._model._keys_to_ignore_on_load_unexpected or ())
        # buffers that older transformers versions saved
        patterns |= {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
        renamed, _ = self.target_of(key)
        return any(re.search(pattern, name) for pattern in patterns for name in (key, renamed))

    def missing(self, recipes: Iterable[Recipe]) -> list[str]:
        """Checkpoint names of the parameters that no recipe makes, less those tied to one that is there."""
        made = {target for recipe in recipes for target in recipe.targets}
        tied: dict[str, str] = getattr(self._model, "all_tied_weights_keys", None) or {}
        for target, source in tied.items():
            if target in made or source in made:
                made |= {target, source}
        ignored = self._model._keys_to_ignore_on_load_missing or ()
        lost = [n for n in self._names if n not in made and not any(re.search(pattern, n) for pattern in ignored)]
        return [self._source_name(name) for name in lost]

    def _source_name(self, parameter: str) -> str:
        """The name that the parameter has in a checkpoint, as transformers would save it."""
        mapping = get_model_conversion_mapping(self._model, add_legacy=False)
        try:
            back = [entry.reverse_transform() for entry in reversed(mapping) if not isinstance(entry, PrefixChange)]
        except (ValueError, NotImplementedError):
            return parameter  # a one-way conversion
        renamings = [entry for entry in back if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in back if isinstance(entry, WeightConverter)]
        name, _ = rename_source_key(parameter, renamings, converters, reverse=True)
        return str(name)

    def check_experts(self, recipe: Recipe, count: int, checkpoint: Checkpoint) -> None:
        """Each expert has its tensor of every source pattern. Raises CheckpointError, UnsupportedModelError."""
        if recipe.converter is None or not recipe.merges:
            if len(recipe.tensors) != 1:
                raise UnsupportedModelError(
                    f"parameter {recipe.targets[0]} is made of {len(recipe.tensors)} tensors by {recipe.describe()}; "
                    "moeray reads experts from one fused tensor or from one tensor per expert"
                )
            return
        for pattern in recipe.converter.source_patterns:
            keys = recipe.sources.get(pattern, ())
            present = set(keys)
            lost = [key for key in self._expert_keys(recipe, pattern, count) if key not in present]
            if lost or len(keys) != count:
                problem = f"tensor {lost[0]} is not in" if lost else f"{len(keys)} experts' tensors like {keys[-1]} in"
                raise CheckpointError(
                    f"{problem} {checkpoint.index_name} of model {checkpoint.source.model}, and the config wants "
                    f"{count} experts; fetch the checkpoint again, with its own config.json"
                )

    def _expert_keys(self, recipe: Recipe, pattern: str, count: int) -> list[str]:
        """The names that the experts' tensors of `pattern` should have, judged by one that is there."""
        keys = recipe.sources.get(pattern)
        if not keys:
            return [f"{recipe.targets[0]} <- {pattern}"]
        parts = keys[0].split(".")
        for place in range(len(parts) - 1, -1, -1):
            if parts[place].isdigit():
                others = [".".join([*parts[:place], str(e), *parts[place + 1 :]]) for e in range(count)]
                if self.target_of(others[-1])[0] == recipe.targets[0]:
                    return others
        return list(keys)
