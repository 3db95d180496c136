"""Which Ray cluster is meant, and whether one can be there: found without Ray, which tries for minutes."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

REACH_S = 3.0
"""For an address to answer."""
_SPEAK_S = 5.0
"""For a GCS that has taken a connection to say something: one that is stopped, or hangs, never does."""
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""What a client of HTTP/2 says first, with no settings of its own; a server's answer is its settings."""
_SETTINGS = 4


def left_by_ray_start() -> Path:
    """The file in which `ray start` leaves its address. A machine that went down, or a kill, leaves it behind."""
    base = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # as Ray finds it
    return Path(base, "ray", "ray_current_cluster")


def unreachable(address: str | None) -> str | None:
    """Why no cluster can be at `address`, or, without one, where Ray would look. None where Ray is to be asked."""
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    if address == "auto":
        return _left_over(left_by_ray_start())
    if address == "local" or "://" in address:
        return None
    found = re.fullmatch(r"(.+):(\d+)", address)
    if found is None:
        return f"{address!r} is no address: HOST:PORT is"
    try:
        with socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=REACH_S) as gcs:
            return None if os.environ.get("RAY_USE_TLS", "0") not in ("0", "") else _mute(gcs, address)
    except (OSError, OverflowError) as error:
        return f"nothing answers at {address}: {getattr(error, 'strerror', None) or error}"


def _mute(gcs: socket.socket, address: str) -> str | None:
    """Why no GCS is at the other end, None where one is: they speak gRPC, which is HTTP/2."""
    gcs.settimeout(_SPEAK_S)
    try:
        gcs.sendall(_GREETING)
        head = gcs.recv(9, socket.MSG_WAITALL)
    except TimeoutError:
        return f"what listens at {address} has said nothing for {_SPEAK_S:g} s: it hangs, or is no head of Ray's (GCS)"
    if len(head) < 9 or head[3] != _SETTINGS:
        return f"what listens at {address} is no head of Ray's (GCS)"
    return None


def astray(address: str | None) -> str | None:
    """Why no raylet on this machine leads to a cluster, where Ray would join any that runs here: it sees those of
    containers and of dead heads, too. None where one does or none runs, and where a cluster is named."""
    if _is_named(address):
        return None
    reasons = [unreachable(head) for head in sorted({head for head, _ in _of_raylets()})]
    return f"{reasons[0]}, where a raylet on this machine has its head" if reasons and all(reasons) else None


def unnamed(address: str | None) -> list[str]:
    """The clusters of this user's that run here without a name, as that of a bare `moeray serve` does, newest first.
    Empty where a cluster is named: then that one is meant."""
    if _is_named(address):
        return []
    heads = dict.fromkeys(head for head, owner in _of_raylets() if owner == os.getuid())
    return [head for head in heads if unreachable(head) is None]


def _is_named(address: str | None) -> bool:
    return (address or os.environ.get("RAY_ADDRESS") or "auto") != "auto" or left_by_ray_start().exists()


def _of_raylets() -> Iterator[tuple[str, int]]:
    """Where the raylets on this machine have their heads, found as Ray finds them, and whose they are; newest first."""
    import psutil

    found = list(psutil.process_iter(["cmdline", "create_time", "uids"]))
    for process in sorted(found, key=lambda process: process.info["create_time"] or 0.0, reverse=True):
        command = process.info["cmdline"] or [""]
        if "raylet" in Path(command[0]).name:
            words = " ".join(command).split()
            heads = (word.partition("=")[2] for word in words if word.startswith("--gcs-address="))
            yield from ((head, process.info["uids"].real) for head in heads)


def _left_over(file: Path) -> str | None:
    address = file.read_text().strip() if file.exists() else ""
    reason = unreachable(address) if address else None
    return reason and f"{reason}; {file} names it still: `ray stop` removes that"
