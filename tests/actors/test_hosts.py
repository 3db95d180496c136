"""How fast actors count as to each other."""

from __future__ import annotations

import pytest

from moeray.actors.hosts import shares_of
from moeray.actors.roster import Actor
from moeray.config import Config
from moeray.settings.experts import ExpertGroupConfig

GROUP = ExpertGroupConfig(actors=4)


def actors(count: int) -> list[Actor]:
    return [Actor(f"experts-{i}", GROUP, i, Config(model="m")) for i in range(count)]


@pytest.mark.parametrize(
    ("rates", "shares"),
    [
        ([], [0.25, 0.25, 0.25, 0.25]),
        ([100, 100, 100, 100], [1, 1, 1, 1]),
        ([74, 98, 80, 106], [1, 1, 1, 1]),  # the same machine under different batches
        ([100, 100, 100, 500], [0.5, 0.5, 0.5, 2.5]),
        ([400, 0, 400, 400], [1, 1, 1, 1]),  # not known yet: as the mean of its group
    ],
)
def test_shares_follow_rates_only_where_they_differ_clearly(rates, shares):
    known = {f"experts-{i}": float(rate) for i, rate in enumerate(rates) if rate}
    found = list(shares_of(actors(4), known).values())
    scale = sum(shares) / sum(found)
    assert [share * scale for share in found] == pytest.approx(shares)
