"""The facts of this machine for the checks, looked up."""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import httpx
import psutil

from moeray.cli.ray_address import REACH_S
from moeray.config import Config
from moeray.errors import WireError

SURVEY_S = 60.0


def ring_error(nbytes: int) -> str | None:
    """Why no shared memory between two actors can be made, None where it can."""
    from moeray.wire.ring import RingWriter

    try:
        RingWriter(nbytes).handed_over()
    except (OSError, WireError) as error:
        return str(error)
    return None


def ring_bytes(config: Config) -> int:
    """What all channels of the config take at most: a ring each way, from each router to each expert actor, for either
    half of a step where both may be computed at the same time."""
    halves = 1 if config.engine.overlap == "off" else 2
    channels = halves * config.router.actors * sum(group.actors for group in config.experts.resolved())
    return channels * 2 * config.wire.shared_memory_bytes


def shm_free(path: str = "/dev/shm") -> int | None:
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def bind_error(host: str, port: int) -> str | None:
    """Why nobody can listen there, None where one can."""
    try:
        with closing(socket.create_server((host, port), family=_family(host))):
            return None
    except OSError as error:
        return "in use" if error.errno == errno.EADDRINUSE else (error.strerror or str(error))


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def holder_of(port: int) -> str | None:
    """Who listens at a port, as far as this user may know."""
    try:
        listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        pids = [c.pid for c in listening if tuple(c.laddr)[1:2] == (port,) and c.pid]
        return f"{psutil.Process(pids[0]).name()} (pid {pids[0]})" if pids else None
    except psutil.Error:
        return None


def is_endpoint(host: str, port: int) -> bool:
    """Whether a moeray endpoint answers there, also one that still loads."""
    try:
        health = httpx.get(f"http://{host}:{port}/health", timeout=REACH_S).json()
    except (httpx.HTTPError, ValueError):
        return False
    return isinstance(health, dict) and health.get("status") in ("ok", "loading", "waiting", "stopping", "failed")


@contextmanager
def surveying(address: str | None) -> Iterator[Survey]:
    """The survey of a Ray cluster, which goes on beside what is done in the block."""
    survey = Survey(address)
    try:
        yield survey
    finally:
        survey.close()


class Survey:
    def __init__(self, address: str | None) -> None:
        self._until = time.monotonic() + SURVEY_S
        self._output, theirs = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moeray.cli.checks.nodes", address or "", str(theirs)], pass_fds=[theirs],
            start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)

    def result(self) -> dict[str, Any]:
        """What `moeray.cli.checks.nodes` has said; an `error` where it said nothing in time."""
        data = b""
        while select.select([self._output], [], [], max(0.0, self._until - time.monotonic()))[0]:
            part = os.read(self._output, 1 << 16)
            data += part
            if not part:
                break
        else:
            return {"error": f"Ray has not answered within {SURVEY_S:g} s"}
        return dict(json.loads(data)) if data else {"error": "Ray took the process down that asked it"}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._output)
