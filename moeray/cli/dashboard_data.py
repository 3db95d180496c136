"""What a dashboard's panels show, asked of Prometheus as Grafana asks it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from moeray.dashboards.grafana import Annotation, Dashboard
from moeray.dashboards.panels import Panel, Query
from moeray.errors import MoerayError

POINTS = 240


@dataclass(frozen=True)
class Line:
    """A series: what its legend says, its labels, and its values (unix seconds, value)."""

    legend: str
    labels: Mapping[str, str]
    points: tuple[tuple[float, float], ...]
    bound: bool = False

    @property
    def last(self) -> float:
        return self.points[-1][1]


class Prometheus:
    """Its HTTP API. Raises MoerayError where it does not answer, or refuses a query."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = httpx.Client(base_url=url.rstrip("/"), timeout=30.0)

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.close()

    def ask(self, path: str, **parameters: Any) -> Any:
        """The `data` of an answer of `/api/v1/`."""
        try:
            answer = self._client.get(f"/api/v1/{path}", params=parameters)
            body = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise MoerayError(f"no Prometheus at {self.url}: {error}; start it, or correct the URL") from error
        if body["status"] != "success":
            raise MoerayError(f"Prometheus refuses {parameters.get('query', path)!r}: {body['error']}")
        return body["data"]

    def label_values(self, definition: str, at: float) -> list[str]:
        """What Grafana's `label_values(selector, label)` yields, numbers in their order."""
        selector, label = definition.removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
        found = self.ask("query", query=f"group by ({label}) ({selector})", time=at)["result"]
        return sorted({series["metric"][label] for series in found}, key=lambda text: (len(text), text))


@dataclass
class Viewer:
    """Looks at a dashboard over the `seconds` before `end` (unix seconds)."""

    prometheus: Prometheus
    end: float
    seconds: float
    scrape_s: float = 15.0
    chosen: dict[str, str] = field(default_factory=dict)

    def step(self, at_least: float = 0.0) -> float:
        """Seconds between two points."""
        return max(self.scrape_s, self.seconds / POINTS, at_least)

    def choose(self, dashboard: Dashboard) -> None:
        """Set the variables: the first value of each, or all of them where the dashboard offers that."""
        for variable in dashboard.variables:
            if variable.every:
                self.chosen[variable.name] = ".*"
                continue
            values = self.prometheus.label_values(self.filled(variable.query), self.end)
            if not values:
                raise MoerayError(f"Prometheus has no value for {variable.query}: does it scrape a running moeray?")
            self.chosen.setdefault(variable.name, values[0])

    def filled(self, text: str, step: float = 0.0) -> str:
        """The text with the variables' values, and Grafana's own."""
        own = {
            "__rate_interval": f"{max(self.step(step) + self.scrape_s, 4 * self.scrape_s):.0f}s",
            "__range": f"{self.seconds:.0f}s",
        }
        return re.sub(r"\$([a-z_]\w*)", lambda match: {**self.chosen, **own}[match[1]], text)

    def lines(self, panel: Panel) -> list[Line]:
        """The series of a panel; an instant one has one point each."""
        return [line for query in panel.queries for line in self.answers(query, panel.instant, panel.step_s)]

    def marks(self, annotation: Annotation) -> list[float]:
        """The moments of an annotation."""
        return sorted({at for line in self.answers(Query(annotation.expr)) for at, _ in line.points})

    def answers(self, query: Query, instant: bool = False, step: float = 0.0) -> Iterator[Line]:
        """The series of one query, with points at least `step` seconds apart."""
        expr, step = self.filled(query.expr, step), self.step(step)
        if instant:
            found = self.prometheus.ask("query", query=expr, time=self.end)["result"]
        else:
            begin = self.end - self.seconds // step * step  # the last point is now: what has just happened shows
            found = self.prometheus.ask("query_range", query=expr, start=begin, end=self.end, step=step)["result"]
        for series in found:
            values = series["values"] if "values" in series else [series["value"]]
            points = tuple((float(at), float(value)) for at, value in values)
            yield Line(_legend(query.legend, series["metric"]), series["metric"], points, query.bound)


def _legend(template: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), template)
