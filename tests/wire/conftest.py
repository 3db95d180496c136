"""Short socket folders, listeners and peers that are closed after each test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.wire.support import KINDS, Host, OtherProcess


@pytest.fixture
def folder() -> Iterator[Path]:
    """A private folder with a path short enough for a socket."""
    path = Path(tempfile.mkdtemp(prefix="moeray-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def host(folder) -> Iterator[Host]:
    host = Host(folder)
    yield host
    host.close()


@pytest.fixture
def other(folder) -> Iterator[OtherProcess]:
    process = OtherProcess(folder)
    yield process
    process.close()
