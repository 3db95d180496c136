import os
import subprocess
import sys
import threading

import pytest

from moeray.actors.cores import claim
from moeray.model import kernels


def test_cores_are_claimed_once(tmp_path):
    first = claim(2, tmp_path, range(5))
    second = claim(2, tmp_path, range(5))
    assert first.numbers == {0, 1}
    assert second.numbers == {2, 3}
    assert claim(2, tmp_path, range(5)) is None
    assert claim(1, tmp_path, range(5)).numbers == {4}
    first.release()
    assert claim(2, tmp_path, range(5)).numbers == {0, 1}


def test_a_claim_that_fails_holds_nothing(tmp_path):
    assert claim(3, tmp_path, range(2)) is None
    assert claim(2, tmp_path, range(2)) is not None


def test_a_process_that_dies_leaves_its_cores(tmp_path):
    code = (
        f"from pathlib import Path; from moeray.actors.cores import claim; claim(2, Path({str(tmp_path)!r}), range(2))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", f"{code}; print('claimed', flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with child:
        # The claim is dropped at once, as nothing keeps it; a lock lives as long as its descriptor.
        assert child.stdout.readline() == "claimed\n"
        assert claim(1, tmp_path, range(2)) is None
        child.kill()
        child.wait()
        assert claim(2, tmp_path, range(2)).numbers == {0, 1}


def test_only_the_calling_thread_keeps_to_them(tmp_path):
    before, seen = os.sched_getaffinity(0), []
    cores = claim(1, tmp_path)

    def run():
        cores.keep()
        inner = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        inner.start()
        inner.join()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [cores.numbers]
    assert os.sched_getaffinity(0) == before


PART = """
import os, sys, threading
import torch
from moeray.actors.cores import part

torch.set_num_threads(2)
os.sched_setaffinity(0, {cores})

def kept():
    return sorted(tuple(sorted(os.sched_getaffinity(int(task)))) for task in os.listdir("/proc/self/task"))

def run():
    part({threads})
    torch.ones(1 << 20).add_(1)
    print([cores for cores in kept() if len(cores) == 1])

thread = threading.Thread(target=run)
thread.start()
thread.join()
print(len(os.sched_getaffinity(0)))
"""


@pytest.mark.skipif(not kernels.available(), reason="the CPU kernels are not compiled")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_team_of_two_has_a_core_each(threads):
    """And of the others that the process has, none is confined."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("needs two cores")
    code = PART.format(cores=set(cores), threads=threads)
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120).stdout
    confined = [(core,) for core in cores] if threads == 2 else []
    assert said.splitlines() == [str(confined), "2"]
