"""The trunk: everything of the model but its experts, loaded from the same files and run by transformers' modules.

Shapes: T tokens of a step (several sequences packed), D hidden size, K experts a token, V vocabulary, S sampled rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeray.errors import CheckpointError, ConfigError, UnsupportedModelError
from moeray.model import attention, kernels
from moeray.model.bars import without_bars
from moeray.model.checkpoint import Checkpoint
from moeray.model.family import Family, is_experts, model_class, without_experts
from moeray.model.fusing import fuse
from moeray.model.kernels import combine
from moeray.model.kernels.attention import DTYPES as NATIVE_DTYPES
from moeray.model.latent import is_latent, keep_latents
from moeray.model.linears import choose_linear, use_linear
from moeray.model.paged import Decodes, PagedCache, PassThroughCache, Span, Step, attending
from moeray.model.slices import WeightMap
from moeray.settings.engine import EngineConfig, Kernel, LinearKernel

log = logging.getLogger(__name__)

EXPERTS = "moeray_dispatched"

ExpertRows = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, x [T, D], expert ids [T, K]) -> each chosen expert's output, unweighted [T, K, D]."""

Seconds = Callable[[float], None]
"""Takes a duration."""

_expert_rows: ContextVar[ExpertRows] = ContextVar("moeray_expert_rows")
_on_combine: ContextVar[Seconds] = ContextVar("moeray_on_combine")


def unheard(seconds: float) -> None:
    """Nobody wants to know."""


@contextmanager
def dispatching(expert_rows: ExpertRows, on_combine: Seconds = unheard) -> Iterator[None]:
    """Within the block, the modules' experts are `expert_rows`; `on_combine` hears how long each layer's sum took."""
    rows_token, combine_token = _expert_rows.set(expert_rows), _on_combine.set(on_combine)
    try:
        yield
    finally:
        _expert_rows.reset(rows_token)
        _on_combine.reset(combine_token)


def _experts(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """transformers' experts interface: send rows out, weigh and sum what comes back in the order of k."""
    x_TD = x.reshape(-1, x.shape[-1])
    ids_TK = ids.reshape(x_TD.shape[0], -1)
    rows_TKD = _expert_rows.get()(module.moeray_layer, x_TD, ids_TK)
    began = time.perf_counter()
    if module.has_post_expert_norm:
        rows_TKD = module.post_expert_norm(rows_TKD)
    out = combine(rows_TKD, weights.reshape(ids_TK.shape)).to(x.dtype).reshape(x.shape)
    _on_combine.get()(time.perf_counter() - began)
    return out


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts)


def attends_natively(asked: Kernel, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether decoding sequences attend with the kernel in C. Raises ConfigError where it was asked for in vain."""
    can = device.type == "cpu" and dtype in NATIVE_DTYPES and kernels.available()
    if asked == "native" and not can:
        raise ConfigError(
            f"config key engine.attention: the native kernel was asked for, which computes fp32 and bf16 on the CPU "
            f"where it was compiled, but this is {dtype} on {device}; set it to auto"
        )
    return can and asked != "torch"


class Trunk:
    """A loaded trunk. Not thread-safe: the router's step loop owns it.

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
        engine = config or EngineConfig()
        native = attends_natively(engine.attention, dtype, device)
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
        trunk = cls(model.eval().requires_grad_(False), family, dtype, device)
        trunk.cache.native = native
        trunk._use(attention.NAME, EXPERTS)
        trunk.verify(linear)
        return trunk

    @torch.inference_mode()
    def forward(
        self, token_ids_T: Tensor, position_ids_T: Tensor, step: Step, sample_index_S: Tensor, expert_rows: ExpertRows,
        on_combine: Seconds = unheard,
    ) -> Tensor:  # fmt: skip
        """One step over packed sequences: logits [S, V] of the rows `sample_index_S`, in the trunk's dtype or
        fp32."""
        with attending(step), dispatching(expert_rows, on_combine):
            out = self.model(
                input_ids=token_ids_T.unsqueeze(0),
                position_ids=position_ids_T.unsqueeze(0),
                past_key_values=PassThroughCache(),
                use_cache=True,
                logits_to_keep=sample_index_S,
            )
        logits: Tensor = out.logits[0]
        return logits if logits.shape[0] == sample_index_S.shape[0] else logits[sample_index_S]

    def _use(self, attention_name: str, experts_name: str | None) -> None:
        for module in self.model.modules():
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig):
                config._attn_implementation = attention_name
                config._experts_implementation = experts_name

    @torch.inference_mode()
    def verify(self, linear: LinearKernel = "torch") -> None:
        """Run a few tokens through the paged, packed path and through transformers' own attention, and compare.

        Whatever a family hides (state outside the cache, tokens that see their neighbours in a packed batch, an
        attention that ignores the interface) shows here, before any request is served. The experts are replaced by
        a smooth function of their input and their weights. It also learns what each layer keeps. Before ours, not
        before transformers', the linear layers are made to compute with `linear`.
        Raises UnsupportedModelError.
        """
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.vocab_size, (21,), generator=generator).to(self.device)
        first, second = ids[:12], ids[12:]
        self._trial([(first, 0, 12)], self.cache)  # first of all, since a family that is refused may fail otherwise
        self._use("eager", EXPERTS)
        try:
            with dispatching(_stand_in):
                reference = self.model(input_ids=first.unsqueeze(0), use_cache=False).logits[0]
        finally:
            self._use(attention.NAME, EXPERTS)
        use_linear(self.model, linear)
        if linear != "torch" and self.device.type == "cpu":
            fuse(self.model, self.dtype)
        alone = self._trial([(first, 0, 12)], self.cache)
        self._compare(alone, reference, "its attention does not go through transformers' attention interface")
        layers = self.family.config.num_hidden_layers
        if len(self.cache.kept) != layers:
            raise UnsupportedModelError(
                f"model type {self.family.config.model_type!r}: {len(self.cache.kept)} of its {layers} layers use "
                "attention; layers with a recurrent or other state cannot be served"
            )
        paged = PagedCache(self.cache.native, dict(self.cache.kept))
        paged.allocate(64, self.dtype, self.device)
        self._trial([(second, 0, 5), (first, 0, 7)], paged)
        self._trial([(second, 5, 1), (first, 7, 4)], paged)
        packed = self._trial([(second, 6, 3), (first, 11, 1)], paged)
        self._compare(packed[-1:], reference[-1:], "its tokens depend on their neighbours in a packed batch")

    def _trial(self, spans: list[tuple[Tensor, int, int]], cache: PagedCache) -> Tensor:
        """Logits [T, V] of `(tokens, start, count)` spans; sequence i owns slots 32 * i and on."""
        tokens = torch.cat([ids[start : start + count] for ids, start, count in spans])
        positions = torch.cat([torch.arange(start, start + count) for _, start, count in spans]).to(self.device)
        rows, parts, slots = 0, [], []
        for i, (_, start, count) in enumerate(spans):
            of_sequence = torch.arange(32 * i, 32 * i + start + count, device=self.device)
            parts.append(Span(rows, count, start + count, of_sequence))
            slots.append(of_sequence[start:])
            rows += count
        single = [i for i, span in enumerate(parts) if span.count == 1]
        decodes = Decodes(
            torch.tensor([parts[i].start for i in single], device=self.device),
            tuple(parts[i].context for i in single),
            torch.tensor(single)[:, None],
            32,
        )
        prefills = tuple(span for span in parts if span.count > 1)
        step = Step(cache, torch.cat(slots), decodes if single else None, prefills)
        return self.forward(tokens, positions, step, torch.arange(rows, device=self.device), _stand_in)

    def _compare(self, ours: Tensor, reference: Tensor, reason: str) -> None:
        ours, reference = ours.float(), reference.float()
        error = float((ours - reference).norm() / reference.norm().clamp_min(1e-30))
        limit = 1e-3 if self.dtype == torch.float32 else 0.15
        log.debug("self-check of %s: relative error %.2e", self.family.config.model_type, error)
        if not error < limit:
            raise UnsupportedModelError(
                f"model type {self.family.config.model_type!r} would be served wrong (the self-check's logits differ "
                f"by {error:.1%} from transformers'): {reason}"
            )


def _stand_in(layer: int, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
    """The trial's experts: smooth in x and the same for every expert, so that no near-tie of the gate shows."""
    return (x_TD * 0.5).unsqueeze(1).expand(-1, ids_TK.shape[1], -1)


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
