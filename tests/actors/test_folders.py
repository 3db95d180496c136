"""Sockets that killed actors have left are removed; those at which somebody listens, or may soon, never."""

import os
import socket
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from moeray.actors import folders
from moeray.machine import machine_dir

NODE, OURS, OTHERS = "0123456789ab", "0000aaaa", "0000bbbb"


@pytest.fixture(autouse=True)
def machine(tmp_path_factory, monkeypatch):
    # sockets want a short path
    base = tmp_path_factory.mktemp("f")
    monkeypatch.setenv("MOERAY_RUNTIME_DIR", str(base))
    return machine_dir()


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


def put(folder, name, stack, *, alive, age_s):
    """A socket, dead or listened at, of this age."""
    path = folder / f"{name}.sock"
    sock = stack.enter_context(socket.socket(socket.AF_UNIX))
    sock.bind(str(path))
    if alive:
        sock.listen()
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def age(folder, seconds):
    os.utime(folder, (time.time() - seconds,) * 2)


@pytest.mark.parametrize(
    ("alive", "age_s", "stays"),
    [(False, 60, False), (True, 60, True), (False, 0, True)],
    ids=["dead", "alive", "perhaps being bound"],
)
def test_the_own_folder(alive, age_s, stays, stack):
    folder = folders.runtime_dir(NODE, OURS)
    put(folder, "experts-0", stack, alive=alive, age_s=age_s)
    folders.remove_runtime_dir(NODE, OURS)
    assert folder.exists() == stays
    if stays:
        assert list(folder.iterdir())


@pytest.mark.parametrize(
    ("alive", "folder_age_s", "stays"),
    [(False, 3600, False), (True, 3600, True), (False, 10, True)],
    ids=["forgotten", "alive", "new"],
)
@pytest.mark.parametrize("look", [folders.runtime_dir, folders.remove_runtime_dir], ids=["first", "last"])
def test_another_systems_folder(look, alive, folder_age_s, stays, stack):
    """It is looked at by whoever comes, as by whoever goes: of a system that was killed whole, nobody does."""
    folder = folders.runtime_dir(NODE, OTHERS)
    put(folder, "router-0", stack, alive=alive, age_s=3600)
    age(folder, folder_age_s)
    look(NODE, OURS)
    assert folder.exists() == stays


def test_what_is_no_systems_folder_stays(machine):
    folders.runtime_dir(NODE, OURS)
    (machine / "cores").mkdir()
    age(machine / "cores", 3600)
    folders.remove_runtime_dir(NODE, OURS)
    assert [path.name for path in machine.iterdir()] == ["cores"]


def test_a_folder_in_use_is_not_forgotten():
    folder = folders.runtime_dir(NODE, OURS)
    age(folder, 3600)
    folders.runtime_dir(NODE, OURS)
    folders.remove_runtime_dir(NODE, OTHERS)
    assert folder.exists()


def test_where_the_session_of_the_user_has_ended(monkeypatch, tmp_path):
    """Its last logout removes XDG_RUNTIME_DIR, while what runs in the background stays."""
    monkeypatch.delenv("MOERAY_RUNTIME_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert machine_dir().parent == tmp_path
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
    assert machine_dir().parent == Path(tempfile.gettempdir())
