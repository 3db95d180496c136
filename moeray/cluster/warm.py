"""A Python that starts warm: `python -m moeray.cluster.warm SCRIPT ARGUMENT...` runs SCRIPT as `python` would, in a
process forked from the node's zygote, which has imported everything already.

Torch, transformers and Ray take seconds of CPU time to import; a fork takes milliseconds. What stays here is a thin
parent: it hands over its arguments, environment and standard streams, waits, and ends as the script does. When it is
killed, so is the script. Where no zygote can be had, it says so and runs SCRIPT itself.

Only light modules are imported here: this file is on the path of every actor's start.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

from moeray.machine import machine_dir
from moeray.threads import wait_passively

FORK_S = 120.0
"""The first actor of a node waits for the zygote's imports, on a slow disk too."""
ALONE = {"OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""Keeps the zygote's imports from starting threads, and from opening CUDA, which would then be of no use in a fork."""
FAILED = ".failed"
"""What a zygote that could not be brought up leaves, with the reason."""
_LENGTH = 4


def folder() -> Path:
    """The private folder (0700) of the zygotes of this user. Raises OSError where it is not private."""
    path = machine_dir() / "zygote"
    for part in (path.parent, path):
        part.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = part.stat()
        if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise PermissionError(f"folder {part} must be private to this user (mode 0700)")
    return path


def key(owner: int) -> str:
    """Names a zygote: one for each owner (the raylet's process id), Ray job, interpreter, import path and state of the
    code. Ray reads its job's id as it is loaded: a fork would register for the job that has started the zygote, and
    the raylet would keep its own job waiting for another.
    """
    code = Path(__file__).parent.parent
    changed = sum(path.stat().st_mtime_ns for path in code.rglob("*.py"))
    distinct = [os.environ.get(name, "") for name in ("RAY_JOB_ID", "PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD")]
    return hashlib.sha256(json.dumps([owner, sys.executable, str(code), changed, *distinct]).encode()).hexdigest()[:16]


def connect(owner: int) -> socket.socket:
    """A connection to the zygote, which is started where there is none. Raises OSError."""
    path = folder() / key(owner)
    failed = path.with_suffix(FAILED)
    if failed.exists():  # it would fail again, and every start would wait for that
        raise ConnectionError(f"it did not start: {failed.read_text()}; remove {failed} to try again")
    lock = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            client.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            _start(path, owner)
            client.connect(str(path))
    finally:
        os.close(lock)
    return client


def _start(path: Path, owner: int) -> None:
    """Listen for the zygote and give it the socket: who connects from now on waits for it."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, path.with_suffix(".log").open("w") as log:
        listener.bind(str(path))
        listener.listen(128)
        command = [sys.executable, "-m", "moeray.cluster.zygote", str(listener.fileno()), str(owner), str(path)]
        subprocess.Popen(
            command, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, env=dict(os.environ) | ALONE,
        )  # fmt: skip


def run_warm(argv: list[str]) -> int:
    """Have the zygote run `argv`; its exit status. Raises OSError where nothing was run."""
    with connect(owner=os.getppid()) as client:
        client.settimeout(FORK_S)
        send(client, {"argv": argv, "env": dict(os.environ), "cwd": os.getcwd()}, [0, 1, 2])
        if receive(client)[0] is None:
            raise ConnectionError(f"it ended before it forked; the newest log in {folder()} may say why")
        client.settimeout(None)
        ended, _ = receive(client)
        return int(str(ended["status"])) if ended else 1


def send(channel: socket.socket, message: dict[str, object], fds: list[int] | None = None) -> None:
    """One JSON message, its length first; file descriptors travel beside it."""
    body = json.dumps(message).encode()
    socket.send_fds(channel, [len(body).to_bytes(_LENGTH, "big")], fds or [])
    channel.sendall(body)


def receive(channel: socket.socket) -> tuple[dict[str, object] | None, list[int]]:
    """The next message and its descriptors; (None, []) at the end of the stream, in the middle of a message too."""
    head, fds, _, _ = socket.recv_fds(channel, _LENGTH, 3)
    body = b""
    try:
        while head and len(body) < (size := int.from_bytes(head, "big")):
            part = channel.recv(size - len(body))
            if not part:
                head = b""
            body += part
        if head:
            return json.loads(body), fds
    except OSError:
        close_all(fds)
        raise
    close_all(fds)
    return None, []


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def main() -> None:
    wait_passively()  # the zygote's imports load what reads it
    try:
        status = run_warm(sys.argv[1:])
    except OSError as error:
        sys.stderr.write(f"moeray: no zygote ({error}); this process imports everything by itself\n")
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    raise SystemExit(status)


if __name__ == "__main__":
    main()
