"""Rates and quantiles from samples of merged metrics."""

import pytest

from moeray.actors.figures import LATENCY_S, RATE_S, Sample, figures, quantile
from moeray.metrics import METRICS

TTFT = "moeray_time_to_first_token_seconds"
BOUNDS = METRICS[TTFT].buckets


def histogram(**counts):
    """A row of counts by bound ("le_0_1" is 0.1) and a sum."""
    row = [0] * (len(BOUNDS) + 1) + [0.0]
    for name, count in counts.items():
        row[BOUNDS.index(float(name.removeprefix("le_").replace("_", ".")))] = count
    return row


def tokens(at, generated, prompt=0.0):
    """Two series of a name, as labels make them, are added up."""
    series = {("a",): generated / 2, ("b",): generated / 2}
    return Sample(at, {"moeray_generation_tokens_total": series, "moeray_prompt_tokens_total": {("a",): prompt}})


@pytest.mark.parametrize(
    ("samples", "rate"),
    [
        ([tokens(0, 50)], None),  # one sample says nothing about a rate
        ([tokens(0, 50), tokens(2, 150)], 50.0),
        ([tokens(0, 50), tokens(2, 50)], 0.0),
        ([tokens(0, 0), tokens(RATE_S, 100), tokens(2 * RATE_S, 150)], 50 / RATE_S),  # what is older does not count
        ([tokens(0, 50), tokens(RATE_S + 1, 150)], None),  # nobody looked for a while
        ([tokens(0, 50), tokens(1, 20)], 0.0),  # a count that fell is no negative rate
    ],
)
def test_tokens_per_second(samples, rate):
    assert figures(samples)["generation_tokens_per_s"] == rate


def test_prompts_have_a_rate_of_their_own():
    assert figures([tokens(0, 0, 10), tokens(2, 0, 110)])["prompt_tokens_per_s"] == 50.0


def test_latencies_are_of_what_ended_of_late():
    before = Sample(0.0, {TTFT: {("a",): histogram(le_10_0=1000)}})
    after = Sample(LATENCY_S - 1, {TTFT: {("a",): histogram(le_10_0=1000, le_0_1=90), ("b",): histogram(le_0_5=10)}})
    shown = figures([before, after])
    assert 0.05 < shown["ttft_p50_s"] <= 0.1
    assert 0.25 < shown["ttft_p95_s"] <= 0.5
    assert shown["tpot_p50_s"] is None
    assert figures([after, Sample(2 * LATENCY_S, after.metrics)])["ttft_p50_s"] is None


def test_gauges_are_added_up_and_the_fullest_cache_is_named():
    gauges = {
        "moeray_num_requests_running": {("m", "router-0"): 3.0, ("m", "router-1"): 2.0},
        "moeray_num_requests_waiting": {("m", "router-0"): 1.0},
        "moeray_kv_cache_usage_ratio": {("m", "router-0"): 0.25, ("m", "router-1"): 0.5},
    }
    shown = figures([Sample.of(0.0, [gauges])])
    assert (shown["running"], shown["waiting"], shown["kv_usage"]) == (5.0, 1.0, 0.5)
    assert figures([Sample(0.0, {})])["kv_usage"] == 0.0


def test_a_sample_keeps_what_it_needs():
    parts = [{TTFT: {("m",): histogram(le_0_1=n)}, "moeray_expert_load_rows_total": {("0", "1"): 5.0}} for n in (1, 2)]
    assert Sample.of(1.0, parts).metrics == {TTFT: {("m",): histogram(le_0_1=3)}}


@pytest.mark.parametrize(
    ("q", "counts", "expected"),
    [
        (0.5, [0, 0, 0, 0], None),
        (0.5, [10, 0, 0, 0], 0.5),  # evenly within a bucket
        (1.0, [10, 0, 0, 0], 1.0),
        (0.5, [5, 5, 0, 0], 1.0),
        (0.75, [5, 5, 0, 0], 1.5),
        (0.95, [5, 0, 5, 0], 3.8),
        (0.5, [0, 0, 0, 3], 4.0),  # above the last bound all that is known is that bound
    ],
)
def test_quantiles(q, counts, expected):
    assert quantile(q, (1.0, 2.0, 4.0), counts) == (None if expected is None else pytest.approx(expected))
