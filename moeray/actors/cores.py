"""Which cores an actor's compute threads keep to, so that two actors of a machine never wait for the same one.

A router wakes all its experts at once, and each computes for a millisecond. Left alone, the kernel's scheduler often
queues two of them on one core, beside an idle one that it deems not worth the move for so short a time.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moeray.model import kernels


@dataclass(frozen=True)
class Cores:
    """Cores that belong to this process until `release` or its end, whatever that is: a lock on a file stands for
    each."""

    numbers: frozenset[int]
    _files: tuple[int, ...]

    def keep(self) -> None:
        """The calling thread, and those that it starts, run on these cores alone."""
        with suppress(OSError):  # the machine's owner has taken them away since: then anywhere
            os.sched_setaffinity(0, self.numbers)

    def release(self) -> None:
        for file in self._files:
            os.close(file)


def part(threads: int) -> None:
    """The calling thread and the one that computes with it, of `threads` in all, keep to a core each, where these two
    are all that this process may run on. Woken for less than a millisecond at a time, they are else often found on one
    core beside an idle one.

    Of larger teams OpenMP ends the threads that a small product does not need, and what it starts for the next large
    one would be on the core of the thread that asks for it: those run where the kernel's scheduler puts them.
    """
    cores = sorted(os.sched_getaffinity(0))
    if threads == len(cores) == 2 and kernels.available() and not kernels.part(*cores):
        os.sched_setaffinity(0, cores)


def claim(count: int, folder: Path, allowed: Iterable[int] | None = None) -> Cores | None:
    """`count` cores that no other process has claimed in `folder`; None where fewer are left.

    `allowed`: the cores to choose from; None: those that this process may run on.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    taken: dict[int, int] = {}
    for number in sorted(os.sched_getaffinity(0) if allowed is None else allowed):
        if len(taken) == count:
            break
        file = os.open(folder / str(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken[number] = file
        except BlockingIOError:
            os.close(file)
    cores = Cores(frozenset(taken), tuple(taken.values()))
    if len(taken) < count:
        cores.release()
        return None
    return cores
