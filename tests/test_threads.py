"""How many threads an actor computes on where its config does not say, and what runs beside them."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from moeray.threads import BACKGROUND, apart, in_idle_time, within_quota


@pytest.mark.parametrize(
    ("cores", "quota", "threads"),
    [(8, None, 8), (8, 4.0, 4), (8, 2.5, 2), (8, 0.5, 1), (2, 16.0, 2)],
)
def test_a_quota_bounds_the_cores(cores, quota, threads):
    assert within_quota(cores, quota) == threads


def test_what_computes_apart_leaves_no_threads_behind():
    numbers = torch.ones(1 << 20)
    before = set(os.listdir("/proc/self/task"))

    def compute():
        total = float((numbers + 1).sum())
        assert threading.current_thread() is not threading.main_thread()
        return total

    assert apart(compute) == 2 << 20
    until = time.monotonic() + 60
    while not set(os.listdir("/proc/self/task")) <= before:  # libgomp's end a moment after their leader
        assert time.monotonic() < until
        os.sched_yield()


def test_what_fails_apart_fails_here():
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 // 0)


def test_what_nobody_waits_for_is_nice_and_its_caller_stays_as_it_was():
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = niceness()
    assert apart(niceness, BACKGROUND) == min(19, before + BACKGROUND)
    assert niceness() == before
    assert apart(niceness) == before


def test_work_in_idle_time_gives_way_and_nobody_waits_for_it_for_long():
    seen, go = [], threading.Event()
    in_idle_time(lambda: seen.append(os.sched_getscheduler(0)), 20.0)
    assert seen == [os.SCHED_IDLE]
    assert os.sched_getscheduler(0) != os.SCHED_IDLE
    in_idle_time(lambda: seen.append(go.wait(20)), 0.01)
    assert len(seen) == 1
    go.set()
