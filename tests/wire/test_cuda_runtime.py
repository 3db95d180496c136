"""The calls of CUDA's runtime, of a library with the same signatures where there is no GPU (`cudart.c`)."""

from __future__ import annotations

import ctypes
import multiprocessing
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from moeray.wire.cuda_runtime import HANDLE_BYTES, OUT_OF_MEMORY, CudaError, CudaRuntime, cuda_runtime
from moeray.wire.device_memory import DeviceMemoryError

SIZE = 8192
COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("cudart") / "libcudart.so"
    source = Path(__file__).with_name("cudart.c")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", path, source], check=True)
    return path


def read_and_write(library, handle, pipe):
    """In another process, which opens what this one has allocated."""
    runtime = CudaRuntime(ctypes.CDLL(library))
    address = runtime.open(handle)
    pipe.send(ctypes.string_at(address, SIZE))
    ctypes.memset(address, 7, SIZE)
    runtime.close(address)
    with pytest.raises(CudaError):
        runtime.close(address)
    pipe.send("done")


def test_another_process_opens_what_was_allocated(library):
    runtime = CudaRuntime(ctypes.CDLL(library))
    address = runtime.allocate(SIZE)
    ctypes.memset(address, 5, SIZE)
    handle = runtime.handle_of(address)
    assert len(handle) == HANDLE_BYTES
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=read_and_write, args=(library, handle, theirs))
    process.start()
    theirs.close()
    assert ours.recv() == b"\x05" * SIZE
    assert ours.recv() == "done"
    process.join(20)
    assert ctypes.string_at(address, SIZE) == b"\x07" * SIZE
    runtime.free(address)


def test_a_failure_says_which_call_and_why_and_torch_hears_nothing_of_it(library):
    loaded = ctypes.CDLL(library)
    runtime = CudaRuntime(loaded)
    with pytest.raises(CudaError, match=r"^cudaMalloc failed: out of memory \(2\)$") as raised:
        runtime.allocate(1 << 30)
    assert raised.value.code == OUT_OF_MEMORY
    assert loaded.cudaGetLastError() == 0
    for call in (runtime.free, runtime.close, runtime.handle_of):
        with pytest.raises(CudaError, match="invalid argument"):
            call(4096)
    with pytest.raises(CudaError, match="cudaIpcOpenMemHandle"):
        runtime.open(b"x" * HANDLE_BYTES)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_a_torch_without_cuda_has_no_runtime():
    with pytest.raises(DeviceMemoryError, match="not built for CUDA"):
        cuda_runtime()
