"""PromQL expressions over the table of metrics: a name, kind or label that the table lacks is an error here.

Every ingress answers with the whole system's series, and Prometheus may scrape several of them. So each expression
first takes the largest of the copies, `max by (the metric's own labels)`, and only then adds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from moeray.metrics import METRICS

ENDPOINTS = 'job="$job", instance=~"$instance"'
"""Selects the system that the dashboard's variables name."""

Labels = Sequence[str]
Fold = Literal["sum", "max", "min", "avg"]


def gauge(name: str, by: Labels = (), *, where: str = "", fold: Fold = "sum") -> str:
    """A gauge, folded over the labels that are not in `by`. Raises ValueError where the table has no such gauge."""
    return _folded(_inner(name, "gauge", where), name, by, fold)


def rate(name: str, by: Labels = (), *, where: str = "") -> str:
    """A counter's rise per second. Raises ValueError where the table has no such counter."""
    return _folded(f"rate({_inner(name, 'counter', where)}[$__rate_interval])", name, by, "sum")


def increase(name: str, by: Labels = (), *, where: str = "", over: str = "$__rate_interval") -> str:
    """A counter's rise within a span. Raises ValueError where the table has no such counter."""
    return _folded(f"increase({_inner(name, 'counter', where)}[{over}])", name, by, "sum")


def quantile(q: float, name: str, by: Labels = (), *, where: str = "") -> str:
    """A quantile of a histogram. Raises ValueError where the table has no such histogram."""
    buckets = f"rate({_inner(name, 'histogram', where, '_bucket')}[$__rate_interval])"
    return f"histogram_quantile({q:g}, {_folded(buckets, name, (*by, 'le'), 'sum', ('le',))})"


def mean(name: str, by: Labels = (), *, where: str = "") -> str:
    """The mean of a histogram's observations. Raises ValueError where the table has no such histogram."""
    total, count = (
        _folded(f"rate({_inner(name, 'histogram', where, part)}[$__rate_interval])", name, by, "sum")
        for part in ("_sum", "_count")
    )
    return f"{total} / ({count} > 0)"


def padded(expression: str, label: str) -> str:
    """The label's numbers with leading zeros, up to three digits: series are sorted as text. Words stay as they are."""
    for digits in (1, 2):
        zeros, numbers = "0" * (3 - digits), "[0-9]" * digits
        expression = f'label_replace({expression}, "{label}", "{zeros}$1", "{label}", "({numbers})")'
    return expression


def _inner(name: str, kind: str, where: str, suffix: str = "") -> str:
    if name not in METRICS or METRICS[name].kind != kind:
        raise ValueError(f"{name} is no {kind} of moeray.metrics.METRICS; add it there or correct the name")
    return f"{name}{suffix}{{{ENDPOINTS}{', ' * bool(where)}{where}}}"


def _folded(inner: str, name: str, by: Labels, fold: Fold, extra: Labels = ()) -> str:
    own = (*METRICS[name].labels, *extra)
    if missing := sorted(set(by) - set(own)):
        raise ValueError(f"{name} has no label {missing[0]}; its labels are {', '.join(own)}")
    single = f"max{_by(own)} ({inner})"
    return single if set(by) == set(own) else f"{fold}{_by(by)} ({single})"


def _by(labels: Labels) -> str:
    return f" by ({', '.join(labels)})" if labels else ""
