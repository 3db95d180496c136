"""Memory that another process opens by its handle, and how its owner learns that nobody has it open any more."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch

from moeray.errors import WireError
from moeray.wire.device_memory import DeviceMemoryError
from moeray.wire.host_memory import HostMemory
from moeray.wire.lifeline import Lifeline, take_hold
from moeray.wire.retired import Retired
from tests.device_peers import MEMORIES, device_of
from tests.wire.support import eventually

SPAWN = multiprocessing.get_context("spawn")
SIZE = 1 << 16


def memory_of(kind):
    if kind == "host":
        return HostMemory()
    from moeray.wire.cuda_memory import CudaMemory

    return CudaMemory(device_of(kind))


def read_and_wait(kind, handle, name, path, pipe):
    """What another process does with it, until the pipe ends."""
    held, memory = take_hold(path), memory_of(kind)
    region = memory.open(handle, name, SIZE)
    pipe.send(region.memory.cpu().numpy().tobytes())
    if pipe.poll(None) and pipe.recv() == "again":
        pipe.send(region.memory.cpu().numpy().tobytes())
        pipe.recv()
    region.close()
    os.close(held)


class Reader:
    def __init__(self, kind, region, lifeline):
        self.pipe, theirs = SPAWN.Pipe()
        args = (kind, region.handle, region.device_name, lifeline.path, theirs)
        self.process = SPAWN.Process(target=read_and_wait, args=args)
        self.process.start()
        theirs.close()


def numbers(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (SIZE,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("end", ["closes", "is killed"])
@pytest.mark.parametrize("kind", MEMORIES)
def test_another_process_reads_what_is_written_until_it_lets_go(kind, end):
    memory, lifeline, retired, given_back = memory_of(kind), Lifeline(), Retired(), []
    region = memory.allocate(SIZE)
    give_back = region.give_back
    region.give_back = lambda: (give_back(), given_back.append(True))
    region.memory.copy_(numbers(1))
    memory.settle()
    reader = Reader(kind, region, lifeline)
    try:
        assert reader.pipe.recv() == numbers(1).numpy().tobytes()
        lifeline.handed_over()
        region.memory.copy_(numbers(2))
        memory.settle()
        reader.pipe.send("again")
        assert reader.pipe.recv() == numbers(2).numpy().tobytes()
        retired.add(region, lifeline)
        assert retired.sweep() == SIZE
        assert not given_back
        if end == "closes":
            reader.pipe.send("done")
        else:
            reader.process.kill()
        assert eventually(lambda: retired.sweep() == 0)
        assert given_back == [True]
    finally:
        reader.process.kill()
        reader.process.join()


def test_memory_that_nobody_took_is_free_at_once():
    memory, lifeline, retired = HostMemory(), Lifeline(), Retired()
    lifeline.handed_over()
    retired.add(memory.allocate(SIZE), lifeline)
    assert retired.sweep() == 0


def test_nothing_is_left_open():
    before = len(os.listdir("/proc/self/fd"))
    memory, lifeline = HostMemory(), Lifeline()
    region = memory.allocate(SIZE)
    opened, held = memory.open(region.handle, region.device_name, SIZE), take_hold(lifeline.path)
    opened.close()
    opened.close()
    os.close(held)
    region.close()
    lifeline.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("handle", "name", "words"),
    [
        (b"/etc/passwd", "host", "none of this host's"),
        (b"/proc/1/fd/../../../etc/passwd", "host", "none of this host's"),
        (b"/proc/self/fd/1", "host", "none of this host's"),
        (b"/proc/1/fd/1000000", "host", "cannot be opened"),
        (None, "GPU-1", "none of this host's"),
    ],
)
def test_memory_that_is_none_is_refused(handle, name, words):
    memory = HostMemory()
    region = memory.allocate(SIZE)
    with pytest.raises(DeviceMemoryError, match=words):
        memory.open(handle or region.handle, name, SIZE)
    region.close()


def test_memory_of_another_size_is_refused():
    memory = HostMemory()
    region = memory.allocate(SIZE)
    for wrong in (SIZE - 4096, SIZE + 4096):
        with pytest.raises(DeviceMemoryError, match="sealed"):
            memory.open(region.handle, region.device_name, wrong)
    region.close()


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/fd/0", "/proc/1/fd/1000000", ""])
def test_a_lifeline_that_is_none_is_refused(path):
    with pytest.raises(WireError, match=r"lifeline|not seen here"):
        take_hold(path)
