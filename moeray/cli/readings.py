"""Readings of a running system, one after the other, for as long as somebody looks.

They are taken by a child process: Ray ends a process that has lost its cluster, and writes to its terminal then. Who
looks goes on, and starts another child. The readings have a pipe of their own, since Ray writes to standard output too.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from moeray.errors import MoerayError

Reading = dict[str, Any]
"""The system's status with `at` (unix seconds), or `at` and `error`, one line on why there is none."""

ANSWER_S = 10.0
START_S = 60.0
"""For the child's imports and its way to Ray, on a busy machine."""
PAUSE_S = 5.0
"""Between two children, since each start costs seconds of processor time."""


def readings_of(name: str, address: str | None, interval: float) -> Generator[Reading, None, None]:
    """A reading each `interval` seconds, whatever becomes of the system."""
    arguments = [name, address or "", str(interval)]
    return follow([sys.executable, "-m", "moeray.cli.readings", *arguments], START_S + interval, PAUSE_S)


def follow(command: Sequence[str], silence_s: float, pause_s: float) -> Generator[Reading, None, None]:
    """What children that run `command` write to the descriptor that is their last argument, a JSON object a line.

    The next one is started `pause_s` after the last has ended, or has said nothing for `silence_s`. Closing the
    iterator ends the child.
    """
    while True:
        told = None
        with _child(command) as output:
            for line in _lines(output, silence_s):
                told = json.loads(line)
                yield told
        if told is None or "error" not in told:
            yield _failed("the connection to Ray is lost; trying again")
        time.sleep(pause_s)


@contextmanager
def _child(command: Sequence[str]) -> Iterator[int]:
    """The end of the pipe from which it can be read. Its session is its own: Ctrl-C is for us, who end it."""
    output, theirs = os.pipe()
    process = subprocess.Popen(
        [*command, str(theirs)], pass_fds=[theirs], start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs)
    try:
        yield output
    finally:
        process.kill()
        process.wait()
        os.close(output)


def _lines(output: int, silence_s: float) -> Iterator[bytes]:
    """Until the end of the stream, or nothing comes for `silence_s`."""
    rest = b""
    while select.select([output], [], [], silence_s)[0]:
        data = os.read(output, 1 << 16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


def _failed(why: object) -> Reading:
    return {"at": time.time(), "error": str(why)}


# -- the child ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Write a reading each interval, until Ray is gone or nobody reads any more."""
    name, address, interval, output = sys.argv[1], sys.argv[2] or None, float(sys.argv[3]), int(sys.argv[4])
    try:
        _write_readings(name, address, interval, output)
    except MoerayError as error:
        with suppress(BrokenPipeError):
            _write(output, _failed(error))
    except BrokenPipeError:
        pass
    os._exit(1)  # Ray's own end hangs or aborts where its cluster is gone


def _write_readings(name: str, address: str | None, interval: float, output: int) -> None:
    from moeray.cli.session import connect
    from moeray.cluster.ray import ask, find_controller, gcs_address

    connect(address, name)
    controller = None
    while True:
        begun = time.monotonic()
        try:
            controller = controller or find_controller(name, ANSWER_S)
            _write(output, {"at": time.time()} | ask(controller, "status", timeout=ANSWER_S))
        except MoerayError as error:
            controller = None
            if not _listens(gcs_address()):
                raise
            _write(output, _failed(error))
        time.sleep(max(0.0, interval - (time.monotonic() - begun)))


def _write(output: int, reading: Reading) -> None:
    data = json.dumps(reading).encode() + b"\n"
    while data:
        data = data[os.write(output, data) :]


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
