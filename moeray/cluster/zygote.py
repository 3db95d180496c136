"""The zygote of a node: a process that has imported what actors need, and forks one for each that is to start.

It has a single thread, and touches neither CUDA nor gRPC nor a thread pool, so that its forks are whole. Pages of the
imported modules are shared by all its forks. It ends with its owner (the raylet), or when nobody needs it any more.
"""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import selectors
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moeray.cluster.warm import FAILED, close_all, receive, send
from moeray.errors import one_line

MODULES = (
    "ray", "ray._private.node", "ray._private.worker", "ray._private.runtime_env.setup_hook",
    "torch", "transformers", "moeray.actors.expert", "moeray.actors.router", "moeray.actors.controller",
    "moeray.cluster.ray_controller", "moeray.cluster.ray_process",
)  # fmt: skip
IDLE_S = 60.0
"""Without a fork alive for so long it ends."""
REQUEST_S = 10.0
PAUSE_S = 0.1


@dataclass(frozen=True)
class Script:
    """What a fork is to run. `fds`: its standard input, output and error."""

    argv: list[str]
    env: dict[str, str]
    cwd: str
    fds: tuple[int, ...]

    def run(self) -> None:
        """Become this script."""
        os.setsid()  # whoever ends this process's group means this process alone
        for target, fd in enumerate(self.fds):
            os.dup2(fd, target)
            os.close(fd)
        os.environ.clear()
        os.environ.update(self.env)
        os.chdir(self.cwd)
        sys.argv = self.argv
        sys.path[0] = str(Path(self.argv[0]).parent)
        runpy.run_path(self.argv[0], run_name="__main__")


class Zygote:
    """Forks on request. `owner`: the process with which it ends; the descriptor is one of pidfd_open."""

    def __init__(self, listener: socket.socket, owner: int) -> None:
        self._listener = listener
        self._owner = owner
        self._forks: dict[socket.socket, int] = {}
        self._ends: dict[int, socket.socket] = {}
        self._events = selectors.DefaultSelector()
        self._events.register(listener, selectors.EVENT_READ)
        self._events.register(owner, selectors.EVENT_READ)

    def serve(self) -> Script | None:
        """None when it is to end; in a fork: what that is to run."""
        while events := self._events.select(None if self._forks else IDLE_S):
            # New forks last: they get descriptors that events of this batch may still name.
            for found, _ in sorted(events, key=lambda event: event[0].fileobj is self._listener):
                if found.fileobj is self._listener:
                    script = self._accept()
                    if script is not None:
                        return script
                elif found.fd == self._owner:
                    return None
                elif found.fd in self._ends:
                    self._reap(found.fd)
                else:
                    self._deserted(found.fd)
        return None

    def _accept(self) -> Script | None:
        try:
            client, _ = self._listener.accept()
        except OSError as error:
            say(f"no start can be taken: {error}")
            time.sleep(PAUSE_S)  # out of descriptors: a fork that ends gives some back
            return None
        client.settimeout(REQUEST_S)
        try:
            request, fds = receive(client)
        except OSError:
            request, fds = None, []
        if request is None:
            client.close()
            return None
        script = Script(fds=tuple(fds), **request)  # type: ignore[arg-type]
        pid = -1
        try:
            pid = os.fork()
            if pid == 0:
                client.close()
                self._leave()
                return script
            end = os.pidfd_open(pid)
        except OSError as error:  # its client starts it by itself, and the forks that live go on
            say(f"no fork can be had: {error}")
            if pid > 0:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            client.close()
            return None
        finally:
            if pid:
                close_all(fds)
        self._forks[client], self._ends[end] = pid, client
        self._events.register(end, selectors.EVENT_READ)
        self._events.register(client, selectors.EVENT_READ)
        with suppress(OSError):  # its client has gone; what it left ends by _deserted
            send(client, {"pid": pid})
        return None

    def _leave(self) -> None:
        """In a fork: nothing of the zygote's stays open."""
        self._events.close()
        for end, client in self._ends.items():
            os.close(end)
            client.close()
        self._listener.close()
        os.close(self._owner)

    def _reap(self, end: int) -> None:
        """A fork has ended: its client ends as it did."""
        client = self._ends.pop(end)
        status = os.waitstatus_to_exitcode(os.waitpid(self._forks.pop(client), 0)[1])
        self._events.unregister(end)
        with suppress(KeyError):  # it was deserted
            self._events.unregister(client)
        os.close(end)
        with suppress(OSError):
            send(client, {"status": status if status >= 0 else 128 - status})
        client.close()

    def _deserted(self, fd: int) -> None:
        """A client was killed: so is what it had asked for, whose end is seen next."""
        for client, pid in self._forks.items():
            if client.fileno() == fd:
                os.kill(pid, signal.SIGKILL)
                self._events.unregister(client)
                return


def say(what: str) -> None:
    """To the log, which standard error is here."""
    print(f"moeray zygote: {what}", file=sys.stderr, flush=True)


def _import_all() -> None:
    """Raises ImportError, and OSError for imports that leave threads behind."""
    for module in MODULES:
        importlib.import_module(module)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise OSError(f"the imports have started {threads - 1} threads, which its forks would lack")
    gc.collect()
    gc.freeze()  # a collection would write to every page that the forks share


def main() -> None:
    listener, owner, path = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), Path(sys.argv[3])
    try:
        _import_all()
        zygote = Zygote(listener, os.pidfd_open(owner))
    except BaseException as error:  # a module may even exit: whatever it is, every start would wait for it again
        path.with_suffix(FAILED).write_text(f"{type(error).__name__}: {one_line(error)}")
        raise
    script = zygote.serve()
    if script is not None:
        script.run()
    else:
        path.unlink(missing_ok=True)
        path.with_suffix(".log").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
