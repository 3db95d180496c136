"""The labels of what a PromQL expression yields, found from the table of metrics: whatever it names must exist."""

from __future__ import annotations

import re

import promql_parser as promql

from moeray.metrics import METRICS, MetricSpec

TARGET = {"job", "instance"}
"""What Prometheus adds to each series that it scrapes."""
OUTSIDE = {"up": MetricSpec("gauge", "Whether a target answered.")}
SUFFIXES = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}


class Scope:
    """The series that expressions may use: the table's, `up`, and what recording rules have made of them."""

    def __init__(self) -> None:
        self.series: dict[str, set[str]] = {}
        for name, spec in (METRICS | OUTSIDE).items():
            for suffix in SUFFIXES[spec.kind]:
                le = {"le"} if suffix == "_bucket" else set()
                self.series[name + suffix] = set(spec.labels) | TARGET | le

    def record(self, name: str, expression: str) -> None:
        """A recording rule, which later expressions may use."""
        self.series[name] = self.labels(expression)

    def labels(self, expression: str) -> set[str]:
        """The labels of its series. Raises LookupError for a metric or a label that does not exist."""
        return self._of(promql.parse(expression))

    def _of(self, node: promql.Expr) -> set[str]:
        return getattr(self, f"_{type(node).__name__}")(node)

    def _VectorSelector(self, node: promql.VectorSelector) -> set[str]:
        if node.name not in self.series:
            raise LookupError(f"there is no metric {node.name}")
        labels = self.series[node.name]
        _exist({matcher.name for matcher in node.matchers.matchers}, labels, node.name)
        return labels

    def _MatrixSelector(self, node: promql.MatrixSelector) -> set[str]:
        return self._of(node.vector_selector)

    def _SubqueryExpr(self, node: promql.SubqueryExpr) -> set[str]:
        return self._of(node.expr)

    _ParenExpr = _UnaryExpr = _SubqueryExpr

    def _NumberLiteral(self, node: promql.NumberLiteral) -> set[str]:
        return set()

    _StringLiteral = _NumberLiteral

    def _AggregateExpr(self, node: promql.AggregateExpr) -> set[str]:
        inner = self._of(node.expr)
        if node.modifier is None:
            return set()
        named = set(node.modifier.labels)
        _exist(named, inner, node.prettify())
        return named if node.modifier.type == promql.AggModifierType.By else inner - named

    def _Call(self, node: promql.Call) -> set[str]:
        labels = set().union(*(self._of(arg) for arg in node.args))
        if node.func.name == "histogram_quantile":
            _exist({"le"}, labels, node.prettify())
            return labels - {"le"}
        if node.func.name == "label_replace":
            _exist({node.args[3].val}, labels, node.prettify())
            return labels | {node.args[1].val}
        return labels

    def _BinaryExpr(self, node: promql.BinaryExpr) -> set[str]:
        left, right = self._of(node.lhs), self._of(node.rhs)
        if promql.NumberLiteral in (type(node.lhs), type(node.rhs)):
            return left | right
        matching = node.modifier.matching if node.modifier is not None else None
        if matching is None:
            if left != right:
                raise LookupError(f"{node.prettify()}: one side has {sorted(left)}, the other {sorted(right)}")
            return left
        for side in (left, right):
            _exist(set(matching.labels), side, node.prettify())
        one_to_one = node.modifier.card == promql.VectorMatchCardinality.OneToOne
        return set(matching.labels) if one_to_one else left


def _exist(named: set[str], labels: set[str], where: str) -> None:
    if missing := named - labels:
        raise LookupError(f"{sorted(missing)} is no label of {where}; there are {sorted(labels)}")


def placeholders(legend: str) -> set[str]:
    """The labels that a legend (`{{label}}`) or an alert's text (`{{ $labels.label }}`) shows."""
    return set(re.findall(r"\{\{\s*(?:\$labels\.)?([a-z_]+)\s*\}\}", legend)) - {"value"}
