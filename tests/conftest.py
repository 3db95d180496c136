"""No test sees a Ray cluster of this machine's user, nor leaves a trace of its own where others look."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

import pytest

# Before anything imports Ray. Short: the paths of Ray's sockets lie below it, and may have 107 bytes.
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="m", dir="/tmp")
os.environ.pop("RAY_ADDRESS", None)
atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Which tests keep to one worker of pytest-xdist: those of a file, since they share what it has started, and all
    that have a Ray cluster, or look for one on this machine, since they would see each other's. These begin, since they
    take longest."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    for item in items:
        together = "ray" if item.get_closest_marker("ray") else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(together))
