"""How compute threads wait, and whom they make wait. A router and its experts take turns on the same cores, so a thread
that has nothing to do must not spin on a core that another process computes on: libgomp's threads then run for
milliseconds in vain. But from one product of a layer to the next they are better awake, for it takes 50 us to wake
one. And an expert that is sent rows must not push the router off its core, which has more to send.

libgomp reads its settings when it is loaded, so they are set before torch is imported.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
"""Environment of every process that computes. 2,000 rounds take about 50 us: as long as Python takes between two of a
layer's products, and less than it takes from the last one until an expert begins."""

BACKGROUND = 10
"""So much nicer is what nobody waits for: it gets a tenth of a core where another thread wants all of it."""


def wait_passively() -> None:
    """Set `PASSIVE` where the user has not chosen otherwise, for this process and its children."""
    for name, value in PASSIVE.items():
        os.environ.setdefault(name, value)


def wait_for_a_core() -> None:
    """The calling thread, and those that it starts, take no core from another thread as they wake up: they begin when
    it sleeps, or its time slice is over. Their share of the machine stays the same (Linux: SCHED_BATCH)."""
    with suppress(OSError):  # forbidden here, say by a container's rules: then as all others
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def apart(call: Callable[[], T], nicer: int = 0) -> T:
    """Call it in a thread of its own, for whose end the caller waits: what computes now and then, beside what computes
    all the time. `nicer`: so much nicer than its caller is the thread (Linux: each has a niceness), where nobody waits.

    libgomp keeps a team of threads for each thread that has ever computed. Where all of them are more than the cores,
    those that compute go to sleep after a 20th of their rounds. A thread's team ends with it.
    """

    def run() -> T:
        if nicer:
            me = threading.get_native_id()
            with suppress(OSError):  # then at the caller's priority
                os.setpriority(os.PRIO_PROCESS, me, min(19, os.getpriority(os.PRIO_PROCESS, me) + nicer))
        return call()

    with ThreadPoolExecutor(1, thread_name_prefix="apart") as own:
        return own.submit(run).result()


def in_idle_time(work: Callable[[], None], within_s: float) -> None:
    """Run it in a thread that gives its core to any other thread which wakes up, and wait for its end so long at most.

    On a busy machine it may hardly run, so it is nothing that must be done (Linux: SCHED_IDLE)."""

    def run() -> None:
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        work()

    thread = threading.Thread(target=run, name="idle-time", daemon=True)
    thread.start()
    thread.join(within_s)


def cpu_quota(path: Path = _CGROUP_QUOTA) -> float | None:
    """The cores that a cgroup allows (version 2), None for all."""
    try:
        quota, period = path.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def all_cores() -> int:
    """As many threads as this process may keep busy."""
    return within_quota(len(os.sched_getaffinity(0)), cpu_quota())


def within_quota(cores: int, quota: float | None) -> int:
    """How many of the cores a quota pays for, at least one."""
    return cores if quota is None else max(1, min(cores, int(quota)))
