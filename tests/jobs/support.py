"""Batch files and jobs for tests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moeray.jobs.batch import BatchJob
from moeray.jobs.ledger import Ledger
from moeray.jobs.start import errors_beside, take_up
from moeray.jobs.survey import BatchInput
from moeray.jobs.tally import Tally
from moeray.serve.backend import Backend

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def entry(custom_id: str, model: str, text: str = "hello", url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    asked = {"prompt": text} if url == COMPLETIONS else {"messages": [{"role": "user", "content": text}]}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": model, **asked, **body}}


def write_lines(path: Path, entries: Iterable[dict[str, Any] | str]) -> Path:
    """A text stands for itself, anything else becomes JSON."""
    lines = [line if isinstance(line, str) else json.dumps(line) for line in entries]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every line of a batch's file; all of them are whole."""
    text = path.read_text() if path.exists() else ""
    assert text.endswith("\n") or not text
    return [json.loads(line) for line in text.splitlines()]


def answers(path: Path) -> dict[str, Any]:
    """What the model said, by custom_id; no custom_id is there twice."""
    found = read_lines(path)
    said = {line["custom_id"]: _said(line["response"]["body"]) for line in found}
    assert len(said) == len(found)
    return said


def _said(body: dict[str, Any]) -> list[str]:
    return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in body["choices"]]


async def run_batch(
    backend: Backend,
    source: Path,
    output: Path,
    *,
    concurrency: int = 64,
    queue: int = 1024,
    patience_s: float = 30.0,
    retry_errors: bool = False,
) -> Tally:
    with BatchInput(source, 1 << 20) as lines, Ledger(output, errors_beside(output)) as ledger:
        survey, tally = take_up(ledger, lines, retry_errors)
        job = BatchJob(backend, None, ledger, tally, concurrency=concurrency, queue=queue, patience_s=patience_s)
        await job.run(lines.read(survey.pending))
    return tally


def grown_to(path: Path, size: int, ended: Callable[[], bool], within: float = 600.0) -> None:
    """Until the file has `size` bytes, or who writes it has ended."""
    pause, until = threading.Event(), time.monotonic() + within
    while not ended() and not (path.exists() and path.stat().st_size >= size):
        assert time.monotonic() < until, f"{path} has not grown to {size} bytes"
        pause.wait(0.002)
