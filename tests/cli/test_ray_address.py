"""Addresses where no Ray cluster can be are told at once; the rest is left to Ray."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import pytest

from moeray.cli.ray_address import astray, left_by_ray_start, unnamed, unreachable

pytestmark = pytest.mark.ray


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Where Ray would have its files."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    left_by_ray_start().parent.mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("address", "words"), [("127.0.0.1:1", "refused"), ("nonsense", "HOST:PORT"), ("127.0.0.1:99999", "127.0.0.1")]
)
def test_addresses_where_no_ray_can_be(folder, monkeypatch, address, words):
    assert words in (unreachable(address) or "")
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert words in (unreachable(None) or "")


@pytest.fixture
def gcs():
    """The address of what speaks as Ray's GCS does."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def test_addresses_that_ray_is_asked_for(folder, gcs):
    assert unreachable(gcs) is None
    left_by_ray_start().write_text(gcs)
    assert unreachable(None) is None
    assert unreachable("local") is None
    assert unreachable("ray://127.0.0.1:1") is None


def test_a_head_that_takes_connections_and_says_nothing(folder, monkeypatch):
    """As one does that is stopped, or hangs. Behind TLS nobody can tell from outside."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        address = f"127.0.0.1:{held.getsockname()[1]}"
        begun = time.monotonic()
        assert "has said nothing" in (unreachable(address) or "")
        assert time.monotonic() - begun < 15.0
        monkeypatch.setenv("RAY_USE_TLS", "1")
        assert unreachable(address) is None


def test_a_port_of_something_else(folder):
    """The dashboard's, say, which looks like the head's address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert "is no head of Ray's" in (unreachable(f"127.0.0.1:{server.server_port}") or "")
        server.shutdown()


def test_no_cluster_was_ever_started(folder):
    assert unreachable(None) is None
    assert unreachable("auto") is None


@contextlib.contextmanager
def raylet(head: str):
    """A process that looks like a raylet of the cluster at `head`."""
    code = "import sys; print(flush=True); sys.stdin.read()"
    command = ["/x/raylet/raylet", "-c", code, f"--gcs-address={head}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, executable=sys.executable, **pipes) as process:
        process.stdout.readline()
        yield
        process.stdin.close()


def test_raylets_whose_cluster_cannot_be_reached_from_here(folder, monkeypatch, gcs):
    """Where none is named, Ray joins any that it sees; one of another network namespace would hold it for a minute."""
    with raylet("127.0.0.1:1"):
        assert "nothing answers at 127.0.0.1:1" in (astray(None) or "")
        assert astray("127.0.0.1:2") is None
        with raylet(gcs):
            assert astray(None) is None
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:3")
        assert astray(None) is None


def test_clusters_of_this_user_that_nothing_names(folder, monkeypatch, gcs):
    with raylet("127.0.0.1:1"), raylet(gcs):
        assert gcs in unnamed(None)
        assert "127.0.0.1:1" not in unnamed(None)
        assert unnamed("127.0.0.1:2") == []
        with monkeypatch.context() as patch:
            patch.setattr(os, "getuid", lambda: os.geteuid() + 1)
            assert unnamed(None) == []
        left_by_ray_start().write_text("127.0.0.1:2")
        assert unnamed(None) == []


@pytest.mark.parametrize("command", [["status"], ["serve", "no-model"]])
def test_the_address_of_a_cluster_that_was_killed(folder, command):
    left_by_ray_start().write_text("127.0.0.1:1")
    done = subprocess.run(
        [sys.executable, "-m", "moeray.cli.main", *command], capture_output=True, text=True, timeout=60, env=os.environ
    )
    assert done.returncode == 1
    assert "nothing answers at 127.0.0.1:1" in done.stderr
    assert "`ray stop` removes that" in done.stderr


def test_the_file_is_where_ray_looks_for_it(folder):
    from ray._private.utils import write_ray_address

    write_ray_address("127.0.0.1:7")
    assert left_by_ray_start().read_text() == "127.0.0.1:7"
