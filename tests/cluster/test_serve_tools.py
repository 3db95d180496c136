"""The application by Ray Serve's own tools: what `serve run` and `serve deploy` build."""

from __future__ import annotations

import threading
import time

import httpx
import pytest


def wait_until_ready(url: str, give_up: float = 120.0) -> list[int]:
    """Statuses of /health on the way to 200."""
    seen, until, pause = [], time.monotonic() + give_up, threading.Event()
    while time.monotonic() < until:
        try:
            status = httpx.get(f"{url}/health", timeout=10.0).status_code
        except httpx.HTTPError:
            status = 0
        pause.wait(0.25)  # asking without a pause would take the core that the actors start on
        if not seen or seen[-1] != status:
            seen.append(status)
        if status == 200:
            return seen
    raise AssertionError(f"never ready: {seen}")


def test_the_builder_takes_serve_runs_arguments():
    from moeray.errors import ConfigError
    from moeray.serve.app import build

    assert build({"model": "/x", "experts.actors": "3", "serve.port": "9000"}) is not None
    with pytest.raises(ConfigError, match="model"):
        build({})
    with pytest.raises(ConfigError, match=r"experts\.actors"):
        build({"model": "/x", "experts.actrs": "3"})
