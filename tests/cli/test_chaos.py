"""`moeray chaos` in a short form, and the commands that steer a running system."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.ray

KEYS = {
    "requests", "lost_requests", "changed_tokens", "kills", "stall_p50_seconds", "stall_p99_seconds",
    "recovery_p99_seconds", "moved_requests",
}  # fmt: skip


def test_kills_of_every_kind_lose_nothing(tmp_path):
    """A cluster of its own, so that no other one is killed."""
    command = "chaos --kill any --every 3s --for 11s --streams 6 --max-tokens 48 --seed 3 --output json"
    done = subprocess.run(
        [sys.executable, "-m", "moeray.cli.main", *command.split()], capture_output=True, text=True, timeout=400,
        env={**os.environ, "RAY_ADDRESS": "local", "MOERAY_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    figures = json.loads(done.stdout)
    assert figures.keys() >= KEYS
    assert "WARNING" not in done.stderr  # what is lost on the way is counted, not told
    assert figures["kills"] >= 2
    assert figures["requests"] >= 6
    assert (figures["lost_requests"], figures["changed_tokens"], figures["not_recovered"]) == (0, 0, 0)
