"""A GPU's memory, by CUDA IPC. It has not run on a card yet: the tests do so where there is one.

Devices go by their UUID: Ray gives each actor a CUDA_VISIBLE_DEVICES of its own, so that a card's index differs from
process to process, and the cards of others are not there at all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moeray.wire.cuda_runtime import HANDLE_BYTES, OUT_OF_MEMORY, CudaError, CudaRuntime, cuda_runtime
from moeray.wire.device_memory import DeviceMemoryError, Region

log = logging.getLogger(__name__)

_WHOLE = 2 << 20
"""Bytes; CUDA's runtime cuts smaller allocations from one that it shares as a whole."""
_OWN: dict[bytes, int] = {}
"""Where this process's own regions lie, by their handles."""


class _Bytes:
    """What torch makes a tensor of, by the protocol that libraries for CUDA have in common."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3,
        }  # fmt: skip


class CudaMemory:
    """See `DeviceMemory`. `device`: `cuda`, or one of several by its index."""

    kind = "cuda"

    def __init__(self, device: torch.device) -> None:
        """Raises DeviceMemoryError where CUDA's runtime cannot be had."""
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self._runtime: CudaRuntime = cuda_runtime()
        torch.zeros(1, device=self.device)  # what CUDA does at its first use, no peer waits for

    def allocate(self, nbytes: int) -> Region:
        """See `DeviceMemory`. Not torch's allocator: only what CUDA itself allocated goes to another process whole, and
        of less than `_WHOLE` it would hand over what lies beside it."""
        runtime = self._runtime
        with torch.cuda.device(self.device):
            address = self._allocate(-(-nbytes // _WHOLE) * _WHOLE)
            try:
                handle, memory = runtime.handle_of(address), _tensor(address, nbytes, self.device)
            except BaseException:
                runtime.free(address)
                raise
        _OWN[handle] = address

        def give_back() -> None:
            _OWN.pop(handle, None)
            _undo(runtime.free, address, self.device)

        return Region(memory, handle, uuid_of(self.device), give_back)

    def _allocate(self, nbytes: int) -> int:
        try:
            return self._runtime.allocate(nbytes)
        except CudaError as error:
            if error.code != OUT_OF_MEMORY:
                raise
        torch.cuda.empty_cache()  # torch keeps what its tensors have left
        return self._runtime.allocate(nbytes)

    def open(self, handle: bytes, device_name: str, nbytes: int) -> Region:
        """See `DeviceMemory`. CUDA maps the memory on the card where it lies, as this process numbers it."""
        if len(handle) != HANDLE_BYTES:
            raise DeviceMemoryError(f"the peer's handle has {len(handle)} bytes instead of {HANDLE_BYTES}")
        visible = {uuid_of(device): device for device in _devices()}
        where = device_named(device_name, visible, self.device, torch.cuda.can_device_access_peer)
        runtime, own = self._runtime, _OWN.get(handle)
        with torch.cuda.device(where):
            if own is not None:  # CUDA opens no handle in the process that made it
                return Region(_tensor(own, nbytes, where), handle, device_name, lambda: None)
            address = runtime.open(handle)
            try:
                memory = _tensor(address, nbytes, where)
            except BaseException:
                runtime.close(address)
                raise
        return Region(memory, handle, device_name, lambda: _undo(runtime.close, address, where))

    def settle(self) -> None:
        """See `DeviceMemory`: all of the thread's stream. What another process starts after it sees what was
        written."""
        torch.cuda.current_stream(self.device).synchronize()


def _tensor(address: int, nbytes: int, device: torch.device) -> Tensor:
    """The memory itself, and no copy of it."""
    tensor = torch.as_tensor(_Bytes(address, nbytes), device=device)
    if tensor.data_ptr() != address:
        raise DeviceMemoryError(f"torch {torch.__version__} copies foreign memory of {device} instead of using it")
    return tensor


def _undo(call: Callable[[int], None], address: int, device: torch.device) -> None:
    """Once what a forward that failed has left behind is done, too. Not the whole device is waited for: another thread
    may be capturing a graph."""
    try:
        with torch.cuda.device(device):
            torch.cuda.current_stream(device).synchronize()
            call(address)
    except (CudaError, RuntimeError) as error:  # of a context that is broken; the process ends with it
        log.warning("a GPU's memory could not be given back: %s", error)


def device_named(
    name: str, visible: Mapping[str, torch.device], own: torch.device,
    reaches: Callable[[torch.device, torch.device], bool],
) -> torch.device:  # fmt: skip
    """The card of that UUID as this process numbers it. `reaches(own, other)`: whether a card reads the other's memory.
    Raises DeviceMemoryError where it is not visible, or out of reach."""
    where = visible.get(name)
    if where is None:
        raise DeviceMemoryError(f"the peer's GPU {name} is not visible here; give both actors a part of one GPU")
    if where != own and not reaches(own, where):
        raise DeviceMemoryError(f"the peer's GPU {name} is out of reach of this one's memory (no peer access)")
    return where


def uuid_of(device: torch.device) -> str:
    """The card's name, the same in every process."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _devices() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
