"""A process that has run out of threads, for a moment."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest


def refuse_one(monkeypatch: pytest.MonkeyPatch, which: Callable[[str], bool]) -> None:
    """The next thread of such a name does not start; those after it do."""
    start, fails = threading.Thread.start, [True]

    def run_out(thread: threading.Thread) -> None:
        if fails and which(thread.name):
            fails.pop()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", run_out)
