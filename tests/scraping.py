"""What /metrics answers, as Prometheus' own parser reads it."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

Sample = tuple[str, frozenset[tuple[str, str]]]


def samples(text: bytes) -> dict[Sample, float]:
    """Every sample by its name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def lasting(text: bytes) -> dict[Sample, float]:
    """The samples that must never fall: of counters and histograms without the label `actor`."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        if family.type in ("counter", "histogram")
        for sample in family.samples
        if "actor" not in sample.labels
    }


def fallen(before: Mapping[Sample, float], after: Mapping[Sample, float]) -> dict[Sample, tuple[float, float | None]]:
    """Those that are less than they were, or gone."""
    return {key: (value, after.get(key)) for key, value in before.items() if after.get(key, -1.0) < value}


def total(found: Mapping[Sample, float], name: str, **labels: str) -> float:
    """All samples of that name with these labels, added up. Fails where there is none."""
    wanted = labels.items()
    values = [value for (sample, given), value in found.items() if sample == name and wanted <= dict(given).items()]
    assert values, f"no sample of {name} with {labels}"
    return sum(values)
