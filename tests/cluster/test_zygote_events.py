"""What the zygote does with events of several clients that come at once; it has imported nothing here."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import closing

import pytest

from moeray.cluster.warm import receive, send

SERVE = """
import os, socket, sys
from moeray.cluster.zygote import Zygote
fails = sys.argv[2:]
def failing(real, name):
    def call(*args):
        if fails[:1] == [name]:
            fails.pop(0)
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return real(*args)
    return call
owner = os.pidfd_open(os.getppid())
os.fork, os.pidfd_open = failing(os.fork, "fork"), failing(os.pidfd_open, "pidfd")
script = Zygote(socket.socket(fileno=int(sys.argv[1])), owner).serve()
if script is not None:
    script.run()
"""
WAITS = "import signal\nsignal.alarm(60)\nsignal.pause()\n"
LIMIT_S = 30.0


@pytest.fixture
def zygote(short_path, request):
    """Its process, and where it listens. A parameter: what fails there the first times that it is called."""
    fails = getattr(request, "param", [])
    path = short_path / "z"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(listener.fileno()), *fails], pass_fds=[listener.fileno()]
        )
    yield process, path
    process.kill()
    process.wait(LIMIT_S)


def connect(path):
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(LIMIT_S)
    client.connect(str(path))
    return client


def ask(client, script):
    send(client, {"argv": [str(script)], "env": dict(os.environ), "cwd": "/"}, [0, 1, 2])


def pid_of(client):
    return receive(client)[0]["pid"]


def test_a_fork_is_not_taken_for_one_that_has_just_ended(zygote, short_path):
    process, path = zygote
    script = short_path / "waits.py"
    script.write_text(WAITS)
    with closing(connect(path)) as first:
        ask(first, script)
        old = pid_of(first)
        # One batch of events: a fork has ended, another client asks, who gets its descriptor, and its own has gone.
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        end = os.pidfd_open(old)
        os.kill(old, signal.SIGKILL)
        assert select.select([end], [], [], LIMIT_S)[0]
        os.close(end)
        second = connect(path)
        ask(second, script)
    with closing(second):
        process.send_signal(signal.SIGCONT)
        pid_of(second)
        with closing(connect(path)) as third:  # by its answer the batch has been dealt with
            ask(third, script)
            pid_of(third)
        second.settimeout(0.5)
        with pytest.raises(TimeoutError):  # it would hear of the end
            receive(second)


@pytest.mark.parametrize("zygote", [["fork"], ["pidfd"]], indirect=True)
def test_a_fork_that_cannot_be_had_ends_none_of_the_others(zygote, short_path):
    process, path = zygote
    script = short_path / "waits.py"
    script.write_text(WAITS)
    with closing(connect(path)) as refused, closing(connect(path)) as first:
        ask(refused, script)
        assert receive(refused) == (None, [])
        ask(first, script)
        os.kill(pid_of(first), signal.SIGTERM)
        assert receive(first)[0] == {"status": 128 + signal.SIGTERM}
    assert process.poll() is None


def test_a_client_that_ends_amid_its_request_leaves_nothing_open(zygote, short_path):
    process, path = zygote
    script = short_path / "waits.py"
    script.write_text(WAITS)

    def descriptors():
        """After the zygote has answered whoever asks last."""
        with closing(connect(path)) as client:
            ask(client, script)
            os.kill(pid_of(client), signal.SIGTERM)
            assert receive(client)[0]
        return len(os.listdir(f"/proc/{process.pid}/fd"))

    before = descriptors()
    for _ in range(5):
        with closing(connect(path)) as client:
            socket.send_fds(client, [(100).to_bytes(4, "big")], [0, 1, 2])
    assert descriptors() <= before + 1  # the last one's own may be open still
