"""Pauses grow with failures, and failures side by side are one."""

import pytest

from moeray.control.backoff import Backoff


@pytest.mark.parametrize(
    ("failures", "pause_s"),
    [
        ([0], 1),
        ([0, 2, 5, 10], 8),
        ([100 * i for i in range(9)], 60),
        ([0] * 7, 1),
        ([0, 0.5, 0.9, 1.0], 2),
    ],
    ids=["one", "one after the other", "many", "at once", "during the pause, and after it"],
)
def test_pauses(failures, pause_s):
    backoff = Backoff()
    for now in failures:
        backoff.fail(now)
    assert backoff.pause_s == pause_s
