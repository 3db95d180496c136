"""The chaos tool's own arithmetic, and its verdict over a source that loses and changes what it should not."""

from __future__ import annotations

import asyncio

import pytest

from moeray.bench.chaos import ChaosPlan, Kill, Result, Stream, quantile, run_chaos, stalls, summary
from moeray.errors import MoerayError
from moeray.types import FinishReason, TokenOutput

PLAN = ChaosPlan(kill="experts", every_s=0.05, for_s=0.4, streams=2, max_tokens=8)


@pytest.mark.parametrize(
    ("values", "q", "expected"), [([], 0.5, None), ([3.0], 0.99, 3.0), ([4.0, 1.0, 2.0, 3.0], 0.5, 3.0)]
)
def test_quantile(values, q, expected):
    assert quantile(values, q) == expected


def test_a_stall_is_the_longest_gap_between_a_kill_and_the_next_for_each_live_stream():
    live = Stream(0, arrivals=[1.0, 2.0, 5.0, 5.5, 9.0], spans=[(0.5, 9.0)])
    late = Stream(1, arrivals=[7.0, 8.0], spans=[(6.0, 8.0)])
    result = Result(PLAN, (live, late), (Kill("a", 2.5), Kill("b", 5.2)), 10.0, ())
    assert stalls(result) == [3.0, 3.5]  # the second stream was not there at either kill


class Source:
    """Tokens 0, 1, 2 ...; after a kill a request ends early with an error, or goes on with another token."""

    def __init__(self, fault):
        self.fault = fault
        self.killed = asyncio.Event()

    async def generate(self, request):
        for token in range(request.sampling.max_tokens):
            await asyncio.sleep(0)
            last = token == request.sampling.max_tokens - 1
            if self.killed.is_set() and self.fault == "lose" and token == 3:
                raise MoerayError("an expert is gone")
            wrong = self.killed.is_set() and self.fault == "change" and token == 3
            yield TokenOutput(
                request.request_id, 0, (99 if wrong else token,), finish_reason=FinishReason.LENGTH if last else None
            )

    async def kill(self, kind):
        self.killed.set()
        return f"{kind}-0"

    async def whole(self):
        return True


@pytest.mark.parametrize(
    ("fault", "lost", "changed"), [("none", False, False), ("lose", True, False), ("change", False, True)]
)
def test_the_verdict(fault, lost, changed):
    async def run():
        source = Source(fault)
        return summary(await run_chaos(source, source.kill, source.whole, PLAN))

    figures = asyncio.run(run())
    assert figures["kills"] >= 1
    assert (figures["lost_requests"] > 0) is lost
    assert (figures["changed_tokens"] > 0) is changed
    assert figures["not_recovered"] == 0
    assert figures["errors"] == (["an expert is gone"] if lost else [])
