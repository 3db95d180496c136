"""How many threads an actor computes on where its config does not say."""

from __future__ import annotations

import pytest

from moeray.threads import within_quota


@pytest.mark.parametrize(
    ("cores", "quota", "threads"),
    [(8, None, 8), (8, 4.0, 4), (8, 2.5, 2), (8, 0.5, 1), (2, 16.0, 2)],
)
def test_a_quota_bounds_the_cores(cores, quota, threads):
    assert within_quota(cores, quota) == threads
