"""What the dashboards share: which system is shown, what is marked on it, and the objectives of the config."""

from __future__ import annotations

from moeray.dashboards.grafana import Annotation, Variable
from moeray.dashboards.panels import Query
from moeray.dashboards.promql import ENDPOINTS, gauge, increase, quantile

SYSTEM = (
    Variable("job", "Job", "label_values(moeray_info, job)"),
    Variable("instance", "Endpoint", 'label_values(moeray_info{job="$job"}, instance)', every=True),
)
"""The series of one system: any of its endpoints has them all."""

GROUP = Variable("group", "Group", f'label_values(moeray_actors{{{ENDPOINTS}, kind="expert"}}, group)', every=True)
LAYER = Variable("layer", "Layer", f"label_values(moeray_layer_skew_ratio{{{ENDPOINTS}}}, layer)")
IN_GROUP = 'group=~"$group"'

EVENTS = (
    Annotation(
        "Actor lost",
        increase("moeray_actor_losses_total", ("kind", "group", "reason"), over="1m") + " > 0",
        "{{kind}} of group {{group}}: {{reason}}",
        "red",
    ),
    Annotation(
        "Experts migrated",
        increase("moeray_migrations_total", ("change",), over="1m") + " > 0",
        "replicas of experts: {{change}}",
        "purple",
    ),
    Annotation(
        "Scaled",
        increase("moeray_decisions_total", ("group", "direction"), over="1m") + " > 0",
        "{{group}}: {{direction}}",
        "blue",
    ),
)

RED, YELLOW = "red", "#EAB839"


def objective(name: str) -> Query:
    """The config's objective of that name, as a bound."""
    expr = gauge("moeray_slo_objective_seconds", ("objective",), where=f'objective="{name}"')
    return Query(expr, "objective", bound=True)


def percentiles(name: str) -> tuple[Query, ...]:
    """The median, and what 1 in 10 and 1 in 100 exceed."""
    return tuple(Query(quantile(q, name), f"p{q * 100:g}") for q in (0.5, 0.9, 0.99))
