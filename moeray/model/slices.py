"""Which checkpoint tensors make up which parameter: the trunk's, and each expert's slice of a fused parameter.

transformers knows how a family's checkpoint names map to its parameters (renamings, and converters that merge,
concatenate or transpose). The same operations run here on one expert's tensors alone.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moeray.errors import CheckpointError, UnsupportedModelError
from moeray.model.checkpoint import Checkpoint, dtype_of
from moeray.model.conversion import Conversion, OneExpertModel, Recipe
from moeray.model.expert_tensor import ExpertTensor
from moeray.model.finite import not_finite
from moeray.model.formats import Plain, StoredWeight
from moeray.model.lazy_tensor import LazyTensor
from moeray.model.stored import (
    StoredKeys,
    check_floating,
    estimated_bytes,
    logical_weights,
    read_stored,
    stored_shape,
)

log = logging.getLogger(__name__)

_LAYER = re.compile(r"\.(\d+)\.")


class WeightMap:
    """The recipe of every parameter. Reads no weight file until one is asked for. Thread-safe."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: PreTrainedModel,
        stored: dict[str, StoredKeys],
        trunk: dict[str, Recipe],
        experts: dict[str, Recipe],
        counts: Mapping[str, int],
    ) -> None:
        self._checkpoint = checkpoint
        state = model.state_dict()
        self._shapes = {name: tuple(value.shape) for name, value in state.items()}
        self._floating = {name for name, value in state.items() if value.is_floating_point()}
        self._buffers = {name for name, _ in model.named_buffers()}
        self._stored = stored
        self._trunk = trunk
        self._experts = experts
        self._counts = dict(counts)
        self._model = OneExpertModel(model, counts)
        self._bytes: dict[str, int] = {}

    @classmethod
    def build(cls, meta_model: PreTrainedModel, checkpoint: Checkpoint, expert_params: Mapping[str, int]) -> WeightMap:
        """`meta_model` has every parameter on the meta device; `expert_params` maps the fused ones to their number of
        experts. Raises CheckpointError for a parameter or an expert without a tensor."""
        stored = logical_weights(checkpoint.keys(), checkpoint.quantization)
        conversion = Conversion(meta_model)
        recipes, unexpected = conversion.recipes(stored)
        trunk: dict[str, Recipe] = {}
        experts: dict[str, Recipe] = {}
        for recipe in recipes:
            targets = [target for target in recipe.targets if target in expert_params]
            if not targets:
                trunk[recipe.targets[0]] = recipe
            experts.update(dict.fromkeys(targets, recipe))
        missing = conversion.missing(recipes)
        if missing:
            more = f" (nor are {len(missing) - 1} more)" if len(missing) > 1 else ""
            others = f", or one with transformers' names: this holds {unexpected[0]}" if unexpected else ""
            raise CheckpointError(
                f"tensor {missing[0]} is not in {checkpoint.index_name} of model {checkpoint.source.model}{more}; "
                f"fetch the checkpoint again{others}"
            )
        for name, recipe in experts.items():
            conversion.check_experts(recipe, expert_params[name], checkpoint)
        if unexpected:
            log.warning("%d checkpoint tensors have no use in the model, such as %s", len(unexpected), unexpected[0])
        return cls(checkpoint, meta_model, stored, trunk, experts, expert_params)

    def trunk_state_dict(self, dtype: torch.dtype = torch.float32) -> dict[str, LazyTensor]:
        """Checkpoint name -> lazy tensor, for `from_pretrained(None, state_dict=...)`. Quantised weights are decoded
        to `dtype`. Reads the headers of the trunk's files. Raises CheckpointError for a shape that does not fit."""
        state: dict[str, LazyTensor] = {}
        for name, recipe in self._trunk.items():
            self._check_trunk(recipe)
            for key in recipe.tensors:
                state[key] = self._lazy(key, dtype, own=name in self._buffers)
        return state

    def _lazy(self, key: str, dtype: torch.dtype, own: bool) -> LazyTensor:
        """`own`: not a view of the file, since families set parts of their buffers anew when they have been loaded."""
        stored = self._stored[key]
        plain = self._checkpoint.info(stored.weight).dtype
        return LazyTensor(
            stored_shape(self._checkpoint, stored),
            plain if stored.scale is None else dtype,
            lambda: read_stored(self._checkpoint, stored),
            key,
            own,
        )

    def expert(self, name: str, expert: int) -> ExpertTensor:
        """Expert `expert`'s slice of the fused parameter `name`. Raises CheckpointError."""
        recipe = self._experts[name]
        stored, row = self._sources(recipe, expert)
        if row is not None:
            self._check_rows(recipe, name)
        for of_pattern in stored.values():
            check_floating(self._checkpoint, of_pattern)
        weights = {pattern: read_stored(self._checkpoint, keys, row) for pattern, keys in stored.items()}
        cat_dim = recipe.cat_dim
        if cat_dim is not None:
            tensor = ExpertTensor(tuple(weights.values()), cat_dim)
        else:
            tensor = ExpertTensor((Plain(self._run(recipe, name, weights)),))
        if not tensor.fits(self._shapes[name][1:]):
            self._refuse_shape(recipe, name, expert)
        return tensor

    def not_finite(self, name: str, expert: int) -> str | None:
        """What of that slice is no number, if anything is: see `finite.not_finite`."""
        stored, row = self._sources(self._experts[name], expert)
        return not_finite(self._checkpoint, stored.values(), row)

    def _sources(self, recipe: Recipe, expert: int) -> tuple[dict[str, StoredKeys], int | None]:
        """An expert's weights by their patterns, and which row of each is the expert's; None where that is all."""
        stored = {p: self._stored[keys[expert] if recipe.merges else keys[0]] for p, keys in recipe.sources.items()}
        return stored, None if recipe.merges else expert

    def _run(self, recipe: Recipe, name: str, weights: Mapping[str, StoredWeight]) -> Tensor:
        """Any chain of operations, on one expert's tensors."""
        tensors = {pattern: _plain(weight) for pattern, weight in weights.items()}
        if not recipe.merges:
            tensors = {pattern: tensor.unsqueeze(0) for pattern, tensor in tensors.items()}
        try:
            made = recipe.run(tensors, self._model)[name]
        except (ValueError, RuntimeError, IndexError, KeyError) as error:
            raise UnsupportedModelError(
                f"parameter {name}: transformers' conversion {recipe.describe()} does not work on one expert alone "
                f"({' '.join(str(error).split())[:160]})"
            ) from error
        if made.shape[0] != 1:
            raise UnsupportedModelError(
                f"parameter {name}: transformers' conversion {recipe.describe()} mixes experts, so they cannot be "
                "placed one by one"
            )
        return made[0]

    def _check_rows(self, recipe: Recipe, name: str) -> None:
        stored = self._stored[recipe.tensors[0]]
        shape = stored_shape(self._checkpoint, stored)
        if not shape or shape[0] != self._counts[name]:
            raise CheckpointError(
                f"tensor {stored.weight} {list(shape)} in file {self._checkpoint.file_of(stored.weight)} is not of the "
                f"{self._counts[name]} experts that the config wants; use the checkpoint's own config.json"
            )

    def _refuse_shape(self, recipe: Recipe, name: str, expert: int) -> None:
        keys = [k[expert] if recipe.merges else k[0] for k in recipe.sources.values()]
        found = ", ".join(f"{key} {list(stored_shape(self._checkpoint, self._stored[key]))}" for key in keys)
        file = self._checkpoint.file_of(self._stored[keys[0]].weight)
        raise CheckpointError(
            f"tensor {found} in file {file} does not fit the config, which wants {list(self._shapes[name][1:])} for "
            f"an expert of {name}; use the config.json that belongs to the checkpoint"
        )

    def _check_trunk(self, recipe: Recipe) -> None:
        """Run the recipe on meta tensors and compare shapes."""
        shapes = {
            pattern: [stored_shape(self._checkpoint, self._stored[key]) for key in keys]
            for pattern, keys in recipe.sources.items()
        }
        key = recipe.tensors[0]
        file = self._checkpoint.file_of(self._stored[key].weight)
        try:
            made = recipe.shapes(shapes, self._model)
        except (ValueError, RuntimeError, IndexError) as error:
            raise CheckpointError(
                f"tensor {key} {list(next(iter(shapes.values()))[0])} in file {file} does not fit the config "
                f"({' '.join(str(error).split())[:160]}); use the config.json that belongs to the checkpoint"
            ) from error
        if made.keys() & self._floating:
            for name in recipe.tensors:
                check_floating(self._checkpoint, self._stored[name])
        for target, shape in made.items():
            if target in self._shapes and shape != self._shapes[target]:
                raise CheckpointError(
                    f"tensor {key} in file {file} gives {target} the shape {list(shape)}, but the config wants "
                    f"{list(self._shapes[target])}; use the config.json that belongs to the checkpoint"
                )

    def expert_bytes(self, name: str) -> int:
        """Stored bytes of one expert's slice: exact where its file is at hand, else from the config's shapes."""
        if name not in self._bytes:
            recipe = self._experts[name]
            keys = [k[0] for k in recipe.sources.values()]
            exact = self._peek(keys)
            if exact is not None:
                self._bytes[name] = exact if recipe.merges else exact // self._counts[name]
            else:
                shape = list(self._shapes[name][1:])
                if recipe.cat_dim is not None:  # alike sources side by side, each with scales of its own
                    shape[recipe.cat_dim] //= len(keys)
                    self._bytes[name] = len(keys) * self._estimate(keys[0], tuple(shape))
                else:
                    self._bytes[name] = self._estimate(keys[0], tuple(shape))
        return self._bytes[name]

    def trunk_bytes(self) -> int:
        """Stored bytes of the trunk: exact where its files are at hand, else from the config's shapes."""
        total = 0
        for recipe in self._trunk.values():
            exact = self._peek(recipe.tensors)
            shapes = [self._shapes[target] for target in recipe.targets if target in self._shapes]
            total += sum(self._estimate(recipe.tensors[0], s) for s in shapes) if exact is None else exact
        return total

    def _peek(self, logical: Iterable[str]) -> int | None:
        infos = [self._checkpoint.peek(key) for name in logical for key in self._stored[name].keys]
        known = [info.nbytes for info in infos if info is not None]
        return sum(known) if len(known) == len(infos) else None

    def _estimate(self, key: str, shape: tuple[int, ...]) -> int:
        block = self._checkpoint.quantization.block
        return estimated_bytes(shape, self._stored[key].scheme, block, dtype_of(self._checkpoint.config))

    def files_for_trunk(self) -> set[str]:
        """Names of the weight files that hold the trunk."""
        return self._files_of(key for recipe in self._trunk.values() for key in recipe.tensors)

    def files_for_experts(self, experts: Mapping[int, Collection[int]]) -> set[str]:
        """Names of the weight files that hold the given experts: layer -> experts of it."""
        keys: set[str] = set()
        for name, recipe in self._experts.items():
            found = _LAYER.search(name)
            wanted = experts.get(int(found[1]) if found else 0, ())
            for of_pattern in recipe.sources.values():
                keys.update((of_pattern[e] for e in wanted) if recipe.merges else of_pattern[: len(wanted)])
        return self._files_of(keys)

    def _files_of(self, logical: Iterable[str]) -> set[str]:
        return {self._checkpoint.file_of(key) for name in logical for key in self._stored[name].keys}


def _plain(weight: StoredWeight) -> Tensor:
    return weight.tensor if isinstance(weight, Plain) else weight.dense(torch.float32)
