"""What expert actors and routers say of themselves, as they travel and as decisions read them.

Counts are cumulative since the actor's start, so that a report that got lost loses nothing; an actor that starts again
has another `incarnation`. `at`: when it was made, in seconds of a clock of the actor's own; `metrics`: what the actor's
recorder holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from moeray.recorder import Snapshot, snapshot_from, snapshot_tree
from moeray.types import ExpertId


@dataclass(frozen=True)
class ExpertReport:
    """One expert actor at one moment.

    `rows`: rows served by each expert; `busy_s`: time spent computing; waits and service times (of a forward) are
    quantiles over the time since the last report, in seconds. `leaving`: it was told to go (SIGTERM, a spot notice).
    """

    actor_id: str
    incarnation: str
    rows: Mapping[ExpertId, int] = field(default_factory=dict)
    forwards: int = 0
    busy_s: float = 0.0
    queue_wait_p50_s: float = 0.0
    queue_wait_p99_s: float = 0.0
    service_p50_s: float = 0.0
    service_p99_s: float = 0.0
    memory_bytes: int = 0
    in_flight: int = 0
    leaving: bool = False
    at: float = 0.0
    metrics: Snapshot = field(default_factory=dict)


@dataclass(frozen=True)
class RouterReport:
    """One router at one moment.

    `prompt_tokens` are of prompts whose prefill is done, `pending_tokens` those that are still to be computed. `step_s`
    is the time spent in steps, `expert_s` that part of it in which a layer waited for expert actors. `decode_s` is what
    decoding sequences, all added up, waited for their `decode_tokens`; `prefill_tokens` were computed in steps with
    prefills, which took `prefill_s`. Of `requests` that ended with all their tokens, `late` missed an objective of
    `control.slo_*`.
    `lost`: (actor, reason) of expert actors given up since the last report, the reason being `closed`, `timeout`,
    `error` or `out_of_memory`; `orphans`: rows that wait because their expert has no replica.
    """

    actor_id: str
    incarnation: str
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    pending_tokens: int = 0
    steps: int = 0
    step_s: float = 0.0
    expert_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    requests: int = 0
    late: int = 0
    epoch: int = 0
    orphans: int = 0
    lost: tuple[tuple[str, str], ...] = ()
    leaving: bool = False
    at: float = 0.0
    metrics: Snapshot = field(default_factory=dict)


Report = ExpertReport | RouterReport


def report_tree(report: Report) -> dict[str, Any]:
    """Plain data for a frame; `report_from` is the inverse."""
    tree = {f.name: getattr(report, f.name) for f in fields(report)} | {"metrics": snapshot_tree(report.metrics)}
    if isinstance(report, ExpertReport):
        return tree | {"kind": "expert", "rows": [[*expert, count] for expert, count in report.rows.items()]}
    return tree | {"kind": "router", "lost": [list(pair) for pair in report.lost]}


def report_from(tree: Mapping[str, Any]) -> Report:
    """Raises KeyError, TypeError or ValueError for a tree that is no report."""
    plain = {key: value for key, value in tree.items() if key != "kind"} | {"metrics": snapshot_from(tree["metrics"])}
    if tree["kind"] == "expert":
        rows = {ExpertId(layer, expert): count for layer, expert, count in tree["rows"]}
        return ExpertReport(**plain | {"rows": rows})
    return RouterReport(**plain | {"lost": tuple((actor, reason) for actor, reason in tree["lost"])})
