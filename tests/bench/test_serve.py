"""What a sweep over HTTP makes of its answers; the sweep itself runs in tests/cli/test_serve.py."""

import asyncio

import pytest

from moeray.bench.serve import Answer, Endpoint, Level, Requests, measure, percentiles, summary
from moeray.errors import MoerayError


def test_a_summary():
    answers = [
        Answer(0.0, 1.0, 3.0, 5),
        Answer(1.0, 1.5, 5.0, 1),
        Answer(0.0, error="status 500"),
        Answer(2.0, error="x"),
    ]
    figures = summary(answers)
    assert (figures["requests"], figures["errors"], figures["first_error"]) == (4, 2, "status 500")
    assert figures["seconds"] == 5.0
    assert figures["output_tok_s"] == 6 / 5
    assert figures["ttft_s"]["p99"] == 1.0
    assert figures["tpot_s"] == {"mean": 0.5, "p50": 0.5, "p90": 0.5, "p99": 0.5}


def test_errors_alone_have_no_times():
    assert summary([Answer(0.0, error="gone")]) == {"requests": 1, "errors": 1, "first_error": "gone"}


def test_percentiles_are_of_the_nearest_rank():
    assert percentiles([float(n) for n in range(101)]) == {"mean": 50.0, "p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles([]) == {}


def test_an_endpoint_that_is_not_there_is_named():
    endpoint = {"moeray": Endpoint("http://127.0.0.1:9")}
    with pytest.raises(MoerayError, match=r"127\.0\.0\.1:9"):
        asyncio.run(measure(endpoint, [Level(concurrency=1)], Requests(1), lambda *_: None))
