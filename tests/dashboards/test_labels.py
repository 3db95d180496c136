"""The check of expressions can fail: a wrong name, matcher, grouping or join is found."""

from __future__ import annotations

import pytest

from tests.dashboards.labels import Scope, placeholders


@pytest.mark.parametrize(
    ("expression", "labels"),
    [
        ("rate(moeray_expert_rows_total[1m])", {"group", "actor", "job", "instance"}),
        ("sum by (group) (moeray_actors{kind='expert'})", {"group"}),
        ("sum without (job, instance) (moeray_actors_desired)", {"group"}),
        ("sum(moeray_replicas)", set()),
        ("histogram_quantile(0.9, sum by (le, hop) (rate(moeray_dispatch_seconds_bucket[5m])))", {"hop"}),
        ("max by (job) (max_over_time((moeray_replicas)[1h:15s])) * 2", {"job"}),
        ("moeray:kept * on (job) group_left () moeray:kept", {"job"}),
        ("max by (job) (up) == 0", {"job"}),
        ("moeray_actors_desired / on (job, group) moeray_actor_seconds_total", {"job", "group"}),
        ("moeray_actors and on (group) moeray_actors_desired", {"kind", "group", "state", "job", "instance"}),
        ("1e6 * (sum(moeray_replicas) or vector(0)) / (sum(moeray_placement_epoch) > 0)", set()),
    ],
)
def test_labels_of_an_expression(expression, labels):
    scope = Scope()
    scope.record("moeray:kept", "sum by (job) (moeray_slo_requests_total)")
    assert scope.labels(expression) == labels


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("moeray_rows_total", "moeray_rows_total"),
        ("moeray_dispatch_seconds", "moeray_dispatch_seconds"),
        ("moeray_expert_rows_total{layer='0'}", "layer"),
        ("sum by (hop) (moeray_expert_rows_total)", "hop"),
        ("sum by (actor) (sum by (group) (moeray_expert_rows_total))", "actor"),
        ("moeray_replicas / on (group) moeray_actors_desired", "group"),
        ("histogram_quantile(0.9, rate(moeray_dispatch_seconds_sum[1m]))", "le"),
        ("moeray:unknown", "moeray:unknown"),
        ("moeray_actors_desired / sum(moeray_replicas)", "one side has"),
    ],
)
def test_what_does_not_exist_is_found(expression, names):
    with pytest.raises(LookupError, match=names):
        Scope().labels(expression)


def test_placeholders():
    assert placeholders("{{group}} of {{ $labels.job }}: {{ $value }} {{ $value | humanize }}") == {"group", "job"}
