"""Readings by children: real processes that write, fall silent and die."""

import os
import sys
from contextlib import closing

import psutil
import pytest

from moeray.cli.readings import follow


def child(body: str) -> list[str]:
    """A Python that runs `body`, in which `say(text)` writes a line."""
    head = "import os, signal, sys\nsay = lambda text: os.write(int(sys.argv[-1]), (text + '\\n').encode())\n"
    return [sys.executable, "-c", head + body]


def test_a_child_that_dies_is_followed_by_another():
    command = child("print('noise of Ray'); say('{\"pid\": %d}' % os.getpid())")
    with closing(follow(command, silence_s=30, pause_s=0)) as readings:
        first, lost, second = (next(readings) for _ in range(3))
    assert "connection to Ray is lost" in lost["error"]
    assert lost["at"] > 0
    assert first["pid"] != second["pid"]


def test_a_child_that_says_why_it_ends_is_not_talked_over():
    with closing(follow(child('say(\'{"error": "no cluster"}\')'), silence_s=30, pause_s=0)) as readings:
        assert [next(readings) for _ in range(3)] == [{"error": "no cluster"}] * 3


def test_a_silent_child_is_ended():
    command = child("say('{\"pid\": %d}' % os.getpid()); signal.pause()")
    with closing(follow(command, silence_s=2, pause_s=0)) as readings:
        first, lost, second = (next(readings) for _ in range(3))
        assert "lost" in lost["error"]
        assert not psutil.pid_exists(first["pid"])
        assert psutil.pid_exists(second["pid"])
    assert not psutil.pid_exists(second["pid"])


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_long_lines_come_whole(size):
    command = child(f"data = b'[\"' + b'x' * {size} + b'\"]\\n'\n"
                    "while data: data = data[os.write(int(sys.argv[-1]), data):]\nsignal.pause()")  # fmt: skip
    before = len(os.listdir("/proc/self/fd"))
    with closing(follow(command, silence_s=30, pause_s=0)) as readings:
        assert next(readings) == ["x" * size]
    assert len(os.listdir("/proc/self/fd")) == before
