"""Where the time of a step goes, part by part.

The parts of the modules are read off by hooks on each MoE block, so the measured code is the code that serves. Hooks
and clocks cost some microseconds per layer; `other` holds the scheduler's part of the step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from moeray.dispatch.dispatcher import Dispatcher
from moeray.engine.batch import Batch
from moeray.engine.runner import Computed, Runner
from moeray.engine.sampler import Sampler
from moeray.engine.sampling import SampledToken
from moeray.engine.sequence import Sequence
from moeray.model.dispatched import ExpertRows, Sum, summed
from moeray.model.recording import perform
from moeray.model.trunk import Trunk

_now = time.perf_counter


@dataclass
class StepBudget:
    """Seconds of one step.

    `experts`: computing of the slowest actor of each layer; `dispatch`: all else between handing a layer's rows over
    and having their outputs; `gate`: from a MoE block's begin to its experts, shared experts included; `combine`: the
    weighted sum; `trunk`: the rest of the model.
    """

    trunk: float = 0.0
    gate: float = 0.0
    dispatch: float = 0.0
    experts: float = 0.0
    combine: float = 0.0
    sampling: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(getattr(self, part) for part in PARTS))

    def __add__(self, other: StepBudget) -> StepBudget:
        """Of both steps."""
        return StepBudget(*(getattr(self, part) + getattr(other, part) for part in PARTS))


PARTS = tuple(f.name for f in fields(StepBudget))


def median_budget(steps: list[StepBudget]) -> dict[str, Any]:
    """Milliseconds of each part and of the whole (medians), and what dispatching takes of a step (`tax`)."""
    parts: dict[str, Any] = {
        f"{part}_ms": 1e3 * statistics.median(getattr(step, part) for step in steps) for part in PARTS
    }
    parts["step_ms"] = 1e3 * statistics.median(step.total for step in steps)
    parts["tax"] = statistics.median(step.dispatch / step.total for step in steps)
    return parts


class TimedExperts:
    """A dispatcher (or experts in this process, which dispatch nothing) that adds its times to a budget."""

    def __init__(self, rows: ExpertRows | Dispatcher, budget: Callable[[], StepBudget]) -> None:
        self._dispatcher = rows if isinstance(rows, Dispatcher) else None
        self._experts = rows.combined if isinstance(rows, Dispatcher) else summed(rows)
        self._budget = budget

    def __call__(self, layer: int, x_TD: Tensor, ids_TK: Tensor, total: Sum) -> None:
        began = _now()
        self._experts(layer, x_TD, ids_TK, total)
        took = _now() - began - total.seconds
        compute = took if self._dispatcher is None else self._dispatcher.slowest_compute_s
        budget = self._budget()
        budget.experts += compute
        budget.dispatch += took - compute


class TimedSampler(Sampler):
    """The sampler, timed."""

    def __init__(self, budget: Callable[[], StepBudget]) -> None:
        self._budget = budget

    def sample(self, logits: Tensor, seqs: list[Sequence]) -> list[SampledToken]:
        """As `Sampler.sample`."""
        began = _now()
        tokens = super().sample(logits, seqs)
        self._budget().sampling += _now() - began
        return tokens


class TimedRunner:
    """A `Runner` whose modules' parts are timed. `decodes`: whether the last batch did nothing but decode."""

    def __init__(self, runner: Runner, trunk: Trunk, budget: Callable[[], StepBudget]) -> None:
        self._runner = runner
        self._budget = budget
        self.max_context = runner.max_context
        self.eos_token_ids = runner.eos_token_ids
        self.vocab_size = runner.vocab_size
        self.num_blocks = runner.num_blocks
        self.decodes = 0
        self._block_began = self._experts_began = self._moe_s = 0.0
        for layer in trunk.family.layers.values():
            block = trunk.model.get_submodule(layer.name.rpartition(".")[0])
            block.register_forward_pre_hook(lambda *_: perform(self._enter_block))
            experts = trunk.model.get_submodule(layer.name)
            experts.register_forward_pre_hook(lambda *_: perform(self._enter_experts))
            experts.register_forward_hook(lambda *_: perform(self._leave_experts))

    def run(self, batch: Batch) -> Computed:
        """As `Runner.run`."""
        self.decodes = batch.num_decodes if batch.num_decodes == batch.num_tokens else 0
        budget, self._moe_s = self._budget(), 0.0
        began = _now()
        computed = self._runner.run(batch)
        budget.trunk = _now() - began - self._moe_s
        return computed

    def _enter_block(self) -> None:
        self._block_began = _now()

    def _enter_experts(self) -> None:
        self._experts_began = _now()
        self._budget().gate += self._experts_began - self._block_began
        self._dispatched = self._budget().dispatch + self._budget().experts

    def _leave_experts(self) -> None:
        now, budget = _now(), self._budget()
        budget.combine += now - self._experts_began - (budget.dispatch + budget.experts - self._dispatched)
        self._moe_s += now - self._block_began
