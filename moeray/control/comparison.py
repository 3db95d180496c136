"""The elastic system beside the best static one and the oracle, at one SLO."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from moeray.config import Config
from moeray.control.cost import Costs
from moeray.control.elastic import ElasticRun
from moeray.control.fixed import FixedRuns, best_static, default_slo
from moeray.control.oracle import best_oracle
from moeray.control.outcome import ATTAINED, Outcome, Slo
from moeray.control.popularity import MoeShape
from moeray.control.trace import Trace
from moeray.control.world import World
from moeray.errors import SimulationError

MOST_ROUTERS = 1024
"""Each costs time at every request and step."""

Report = Callable[[str, int, int], None]
"""(what is done, units done, units in all)"""


@dataclass(frozen=True, eq=False)
class Comparison:
    slo: Slo
    elastic: Outcome
    static: Outcome
    oracle: Outcome
    token_bound: float

    @property
    def outcomes(self) -> tuple[Outcome, Outcome, Outcome]:
        return self.elastic, self.static, self.oracle

    def saved(self, outcome: Outcome) -> float:
        """The part of the static system's actor-hours that it does without."""
        return 1 - outcome.actor_hours / self.static.actor_hours

    def to_tree(self) -> dict[str, Any]:
        """Plain data.

        Savings compare like with like only where `slo_met`: the static system and the oracle always meet the SLO, the
        elastic one may not. `oracle_token_bound_ratio`: what would be saved if actors were needed in proportion to
        tokens in and out and nothing else mattered.
        """
        elastic, static, oracle = (outcome.summary() for outcome in self.outcomes)
        keys = ("actor_hours", "node_hours", "router_hours", "cost", "slo_attainment")
        return (
            elastic
            | {f"static_{key}": static[key] for key in keys}
            | {f"oracle_{key}": oracle[key] for key in keys}
            | {
                "static_actors": static["actors_max"],
                "actor_hours_saved_ratio": self.saved(self.elastic),
                "oracle_saved_ratio": self.saved(self.oracle),
                "oracle_token_bound_ratio": self.token_bound,
                "node_hours_saved_ratio": 1 - elastic["node_hours"] / static["node_hours"],
                "slo": asdict(self.slo),
                "slo_met": self.elastic.attainment >= ATTAINED,
                "static": static,
                "oracle": oracle,
            }
        )


def compare(
    world: World, slo: Slo | None, *, slo_factor: float, warm_start: bool, interval_s: float, seed: int, report: Report
) -> Comparison:
    """Search the static system and the oracle, and run the elastic one.

    `slo` None: `slo_factor` times the p99 of a system with all the actors that may be. `warm_start`: the elastic system
    begins with the actors of the static one, else with those of the config. Raises SimulationError where the SLO is out
    of reach, and for more than `MOST_ROUTERS`.
    """
    if (routers := world.config.router.actors) > MOST_ROUTERS:
        raise SimulationError(
            f"{routers} routers are more than the {MOST_ROUTERS} that a simulation goes through in reasonable time; "
            "lower --routers (router.actors of the config), or simulate a part of the load with --scale"
        )
    runs = FixedRuns(_unpaced(world))
    report("best static placement", 0, 1)
    slo = slo or default_slo(runs, slo_factor)
    static = best_static(runs, slo)
    if world.config.control.slo_pace is not None:
        runs, static = _cheaper(FixedRuns(_aware(world, slo)), slo, runs, static)
    report("best static placement", 1, 1)
    oracle = best_oracle(runs, slo, static, interval_s, report)
    actors = max(sample.actors for sample in static.curve)
    start = world.mix(actors) if warm_start else {name: group.actors for name, group in world.groups.items()}
    duration = math.ceil(static.end_s)
    elastic = ElasticRun(_aware(world, slo), start, seed).run(
        slo, lambda now: report("elastic", min(int(now), duration), duration)
    )
    return Comparison(slo, elastic, static, oracle, token_bound(world.trace, interval_s))


def _unpaced(world: World) -> World:
    """With prefill chunks that are never cut."""
    return replace(world, config=replace(world.config, control=replace(world.config.control, slo_pace=None)))


def _cheaper(paced: FixedRuns, slo: Slo, plain: FixedRuns, static: Outcome) -> tuple[FixedRuns, Outcome]:
    """The static system that does with fewest actors, its steps cut to `control.slo_pace` or not: whatever the elastic
    one needs, it is measured by the best there is."""
    try:
        cut = best_static(paced, slo)
    except SimulationError:  # it misses the SLO with any number of actors
        return plain, static
    return (paced, cut) if cut.actor_hours < static.actor_hours else (plain, static)


def _aware(world: World, slo: Slo) -> World:
    """The elastic system knows the SLO that it is judged by, unless its config names another."""
    control = world.config.control
    told = replace(
        control,
        slo_ttft_s=(slo.ttft_s or None) if control.slo_ttft_s is None else control.slo_ttft_s,
        slo_tpot_s=(slo.tpot_s or None) if control.slo_tpot_s is None else control.slo_tpot_s,
    )
    return replace(world, config=replace(world.config, control=told))


def token_bound(trace: Trace, interval_s: float) -> float:
    """1 - mean/peak of the tokens per second that come in an interval.

    The last interval has what is left of the trace with it: looked at alone, that would have too few tokens as they
    are, and scaled by its length a single request in its last instant would be the peak.
    """
    whole = max(1, math.floor(trace.duration_s / interval_s))
    edges = np.append(np.arange(whole) * interval_s, max(trace.duration_s, 1e-9))
    tokens = np.histogram(trace.arrival_s, edges, weights=(trace.prompt + trace.output).astype(np.float64))[0]
    mean, peak = tokens.sum() / edges[-1], (tokens / np.diff(edges)).max()
    return max(0.0, float(1 - mean / peak))  # not below it by a rounding error


def routers_for(trace: Trace, config: Config, costs: Costs, shape: MoeShape) -> int:
    """How many routers a trace needs so that they are busy for half of the time in its busiest minute: with trunks,
    hops and attention, and with what they wait for experts at the least."""
    edges = np.arange(math.floor(trace.duration_s / 60) + 2) * 60.0
    chunk = min(config.engine.prefill_chunk, config.engine.max_batch_tokens)
    copies = shape.layers / costs.trunk_layers
    trunk = float(np.interp(chunk, costs.trunk_tokens, costs.trunk_s)) * copies
    forward = costs.forward_s + costs.expert_s + costs.row_s * chunk * shape.top_k / shape.experts
    step = trunk + shape.layers * (costs.hop_s + costs.hop_row_s * chunk * shape.top_k + forward)
    prompt, output = trace.prompt.astype(np.float64), trace.output.astype(np.float64)
    seen = costs.prefill_context_s * prompt**2 / 2 + costs.decode_context_s * output * (prompt + output / 2)
    busy = np.histogram(trace.arrival_s, edges, weights=(prompt + output) * step / chunk + copies * seen)[0]
    seconds = min(60.0, max(trace.duration_s, 1.0))
    return max(1, math.ceil(2 * float(busy.max()) / seconds - 1e-9))
