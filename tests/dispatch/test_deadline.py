"""How long an actor may take."""

import pytest

from moeray.dispatch.deadline import DIAL_S, FRESH_S, Latency, deadline_s, dial_s, observed, timed_out

STEADY = Latency(0.01, 0.002, 8.0)


@pytest.mark.parametrize(
    ("latency", "rows", "fresh", "seconds"),
    [
        (Latency(), 8, False, FRESH_S + 0.008),  # nothing is known of it
        (Latency(), 20_000, True, 25.0),
        (Latency(), 200_000, True, 60.0),  # never more than the most
        (STEADY, 8, False, 0.5),  # an ordinary decode step
        (STEADY, 8, True, FRESH_S + 0.008),
        (STEADY, 1, False, 0.5),
        (STEADY, 800, False, 7.2),  # 4 * (10 + 4 * 2) ms * 100
        (Latency(0.2, 0.01, 8.0), 8, False, 0.96),
        (Latency(0.01, 0.002, 8.0, timeouts=1), 8, False, 1.0),
        (Latency(0.01, 0.002, 8.0, timeouts=3), 8, False, 4.0),
        (Latency(0.01, 0.002, 8.0, timeouts=50), 8, False, 60.0),
        (Latency(timeouts=1), 8, True, 2 * (FRESH_S + 0.008)),
    ],
)
def test_the_deadline(latency, rows, fresh, seconds):
    assert deadline_s(latency, rows, fresh=fresh, most_s=60.0) == pytest.approx(seconds)


@pytest.mark.parametrize(("timeouts", "seconds"), [(0, DIAL_S), (1, 2 * DIAL_S), (2, 4 * DIAL_S), (50, FRESH_S)])
def test_the_deadline_of_a_call(timeouts, seconds):
    assert dial_s(Latency(timeouts=timeouts)) == seconds


def test_the_first_answer_is_the_mean():
    assert observed(Latency(timeouts=2), 8, 0.04) == Latency(0.04, 0.02, 8.0)


def test_steady_answers_leave_no_deviation():
    latency = Latency()
    for _ in range(60):
        latency = observed(latency, 8, 0.03)
    assert latency.mean_s == pytest.approx(0.03)
    assert latency.deviation_s < 1e-6
    assert latency.rows == 8.0


@pytest.mark.parametrize("seconds", [0.01, 0.1, 1.0])
def test_a_cost_between_constant_and_proportional_is_no_deviation(seconds):
    """100 times the rows in 1 to 100 times the time."""
    assert observed(Latency(0.01, 0.0, 8.0), 800, seconds).deviation_s == pytest.approx(0.0)


def test_a_slow_actor_is_allowed_more_once_it_has_answered():
    slow = observed(timed_out(STEADY), 8, 2.0)
    assert slow.timeouts == 0
    assert deadline_s(slow, 8, fresh=False, most_s=60.0) > 2.0
