"""Autoscaling: what is wanted and why, what it saves, and whether the objectives are kept."""

from __future__ import annotations

from functools import partial

from moeray.dashboards.common import EVENTS, IN_GROUP, RED, SYSTEM, YELLOW, objective
from moeray.dashboards.grafana import Dashboard, Row, Variable
from moeray.dashboards.panels import Panel, Query
from moeray.dashboards.promql import ENDPOINTS, gauge, increase, quantile, rate

STEP_S = 15
GROUP = Variable("group", "Group", f"label_values(moeray_actors_desired{{{ENDPOINTS}}}, group)", every=True)
LATE, ENDED = "moeray_slo_late_requests_total", "moeray_slo_requests_total"
AIM = gauge("moeray_slo_attainment_objective_ratio", fold="max")
WANTED = gauge("moeray_actors_desired")
MOST = gauge("moeray_actors_limit", where='bound="max"')
READY = gauge("moeray_actors", ("group",), where='kind="expert", state="ready"')
RUNNING = rate("moeray_actor_seconds_total")
COST = f"{rate('moeray_actor_cost_total')} * 3600"


def span(function: str, actors: str) -> str:
    """A function of PromQL over the dashboard's range."""
    return f"{function}(({actors})[$__range:{STEP_S}s])"


def late(over: str) -> str:
    """The part of the requests that missed an objective."""
    return f"({increase(LATE, over=over)} or vector(0)) / ({increase(ENDED, over=over)} > 0)"


HOURS = f"{STEP_S} / 3600"
USED = f"{increase('moeray_actor_seconds_total', over='$__range')} / 3600"
AT_PEAK = f"{span('max_over_time', WANTED)} * {span('count_over_time', WANTED)} * {HOURS}"
AT_MOST = f"{span('sum_over_time', MOST)} * {HOURS}"

NUMBER = partial(Panel, kind="stat", unit="none", width=4, height=4)

NOW = Row(
    "Now",
    (
        NUMBER(
            "Autoscaling", "Does the controller scale by itself, or was it paused?",
            (Query(gauge("moeray_autoscaling_enabled", fold="max")),), texts=((0, "paused"), (1, "on")),
        ),
        NUMBER("Actors wanted", "How many actors does the controller want in all?", (Query(WANTED),)),
        NUMBER(
            "Objectives kept", "Which part of the requests in the range met the objectives?",
            (Query(f"1 - {late('$__range')}"),), unit="percentunit", decimals=2,
        ),
        NUMBER("Cost per hour", "What do the actors cost at the moment, per hour?", (Query(COST),), decimals=2),
        NUMBER(
            "Saved", "Which part of the actor-hours of a static fleet of the peak's size was not needed, in the range?",
            (Query(f"1 - ({USED}) / ({AT_PEAK} > 0)"),), unit="percentunit", decimals=0,
        ),
        NUMBER(
            "Decisions", "How often did the controller scale, in the range?",
            (Query(increase("moeray_decisions_total", over="$__range")),), decimals=0,
        ),
    ),
)  # fmt: skip

ACTORS = Row(
    "Wanted and there",
    (
        Panel(
            "Actors of $group", "Are there as many actors as are wanted, and within which limits?",
            (
                Query(gauge("moeray_actors_desired", ("group",), where=IN_GROUP), "{{group}} wanted"),
                Query(gauge("moeray_actors", ("group",), where=f'{IN_GROUP}, state="ready"'), "{{group}} ready"),
                *(
                    Query(
                        gauge("moeray_actors_limit", ("group",), where=f'{IN_GROUP}, bound="{bound}"'),
                        f"{bound}_actors", True,
                    )
                    for bound in ("max", "min")
                ),
            ),
            unit="none", width=24, repeat="group",
        ),
        Panel(
            "Decisions", "When did the controller decide to scale which group, and in which direction?",
            (Query(increase("moeray_decisions_total", ("group", "direction")), "{{group}} {{direction}}"),),
            "bars", "none",
        ),
        Panel(
            "Plans", "Which changes of the placement were made, and did they succeed?",
            (Query(increase("moeray_plans_total", ("kind", "result")), "{{kind}} {{result}}"),), "bars", "none",
        ),
        Panel(
            "Migrations", "How many replicas of experts were mapped on an actor or dropped from one?",
            (Query(increase("moeray_migrations_total", ("change",)), "{{change}}"),), "bars", "none",
        ),
    ),
)  # fmt: skip

REASONS = Row(
    "What it goes by",
    (
        Panel(
            "Busy", "How busy is the average actor of each group? The aim is control.target_utilisation.",
            (
                Query(f"{rate('moeray_expert_busy_seconds_total', ('group',))} / on (group) {READY}", "{{group}}"),
            ),
            unit="percentunit", axis_max=1.0,
        ),
        Panel(
            "Wait of rows", "How long do 99 of 100 forwards wait at an actor at most, and is the objective met?",
            (
                Query(quantile(0.99, "moeray_expert_queue_wait_seconds", ("group",)), "{{group}}"),
                objective("queue_wait"),
            ),
            unit="s",
        ),
        Panel(
            "Requests", "How many requests run in the routers, and how many wait?",
            (
                Query(gauge("moeray_num_requests_running"), "running"),
                Query(gauge("moeray_num_requests_waiting"), "waiting"),
            ),
            unit="none", stacked=True,
        ),
    ),
)  # fmt: skip

SAVING = Row(
    "What it saves",
    (
        Panel(
            "Actor-hours in the range",
            "How many actor-hours were used, and how many would a static fleet have needed: of the size that was "
            "wanted at the peak, or of the largest size that the config allows?",
            (Query(USED, "used"), Query(AT_PEAK, "static at the peak"), Query(AT_MOST, "static at max_actors")),
            "bargauge", "h", decimals=2,
        ),
        Panel(
            "Actors", "How many actors live, and how many might there be?",
            (Query(RUNNING, "living"), Query(WANTED, "wanted"), Query(MOST, "max_actors", True)), unit="none",
        ),
        Panel(
            "Cost per hour", "What does each group cost, in the currency of price_per_hour?",
            (Query(f"{rate('moeray_actor_cost_total', ('group',))} * 3600", "{{group}}"),), unit="none", stacked=True,
        ),
    ),
)  # fmt: skip

OBJECTIVES = Row(
    "Objectives",
    (
        Panel(
            "Kept", "Which part of the requests meets the objectives, and is it as large as it should be?",
            (
                Query(f"1 - {late('$__rate_interval')}", "of late"),
                Query(f"1 - {late('1h')}", "of the last hour"),
                Query(AIM, "objective", True),
            ),
            unit="percentunit", width=6, axis_max=1.0,
        ),
        Panel(
            "Burn rate", "How fast is the budget of late requests used up? At 1 the objective is just met.",
            (
                Query(f"{late('5m')} / (1 - {AIM})", "5 minutes"),
                Query(f"{late('1h')} / (1 - {AIM})", "1 hour"),
            ),
            unit="none", width=6, steps=((1, YELLOW), (6, RED)),
        ),
        Panel(
            "Time to first token, p99", "How long do 99 of 100 requests wait at most, and is the objective met?",
            (Query(quantile(0.99, "moeray_time_to_first_token_seconds"), "p99"), objective("ttft")), unit="s", width=6,
        ),
        Panel(
            "Time per output token, p99", "How long are 99 of 100 pauses at most, and is the objective met?",
            (Query(quantile(0.99, "moeray_time_per_output_token_seconds"), "p99"), objective("tpot")), unit="s",
            width=6,
        ),
    ),
)  # fmt: skip

AUTOSCALING = Dashboard(
    "autoscaling",
    "moeray / Autoscaling",
    "How a moeray system scales itself, by what, what that saves, and whether the objectives are kept.",
    (NOW, ACTORS, REASONS, SAVING, OBJECTIVES),
    (*SYSTEM, GROUP),
    EVENTS,
)
