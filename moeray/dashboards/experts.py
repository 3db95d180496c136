"""Experts: who does the work, how evenly, and what does the way to them take?"""

from __future__ import annotations

from functools import partial

from moeray.dashboards.common import EVENTS, GROUP, IN_GROUP, LAYER, RED, SYSTEM, YELLOW, objective
from moeray.dashboards.grafana import Dashboard, Row
from moeray.dashboards.panels import Panel, Query
from moeray.dashboards.promql import gauge, increase, padded, quantile, rate

LOAD = "moeray_expert_load_rows_total"


NUMBER = partial(Panel, kind="stat", unit="none", width=4, height=4)

NOW = Row(
    "Now",
    (
        NUMBER(
            "Expert actors ready", "How many expert actors take rows?",
            (Query(gauge("moeray_actors", where='kind="expert", state="ready"')),),
        ),
        NUMBER("Replicas", "How many copies of experts are there in all?", (Query(gauge("moeray_replicas")),)),
        NUMBER(
            "Experts without replica",
            "Is there an expert that nobody hosts? Its rows wait until a replacement has started.",
            (Query(gauge("moeray_experts_without_replica")),), steps=((1, RED),),
        ),
        NUMBER(
            "Experts without spare", "How many experts would nobody host after one more loss?",
            (Query(gauge("moeray_experts_without_spare")),), steps=((1, YELLOW),),
        ),
        NUMBER(
            "Worst skew", "In the most uneven layer: how many times the mean does its busiest actor serve?",
            (Query(gauge("moeray_layer_skew_ratio", fold="max")),), decimals=2, steps=((1.5, YELLOW), (2.5, RED)),
        ),
        NUMBER("Placement epoch", "How often has the placement changed?", (Query(gauge("moeray_placement_epoch")),)),
    ),
)  # fmt: skip

HEAT = Row(
    "Load by expert",
    (
        Panel(
            "Rows per second by layer and expert",
            "Which experts are hot? A row for each layer, a column for each expert (needs metrics.expert_load).",
            (Query(padded(padded(rate(LOAD, ("layer", "expert")), "layer"), "expert")),), "matrix", "none", 24, 11,
            decimals=0,
        ),
        Panel(
            "Layer $layer: rows per second by expert",
            "Does the heat of a layer's experts move as time goes by? (needs metrics.expert_load)",
            (Query(padded(rate(LOAD, ("expert",), where='layer="$layer"'), "expert"), "{{expert}}"),),
            "heatmap", "none", 16, 9,
        ),
        Panel(
            "Skew by layer",
            "Max/mean rows of a layer's actors; 1 is even. Above control.max_skew, experts are moved or replicated.",
            (Query(gauge("moeray_layer_skew_ratio", ("layer",)), "layer {{layer}}"),), unit="none", width=8, height=9,
        ),
    ),
)  # fmt: skip

WORK = Row(
    "Expert actors",
    (
        Panel(
            "Rows per second", "How many rows does each expert actor serve?",
            (Query(rate("moeray_expert_rows_total", ("group", "actor"), where=IN_GROUP), "{{actor}}"),), unit="none",
            stacked=True,
        ),
        Panel(
            "Busy", "Which part of its time does each expert actor compute?",
            (Query(rate("moeray_expert_busy_seconds_total", ("group", "actor"), where=IN_GROUP), "{{actor}}"),),
            unit="percentunit", axis_max=1.0,
        ),
        Panel(
            "Replicas by actor", "How many experts does each actor host?",
            (Query(gauge("moeray_expert_hosted", ("group", "actor"), where=IN_GROUP), "{{actor}}"),), unit="none",
            stacked=True,
        ),
        Panel(
            "Wait in the queue", "How long do rows wait at an expert actor, and is the objective met?",
            (
                Query(quantile(0.5, "moeray_expert_queue_wait_seconds", ("group",), where=IN_GROUP), "{{group}} p50"),
                Query(quantile(0.99, "moeray_expert_queue_wait_seconds", ("group",), where=IN_GROUP), "{{group}} p99"),
                objective("queue_wait"),
            ),
            unit="s",
        ),
        Panel(
            "Service time", "How long does an expert actor compute one forward?",
            (
                Query(quantile(0.5, "moeray_expert_service_seconds", ("group",), where=IN_GROUP), "{{group}} p50"),
                Query(quantile(0.99, "moeray_expert_service_seconds", ("group",), where=IN_GROUP), "{{group}} p99"),
            ),
            unit="s",
        ),
        Panel(
            "Rows of a forward", "How large are the batches that reach the experts? Larger ones cost less per row.",
            (
                Query(quantile(0.5, "moeray_expert_batch_rows", ("group",), where=IN_GROUP), "{{group}} p50"),
                Query(quantile(0.99, "moeray_expert_batch_rows", ("group",), where=IN_GROUP), "{{group}} p99"),
            ),
            unit="none",
        ),
        Panel(
            "Forwards per second", "How many calls does each expert actor answer?",
            (Query(rate("moeray_expert_forwards_total", ("group", "actor"), where=IN_GROUP), "{{actor}}"),),
            unit="ops",
        ),
        Panel(
            "Weights", "How many bytes of experts does each actor hold?",
            (Query(gauge("moeray_expert_weight_bytes", ("group", "actor"), where=IN_GROUP), "{{actor}}"),),
            unit="bytes", stacked=True,
        ),
        Panel(
            "Resident memory", "How much memory do the expert actors' processes hold, by group?",
            (Query(gauge("moeray_actor_memory_bytes", ("group",), where=f'kind="expert", {IN_GROUP}'), "{{group}}"),),
            unit="bytes",
        ),
    ),
)  # fmt: skip

WAY = Row(
    "The way to the experts",
    (
        Panel(
            "Dispatch by hop", "How long is it from sending an actor's rows to having their outputs?",
            (
                Query(quantile(0.5, "moeray_dispatch_seconds", ("hop",)), "{{hop}} p50"),
                Query(quantile(0.99, "moeray_dispatch_seconds", ("hop",)), "{{hop}} p99"),
            ),
            unit="s",
        ),
        Panel(
            "Rows by hop",
            "How do the rows go: by shared memory of the node (unix), a GPU's (device) or the network (tcp, grpc)?",
            (Query(rate("moeray_dispatch_rows_total", ("hop",)), "{{hop}}"),), unit="none", stacked=True,
        ),
        Panel(
            "Bytes by hop", "How many tensor bytes go to the experts, and come back?",
            (Query(rate("moeray_dispatch_bytes_total", ("hop", "direction")), "{{hop}} {{direction}}"),), unit="Bps",
        ),
        Panel(
            "Combine", "How long does the weighted sum of a layer's outputs take?",
            (
                Query(quantile(0.5, "moeray_combine_seconds"), "p50"),
                Query(quantile(0.99, "moeray_combine_seconds"), "p99"),
            ),
            unit="s",
        ),
        Panel(
            "Rows sent again", "How many rows had to be sent to another replica, and why?",
            (Query(increase("moeray_dispatch_retries_total", ("reason",)), "{{reason}}"),), "bars", "none",
        ),
        Panel(
            "Losses and migrations", "Which actors were lost, and how many replicas were mapped and dropped?",
            (
                Query(increase("moeray_actor_losses_total", ("kind", "reason")), "lost {{kind}}: {{reason}}"),
                Query(increase("moeray_migrations_total", ("change",)), "replicas: {{change}}"),
            ),
            "bars", "none",
        ),
    ),
)  # fmt: skip

EXPERTS = Dashboard(
    "experts",
    "moeray / Experts",
    "Load, replicas and waits of a moeray system's experts, and the way of the rows to them.",
    (NOW, HEAT, WORK, WAY),
    (*SYSTEM, GROUP, LAYER),
    EVENTS,
)
