"""Whether a family's trunk computes what transformers' own modules do, found out before any request is served.

Whatever a family hides (state outside the cache, tokens that see their neighbours in a packed batch, an attention that
ignores the interface) shows in a few tokens' logits. The experts are replaced by a smooth function of their input.

T tokens of a step, K experts a token, V vocabulary.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moeray.errors import CheckpointError, MoerayError, UnsupportedModelError, in_a_line
from moeray.model import attention
from moeray.model.dispatched import Sum, dispatching
from moeray.model.fusing import fuse
from moeray.model.linears import use_linear
from moeray.model.paged import Decodes, PagedCache, Span, Step
from moeray.model.recorded_steps import RecordedSteps
from moeray.model.recording import Record
from moeray.settings.engine import LinearKernel

if TYPE_CHECKING:
    from moeray.model.trunk import Trunk

log = logging.getLogger(__name__)

_Tokens = tuple[Tensor, int, int]
"""Some of a sequence's tokens: (all of them, the first, how many)."""


class SelfCheck:
    """The check of one trunk, before it serves. Its trials leave nothing behind in the trunk's own cache."""

    def __init__(self, trunk: Trunk) -> None:
        self._trunk = trunk
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, trunk.vocab_size, (21,), generator=generator).to(trunk.device)
        self._first, self._second = ids[:12], ids[12:]

    @torch.inference_mode()
    def verify(self, linear: LinearKernel) -> None:
        """Run a few tokens through the paged, packed path and through transformers' own attention, and compare.

        It also learns what each layer keeps. Before ours, not before transformers', the linear layers are made to
        compute with `linear`. Raises UnsupportedModelError.
        """
        trunk, whole = self._trunk, [(self._first, 0, 12)]
        self._trial(whole, trunk.cache)  # first of all, since a family that is refused may fail otherwise
        trunk.attend_with("eager")
        try:
            with dispatching(_stand_in):
                reference = trunk.model(input_ids=self._first.unsqueeze(0), use_cache=False).logits[0]
        finally:
            trunk.attend_with(attention.NAME)
        if not reference.isfinite().all():
            raise CheckpointError(self._what_is_not_finite())
        self._check_biases()
        use_linear(trunk.model, linear)
        if linear != "torch" and trunk.device.type == "cpu":
            fuse(trunk.model, trunk.dtype)
        alone = self._trial(whole, trunk.cache)
        self._compare(alone, reference, "its attention does not go through transformers' attention interface")
        layers = trunk.family.config.num_hidden_layers
        if len(trunk.cache.kept) != layers:
            raise UnsupportedModelError(
                f"model type {trunk.family.config.model_type!r}: {len(trunk.cache.kept)} of its {layers} layers use "
                "attention; layers with a recurrent or other state cannot be served"
            )
        packed = self._trial([(self._second, 6, 3), (self._first, 11, 1)], self._filled())
        self._compare(packed[-1:], reference[-1:], "its tokens depend on their neighbours in a packed batch")

    def _check_biases(self) -> None:
        """NaN in a gate's bias sways which experts it chooses, and shows in no logits. Raises CheckpointError."""
        for name, weight in self._trunk.model.state_dict().items():
            if weight.dim() < 2 and weight.isnan().any():
                raise CheckpointError(f"tensor {name} of the trunk holds NaN; fetch the checkpoint again")

    def _what_is_not_finite(self) -> str:
        trunk = self._trunk
        for name, weight in trunk.model.state_dict().items():
            if not weight.isfinite().all():
                return (
                    f"tensor {name} of the trunk is not finite in {trunk.dtype}; fetch the checkpoint again, or set "
                    "dtype to bfloat16 or float32"
                )
        return f"the trunk's logits are not finite: {trunk.dtype} overflows; set dtype to bfloat16 or float32"

    @torch.inference_mode()
    def repeats(self, record: Record) -> bool:
        """Whether decode steps that `record` has noted give the bits of those that are computed anew."""
        cache = self._filled()
        late, early = ([(self._second, i, 1), (self._first, i, 1)] for i in (8, 5))
        self._trial(late, cache)
        theirs = {"early": self._trial(early, cache), "late": self._trial(late, cache)}
        # By now the cache holds what these steps write to it.
        again = [("early", early), ("late", late), ("late", late), ("early", early), ("late", late)]
        steps = RecordedSteps(self._trunk.compute, record)
        try:
            with dispatching(_stand_in):
                ours = [(name, steps.run(*self._inputs(spans, cache))) for name, spans in again]
        except (RuntimeError, TypeError, ValueError) as error:
            log.warning("decode steps are computed anew each time, slower: %s", error)
            return False
        equal = all(torch.equal(logits, theirs[name]) for name, logits in ours)
        if steps.is_on and not equal:
            log.warning("decode steps are computed anew each time, slower: repeated ones gave other numbers")
        return steps.is_on and equal

    def _filled(self) -> PagedCache:
        """A cache of its own that holds both sequences up to their last tokens, two decode steps in between."""
        trunk = self._trunk
        cache = PagedCache(trunk.cache.kernel, dict(trunk.cache.kept))
        cache.allocate(64, trunk.dtype, trunk.device)
        self._trial([(self._second, 0, 5), (self._first, 0, 7)], cache)
        self._trial([(self._second, 5, 1), (self._first, 7, 4)], cache)
        return cache

    def _trial(self, spans: list[_Tokens], cache: PagedCache) -> Tensor:
        """Logits [T, V]. Raises UnsupportedModelError."""
        try:
            return self._trunk.forward(*self._inputs(spans, cache), _stand_in)
        except (MoerayError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a family's modules raise that want another cache, mask or shape
            kind = self._trunk.family.config.model_type
            raise UnsupportedModelError(
                f"model type {kind!r} does not run on moeray's cache and attention (or config.json does not fit it): "
                f"{in_a_line(error)}"
            ) from error

    def _inputs(self, spans: list[_Tokens], cache: PagedCache) -> tuple[Tensor, Tensor, Step, Tensor]:
        """A step over these tokens; sequence i owns slots 32 * i and on."""
        device = self._trunk.device
        tokens = torch.cat([ids[start : start + count] for ids, start, count in spans])
        positions = torch.cat([torch.arange(start, start + count) for _, start, count in spans]).to(device)
        rows, parts, slots = 0, [], []
        for i, (_, start, count) in enumerate(spans):
            of_sequence = torch.arange(32 * i, 32 * i + start + count, device=device)
            parts.append(Span(rows, count, start + count, of_sequence))
            slots.append(of_sequence[start:])
            rows += count
        single = [i for i, span in enumerate(parts) if span.count == 1]
        decodes = Decodes(
            torch.tensor([parts[i].start for i in single], device=device),
            torch.tensor([parts[i].context for i in single], device=device),
            torch.tensor(single, device=device)[:, None],
            32,
        )
        prefills = tuple(span for span in parts if span.count > 1)
        step = Step(cache, torch.cat(slots), decodes if single else None, prefills)
        return tokens, positions, step, torch.arange(rows, device=device)

    def _compare(self, ours: Tensor, reference: Tensor, reason: str) -> None:
        ours, reference = ours.float(), reference.float()
        error = float((ours - reference).norm() / reference.norm().clamp_min(1e-30))
        limit = 1e-3 if self._trunk.dtype == torch.float32 else 0.15
        kind = self._trunk.family.config.model_type
        log.debug("self-check of %s: relative error %.2e", kind, error)
        if not error < limit:
            raise UnsupportedModelError(
                f"model type {kind!r} would be served wrong (the self-check's logits differ by {error:.1%} from "
                f"transformers'): {reason}"
            )


def _stand_in(layer: int, x_TD: Tensor, ids_TK: Tensor, total: Sum) -> None:
    """The trial's experts: smooth in x and the same for every expert, so that no near-tie of the gate shows."""
    total.of((x_TD * 0.5).unsqueeze(1).expand(-1, ids_TK.shape[1], -1))
