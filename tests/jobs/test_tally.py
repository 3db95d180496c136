"""Speed and time left, from readings."""

from __future__ import annotations

import pytest

from moeray.cli.batch_progress import line_of, summary_of
from moeray.jobs.tally import WINDOW_S, Pace, Reading, Tally


@pytest.mark.parametrize(
    ("readings", "tokens_per_second", "left"),
    [
        ([(0, 0, 0)], 0.0, None),
        ([(0, 0, 0), (10, 0, 50)], 5.0, None),
        ([(0, 0, 0), (10, 20, 500)], 50.0, 40.0),
        ([(0, 90, 0), (10, 100, 0)], 0.0, 0.0),
        ([(0, 0, 0), (10, 1, 10), (10 + WINDOW_S, 31, 10 + 60 * WINDOW_S)], 60.0, 69 * WINDOW_S / 30),
    ],
)
def test_pace_of_late(readings, tokens_per_second, left):
    pace = Pace()
    for reading in readings:
        pace.read(Reading(*reading))
    assert pace.tokens_per_second() == pytest.approx(tokens_per_second)
    assert pace.seconds_left(100) == (None if left is None else pytest.approx(left))


def test_lines_of_progress_and_summary():
    tally = Tally(lines=1000, earlier=400, failed_earlier=2, answered=20, in_flight=128, generated=900)
    tally.fail("model_not_found")
    tally.completion_tokens, tally.seconds = 800, 4.0
    pace = Pace()
    pace.read(Reading(0, 400, 0))
    pace.read(Reading(3, 421, 900))
    assert line_of(tally, pace) == "421/1000 lines, 3 errors, 128 in flight, 300 tokens/s, 0:01:23 left"
    figures = summary_of(tally, "done")
    assert (figures["left"], figures["errors"], figures["codes"]) == (579, 3, {"model_not_found": 1})
    assert figures["tokens_per_second"] == 200.0
    assert not tally.complete
