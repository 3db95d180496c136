"""How the controller watches and decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime

from cronsim import CronSim, CronSimError

from moeray.errors import ConfigError
from moeray.settings.actors import check_amounts
from moeray.tree import require

_SECONDS = (
    "report_s", "silence_s", "lease_s", "orphan_s", "interval_s", "window_s", "drain_s", "idle_s", "start_s",
    "reserve_s", "slo_queue_wait_s",
)  # fmt: skip
_LEAST_S = 0.001
_MOST_VOTES, _MOST_RUNNING, _MOST_GROWTH, _MOST_BUDGET = 10_000, 1_000_000, 1e6, 1000.0
"""Beyond what anybody means, and far within what can be reckoned with."""
HEAD_NODE = "node:__internal_head__"
"""The resource that Ray gives to a cluster's head, 1 of it."""


@dataclass(frozen=True)
class ScheduleConfig:
    """A floor for a group while a time span lasts: `actors` at least, from each moment of `cron` (UTC) on for
    `duration_s` seconds. `group` is an expert group's name or `router`."""

    cron: str = ""
    group: str = "experts"
    actors: int = 1
    duration_s: float = 3600.0

    def __post_init__(self) -> None:
        _check_cron(self.cron)
        require(self.actors >= 1, "control.schedule.actors", f"must be at least 1, got {self.actors}")
        require(self.duration_s > 0, "control.schedule.duration_s", "must be above 0 seconds")


def _check_cron(expression: str) -> None:
    require(len(expression.split()) == 5, "control.schedule.cron", f"must have 5 fields, got {expression!r}")
    try:
        CronSim(expression, datetime(2000, 1, 1, tzinfo=UTC))
    except CronSimError as error:
        raise ConfigError(
            f"config key control.schedule.cron: {expression!r} is no cron expression ({error}); "
            "its fields are minute, hour, day of month, month, day of week"
        ) from error


@dataclass(frozen=True)
class ControlConfig:
    """How the controller watches and decides.

    Watching: every actor reports each `report_s` seconds; one that is silent for `silence_s` is replaced, sooner where
    a router or an endpoint that waits for it misses its answer, and a router that does not acknowledge a placement for
    `lease_s` too. An actor that hears of no controller for `orphan_s` stops.

    Deciding, every `interval_s`: each of `policies` (a shipped name, or a dotted path to one of your own) says how many
    actors and replicas it wants, and the largest wish wins. Growth is at once, by at most `max_growth` times; a shrink
    needs `shrink_votes` decisions in a row that want less. `target_utilisation` is the busy part of an actor that is
    aimed at, `slo_queue_wait_s` the p99 wait of rows at an actor, `idle_s` how long without load until the minimum;
    `slo_ttft_s` (to the first token) and `slo_tpot_s` (between tokens) are what the policy `latency` keeps to, by
    aiming at `slo_aim` of them (without them it has no opinion), and at more or less of them while more or fewer than
    `slo_attainment` of the requests keep to both. `slo_pace`: while a router's steps last longer than this part of
    `slo_tpot_s`, prompts take fewer tokens of them: what decodes keeps its pace, and prompts wait, which is right where
    the first token may come late and actors are on their way (None: they are never fewer).
    `reserve` is the part of the actors that were busy at once in the last `reserve_s` to be kept for the next burst.
    `replica_budget` bounds the replicas of hot experts beyond `experts.replicas`, as a part of all experts;
    `max_skew` is the max/mean load per actor of a layer above which experts are moved or replicated, and
    `migration_cost` what moving one expert costs, in units of the mean expert's load.
    `window_s` is the time constant of the load windows. `target_running` requests per router are aimed at.

    `warm_pool`: started, empty expert actors kept in reserve. `autoscale` false: only repair and manual commands.
    `audit_log`: a JSONL file of every decision (None: `audit/NAME.jsonl` in the cache folder). `drain_s` bounds the
    wait for what an actor that leaves still has in flight. `warm_start`: processes without a GPU are forks of a zygote
    on their node, which has imported everything; without it each imports for seconds (needed with `image_uri`).
    `start_s` gives a start up that takes longer, the system's or an actor's (another is then tried), the wait for nodes
    and for weights from a hub included; with `check_room` one is refused at once where the cluster, as it is, has no
    room for the actors: switch that off where Ray's autoscaler adds nodes for them. `resources`: custom Ray resources
    of the node that the controller runs on; by default that is the head, which is neither drained nor a spot machine.
    """

    report_s: float = 1.0
    silence_s: float = 3.0
    lease_s: float = 5.0
    orphan_s: float = 600.0
    interval_s: float = 2.0
    window_s: float = 10.0
    policies: tuple[str, ...] = (
        "target_utilisation", "latency", "hot_experts", "idle", "schedule", "queue_wait", "reserve",
    )  # fmt: skip
    target_utilisation: float = 0.6
    slo_queue_wait_s: float = 0.25
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    slo_aim: float = 0.7
    slo_pace: float | None = None
    slo_attainment: float = 0.99
    reserve: float = 0.0
    reserve_s: float = 600.0
    shrink_votes: int = 15
    max_growth: float = 2.0
    idle_s: float = 300.0
    replica_budget: float = 0.25
    max_skew: float = 1.25
    migration_cost: float = 0.02
    target_running: int = 32
    warm_pool: int = 0
    autoscale: bool = True
    schedule: tuple[ScheduleConfig, ...] = ()
    audit_log: str | None = None
    drain_s: float = 30.0
    warm_start: bool = True
    start_s: float = 600.0
    check_room: bool = True
    resources: dict[str, float] = field(default_factory=lambda: {HEAD_NODE: 0.001})

    def __post_init__(self) -> None:
        for key in _SECONDS:
            require(getattr(self, key) >= _LEAST_S, f"control.{key}", f"must be at least {_LEAST_S:g} seconds")
        for key in ("slo_ttft_s", "slo_tpot_s"):
            require(getattr(self, key) is None or getattr(self, key) > 0, f"control.{key}", "must be above 0 seconds")
        require(0 < self.slo_aim <= 1, "control.slo_aim", "must be above 0 and at most 1")
        require(self.slo_pace is None or 0 < self.slo_pace <= 1, "control.slo_pace", "must be above 0 and at most 1")
        require(0 < self.slo_attainment < 1, "control.slo_attainment", "must be above 0 and below 1")
        require(0.01 <= self.target_utilisation <= 1, "control.target_utilisation", "must be 0.01 to 1")
        require(0 <= self.reserve <= 1, "control.reserve", f"must be 0 to 1, got {self.reserve}")
        require(1 <= self.shrink_votes <= _MOST_VOTES, "control.shrink_votes", f"must be 1 to {_MOST_VOTES}")
        require(1 < self.max_growth <= _MOST_GROWTH, "control.max_growth", f"must be above 1, to {_MOST_GROWTH:g}")
        require(0 <= self.replica_budget <= _MOST_BUDGET, "control.replica_budget", f"must be 0 to {_MOST_BUDGET:g}")
        require(self.max_skew > 1, "control.max_skew", f"must be above 1, got {self.max_skew}")
        require(self.migration_cost >= 0, "control.migration_cost", "must be 0 or more")
        require(self.warm_pool >= 0, "control.warm_pool", "must be 0 or more")
        require(1 <= self.target_running <= _MOST_RUNNING, "control.target_running", f"must be 1 to {_MOST_RUNNING}")
        check_amounts(self, "control")
