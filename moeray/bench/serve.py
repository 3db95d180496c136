"""Latency and throughput of an OpenAI endpoint over HTTP, at a fixed concurrency or at random arrivals.

Prompts are random token ids, so that every request has its exact length and no tokenizer is needed; tokens are counted
by the endpoint's own usage report. Any server with `/v1/completions` can be measured.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import httpx

from moeray.bench.environment import surroundings
from moeray.errors import MoerayError

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Endpoint:
    """Where requests go. `model` None: the first that the endpoint lists."""

    url: str
    model: str | None = None
    api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@dataclass(frozen=True)
class Requests:
    """What is asked: `count` requests of `prompt` random tokens below `vocab`, answered by `output` tokens each."""

    count: int = 64
    prompt: int = 256
    output: int = 64
    vocab: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Level:
    """One point of a sweep: `concurrency` requests in flight, or arrivals of `rate` a second (a Poisson process)."""

    concurrency: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        return f"{self.concurrency} at once" if self.rate is None else f"{self.rate:g}/s"


@dataclass(frozen=True)
class Answer:
    """Times of time.perf_counter; `first`: of the first event. `error`: why there is no whole answer."""

    sent: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    error: str | None = None


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Percentiles in seconds, and rates over the time from the first request to the last token; errors are counted and
    the first is named."""
    good = [a for a in answers if a.error is None]
    errors = [a.error for a in answers if a.error is not None]
    result: dict[str, Any] = {"requests": len(answers), "errors": len(errors), "first_error": next(iter(errors), None)}
    if not good:
        return result
    span = max(max(a.last for a in good) - min(a.sent for a in good), 1e-9)
    between = [(a.last - a.first) / (a.tokens - 1) for a in good if a.tokens > 1]
    return result | {
        "seconds": span,
        "requests_per_s": len(good) / span,
        "output_tok_s": sum(a.tokens for a in good) / span,
        "ttft_s": percentiles([a.first - a.sent for a in good]),
        "tpot_s": percentiles(between),
        "e2e_s": percentiles([a.last - a.sent for a in good]),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Mean, p50, p90 and p99 (nearest rank); empty without values."""
    if not values:
        return {}
    ordered, last = sorted(values), len(values) - 1
    ranks = {f"p{q}": ordered[round(q / 100 * last)] for q in (50, 90, 99)}
    return {"mean": statistics.fmean(values)} | ranks


async def measure(
    endpoints: dict[str, Endpoint], levels: Sequence[Level], requests: Requests, report: Report
) -> dict[str, Any]:
    """Every endpoint at every level, in turn; each level begins with a few requests that do not count.

    Raises MoerayError where an endpoint does not answer at all, or lists no model.
    """
    rows = []
    for i, level in enumerate(levels):
        row: dict[str, Any] = asdict(level)
        for name, endpoint in endpoints.items():
            report(f"{name}, {level}", i, len(levels))
            row[name] = await _level(endpoint, level, requests)
        rows.append(row)
    report("done", len(levels), len(levels))
    return {"requests": asdict(requests), "rows": rows} | surroundings()


async def _level(endpoint: Endpoint, level: Level, requests: Requests) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=endpoint.url, headers=endpoint.headers, timeout=600.0, limits=limits
    ) as client:
        endpoint = replace(endpoint, model=endpoint.model or await _first_model(client, endpoint.url))
        bodies = _bodies(endpoint, requests)
        warm = replace(requests, count=min(level.concurrency or 2, 4), output=2, seed=requests.seed + 1)
        await _closed(client, list(_bodies(endpoint, warm)), warm.count)
        if level.rate is None:
            return summary(await _closed(client, list(bodies), level.concurrency or 1))
        return summary(await _open(client, list(bodies), level.rate, requests.seed))


async def _first_model(client: httpx.AsyncClient, url: str) -> str:
    try:
        answer = await client.get("/v1/models")
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise MoerayError(f"{url}/v1/models does not name a model ({error}); check the URL, or give --model") from error


def _bodies(endpoint: Endpoint, requests: Requests) -> Iterator[dict[str, Any]]:
    generator = random.Random(requests.seed)
    for n in range(requests.count):
        yield {
            "model": endpoint.model,
            "prompt": [generator.randrange(requests.vocab) for _ in range(requests.prompt)],
            "max_tokens": requests.output,
            "temperature": 1.0,
            "seed": n,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


async def _closed(client: httpx.AsyncClient, bodies: list[dict[str, Any]], concurrency: int) -> list[Answer]:
    """As many at once as are asked for, until all are answered."""
    left, answers = iter(bodies), []

    async def stream() -> None:
        for body in left:
            answers.append(await ask(client, body))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(bodies))):
            group.create_task(stream())
    return answers


async def _open(client: httpx.AsyncClient, bodies: list[dict[str, Any]], rate: float, seed: int) -> list[Answer]:
    """Each at its own moment, whether or not earlier ones are answered."""
    generator, at = random.Random(seed), time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for body in bodies:
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            tasks.append(group.create_task(ask(client, body)))
            at += generator.expovariate(rate)
    return [task.result() for task in tasks]


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """One streamed completion."""
    sent = time.perf_counter()
    first = last = 0.0
    tokens = 0
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                return Answer(sent, error=f"status {response.status_code}: {_message(await response.aread())}")
            async for line in response.aiter_lines():
                event = _event(line)
                if event is None:
                    continue
                if "error" in event:
                    return Answer(sent, error=str(event["error"])[:300])
                if event.get("choices"):
                    last = time.perf_counter()
                    first = first or last
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    except (httpx.HTTPError, ValueError) as error:
        return Answer(sent, error=f"{type(error).__name__}: {error}")
    return Answer(sent, first, last, tokens) if tokens else Answer(sent, error="the stream reported no usage")


def _message(body: bytes) -> str:
    """What an OpenAI endpoint says in an error, or the beginning of whatever else it answered."""
    try:
        return str(json.loads(body)["error"]["message"])[:300]
    except (ValueError, LookupError, TypeError):
        return repr(body[:300])


def _event(line: str) -> dict[str, Any] | None:
    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
    return json.loads(data) if data and data != "[DONE]" else None
