"""No test sees a Ray cluster of this machine's user, nor leaves a trace of its own where others look."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

# Before anything imports Ray. Short: the paths of Ray's sockets lie below it, and may have 107 bytes.
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="m", dir="/tmp")
os.environ.pop("RAY_ADDRESS", None)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: the other worker's tests need the cores
atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder like `tmp_path`, for sockets, whose paths may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="m", dir="/tmp") as folder:
        yield Path(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What has a Ray cluster comes first: one worker is busy with it for longest."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


class Scheduling(LoadFileScheduling):
    """Which tests keep to one worker of pytest-xdist: those of a file, since they share what it has started, and all
    that have a Ray cluster, or look for one on this machine, since they would see each other's."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "ray" if _has_ray(file) else file


@cache
def _has_ray(file: str) -> bool:
    """Whether its tests are marked so. Who schedules them has not imported them."""
    return "pytest.mark.ray" in Path(__file__).parents[1].joinpath(file).read_text()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Scheduling(config, log)
