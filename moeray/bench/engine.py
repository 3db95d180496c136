"""Prefill and decode throughput of the engine with its experts in processes of their own, and where a step's time goes.

A run is a batch of sequences of random tokens, sampled at temperature 1 without an end. Prefill is the time of a run of
one token each; decode is the time from the last sequence's first token on in a longer run. Peers do the same in turn
(`peers.py`).
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moeray.actors.cores import part
from moeray.bench.budget import StepBudget, TimedExperts, TimedRunner, TimedSampler, median_budget
from moeray.bench.environment import surroundings
from moeray.bench.expert_processes import FAR, NEAR, expert_processes
from moeray.config import Config
from moeray.dispatch.dispatcher import Dispatcher
from moeray.engine.engine import Engine
from moeray.engine.overlap import OverlapRunner
from moeray.engine.trunk_runner import TrunkRunner
from moeray.model.dispatched import ExpertRows
from moeray.model.loading import open_bank, open_model, pick_device
from moeray.model.trunk import Trunk
from moeray.settings.wire import Remote
from moeray.types import ExpertId, GenerationRequest, SamplingParams, TokenOutput

Report = Callable[[str, int, int], None]

DISTURBED = 1.5


class Times(NamedTuple):
    """Seconds from the beginning until every sequence has its first token, and until all have their last."""

    first_s: float
    total_s: float


@dataclass(frozen=True)
class Workload:
    """`batches` sequences at once, of `prompt` random tokens and then `output` more; `rounds` runs of each."""

    batches: tuple[int, ...] = (1, 8, 32)
    prompt: int = 256
    output: int = 64
    rounds: int = 3

    def prefill_rate(self, batch: int, prefill_s: float) -> float:
        """Prompt tokens per second."""
        return batch * self.prompt / prefill_s

    def decode_rate(self, batch: int, times: Times) -> float:
        """Generated tokens per second, beyond the first of each sequence."""
        return batch * self.output / (times.total_s - times.first_s)


class Contender(Protocol):
    """Something that generates: `batch` sequences of `prompt` random tokens and `output` more each."""

    def run(self, batch: int, prompt: int, output: int) -> Times: ...


class OwnEngine:
    """This project's engine over real channels, in the thread of `compute`, as a router has one for its steps."""

    def __init__(self, engine: Engine, vocab_size: int, compute: Executor) -> None:
        self._engine = engine
        self._compute = compute
        self._vocab_size = vocab_size
        self._ids = itertools.count()
        self._random = random.Random(0)

    def run(self, batch: int, prompt: int, output: int) -> Times:
        """See `Contender`."""
        return self._compute.submit(self._run, batch, prompt, output).result()

    def _run(self, batch: int, prompt: int, output: int) -> Times:
        vocab = self._vocab_size
        requests = [
            GenerationRequest(
                f"bench-{next(self._ids)}",
                tuple(self._random.randrange(vocab) for _ in range(prompt)),
                SamplingParams(max_tokens=output, temperature=1.0, seed=self._random.getrandbits(32), ignore_eos=True),
            )
            for _ in range(batch)
        ]
        began = time.perf_counter()
        waiting = {request.request_id for request in requests}
        for request in requests:
            self._engine.submit(request)
        while waiting:
            waiting -= {output.request_id for output in self._step(batch)}
        first_s = time.perf_counter() - began
        while self._engine.has_work:
            self._step(batch)
        return Times(first_s, time.perf_counter() - began)

    def _step(self, batch: int) -> list[TokenOutput]:
        return self._engine.step()


class TimedEngine(OwnEngine):
    """The same, timed. Of the last run: `budgets` of the steps that did nothing but decode, and of all steps together,
    `whole`."""

    def __init__(self, engine: Engine, runner: TimedRunner, budget: _Current, compute: Executor) -> None:
        super().__init__(engine, runner.vocab_size, compute)
        self._runner = runner
        self._budget = budget
        self.budgets: list[StepBudget] = []
        self.whole = StepBudget()

    def _run(self, batch: int, prompt: int, output: int) -> Times:
        self.budgets, self.whole = [], StepBudget()
        return super()._run(batch, prompt, output)

    def _step(self, batch: int) -> list[TokenOutput]:
        budget = self._budget.renew()
        began = time.perf_counter()
        outputs = self._engine.step()
        budget.other = time.perf_counter() - began - budget.total
        self.whole += budget
        if self._runner.decodes == batch:
            self.budgets.append(budget)
        return outputs


class _Current:
    """The budget of the step that runs."""

    def __init__(self) -> None:
        self._budget = StepBudget()

    def __call__(self) -> StepBudget:
        return self._budget

    def renew(self) -> StepBudget:
        self._budget = StepBudget()
        return self._budget


def load_trunk(config: Config) -> Trunk:
    """The config's trunk, in this process."""
    files = open_model(config.model, config.revision, node=NEAR)
    dtype, device = files.dtype(config.dtype), pick_device(config.router.device)
    return Trunk.load(files.checkpoint, files.family, files.weights, dtype, device, config.engine)


def timed_engine(config: Config, rows: ExpertRows | Dispatcher, compute: Executor) -> TimedEngine:
    """An engine in this process; `rows` reaches its experts."""
    trunk, budget = compute.submit(load_trunk, config).result(), _Current()
    runner = TimedRunner(TrunkRunner(trunk, config.engine, TimedExperts(rows, budget), ()), trunk, budget)
    return TimedEngine(Engine(config.engine, runner, TimedSampler(budget)), runner, budget, compute)


def overlapping_engine(config: Config, rows: tuple[Dispatcher, Dispatcher], compute: Executor) -> OwnEngine:
    """One that computes every batch of two sequences or more as two halves."""
    trunk = compute.submit(load_trunk, config).result()
    runner = OverlapRunner(TrunkRunner(trunk, config.engine, rows[0].combined, ()), rows)
    return OwnEngine(Engine(config.engine, runner), runner.vocab_size, compute)


@contextmanager
def own_engines(
    config: Config, actors: int, *, overlap: bool = False, remotes: Sequence[Remote] = (), local: bool = False
) -> Iterator[dict[str, OwnEngine]]:
    """Engines by name: `moeray` with `actors` expert processes of a thread each (0: with its experts in this process);
    `overlap`: another one of them that computes a batch's halves at the same time; `remotes`: others that reach
    the same processes as from another node, by these; `local`: one with its experts here."""
    with ExitStack() as stack:
        # One thread for all of them: OpenMP's threads are then no more than the cores.
        compute = stack.enter_context(ThreadPoolExecutor(1, "step-loop", lambda: part(torch.get_num_threads())))
        engines: dict[str, OwnEngine] = {}
        if actors:
            processes = stack.enter_context(expert_processes(config, actors))

            def reach(node: str, remote: Remote = "auto") -> Dispatcher:
                return stack.enter_context(processes.dispatcher(node, remote))

            engines["moeray"] = timed_engine(config, reach(NEAR), compute)
            if overlap:
                engines["overlapped"] = overlapping_engine(config, (reach(NEAR), reach(NEAR)), compute)
            for remote in remotes:
                engines[f"over {remote}"] = timed_engine(config, reach(FAR, remote), compute)
        if local or not actors:
            engines["in process" if actors else "moeray"] = timed_engine(
                config, compute.submit(in_process, config).result(), compute
            )
        yield engines


def in_process(config: Config) -> ExpertRows:
    """All experts in this process, called directly."""
    files = open_model(config.model, config.revision, node=NEAR)
    bank = open_bank(files, config, torch.device("cpu"))
    bank.load(ExpertId(layer, e) for layer, count in files.expert_counts().items() for e in range(count))

    def rows(layer: int, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
        flat = ids_TK.flatten()
        order = flat.argsort(stable=True)
        distinct, counts = torch.unique_consecutive(flat[order], return_counts=True)
        out_RD = torch.empty(len(flat), x_TD.shape[1], dtype=x_TD.dtype)
        out_RD[order] = bank.forward(layer, x_TD[order // ids_TK.shape[1]], distinct.tolist(), counts.tolist())
        return out_RD.view(*ids_TK.shape, x_TD.shape[1])

    return rows


def measure(contenders: Mapping[str, Contender], work: Workload, report: Report) -> dict[str, Any]:
    """Run all in turn, round after round. Medians for each batch and contender, and the first one's ratio to each other
    (of medians of the rounds' ratios, so that a machine that drifts changes little)."""
    total = len(work.batches) * work.rounds
    rows = []
    for i, batch in enumerate(work.batches):
        for contender in contenders.values():
            contender.run(batch, work.prompt, 9)  # warm up this shape
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        budgets: dict[str, list[StepBudget]] = {name: [] for name in contenders}
        prompts: dict[str, list[StepBudget]] = {name: [] for name in contenders}
        for n in range(work.rounds):
            report(f"batch {batch}", i * work.rounds + n, total)
            for name, contender in contenders.items():
                prefill = work.prefill_rate(batch, contender.run(batch, work.prompt, 1).total_s)
                prompts[name] += [contender.whole] if isinstance(contender, TimedEngine) else []
                decode = work.decode_rate(batch, contender.run(batch, work.prompt, work.output + 1))
                budgets[name] += contender.budgets if isinstance(contender, TimedEngine) else []
                rates[name].append((prefill, decode))
        rows.append(_row(batch, rates, budgets, prompts))
    report("done", total, total)
    return {"workload": asdict(work), "rows": rows} | surroundings()


def _row(
    batch: int,
    rates: Mapping[str, Sequence[tuple[float, float]]],
    budgets: Mapping[str, list[StepBudget]],
    prompts: Mapping[str, list[StepBudget]],
) -> dict[str, Any]:
    """`rates`: tokens per second of prompts and of decoding, round by round."""
    first = next(iter(rates))
    row: dict[str, Any] = {"batch": batch}
    for name, pairs in rates.items():
        figures: dict[str, Any] = {
            "prefill_tok_s": statistics.median(p for p, _ in pairs),
            "decode_tok_s": statistics.median(d for _, d in pairs),
        }
        if budgets[name]:
            figures["budget"] = median_budget(budgets[name])
            figures["disturbed"] = disturbed(figures["decode_tok_s"], batch, figures["budget"]["step_ms"])
        if prompts[name]:
            figures["prefill_budget"] = median_budget(prompts[name])
        if name != first:
            figures["prefill_ratio"] = _ratio(rates[first], pairs, 0)
            figures["decode_ratio"] = _ratio(rates[first], pairs, 1)
        row[name] = figures
    return row


def disturbed(decode_tok_s: float, batch: int, step_ms: float) -> bool:
    """Whether the machine changed its speed while it was measured: decoding does not go with its steps' median."""
    by_steps = 1000 * batch / step_ms
    return not by_steps / DISTURBED < decode_tok_s < by_steps * DISTURBED


def _ratio(ours: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]], which: int) -> float:
    return statistics.median(a[which] / b[which] for a, b in zip(ours, theirs, strict=True))
