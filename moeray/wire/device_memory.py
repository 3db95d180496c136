"""Memory of a device that two processes of a node see: what a ring of rows needs of CUDA, and no more.

There are two: `cuda_memory.py` for GPUs, and `host_memory.py`, whose device is the CPU. Nothing else of the wire knows
which one it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moeray.errors import WireError


class DeviceMemoryError(WireError):
    """Memory on the device cannot be had, or not be opened here; the message says why and how to mend it."""


@dataclass(eq=False)
class Region:
    """`memory`: bytes on a device, uint8 [nbytes]. `handle` and `device_name`: what another process opens it by.

    `close` gives it back, once; what was `memory`, and its views, must not be used any more then.
    """

    memory: Tensor
    handle: bytes
    device_name: str
    give_back: Callable[[], None] = field(repr=False)
    closed: bool = False

    def close(self) -> None:
        """A second call does nothing."""
        if not self.closed:
            self.closed, self.memory = True, torch.empty(0, dtype=torch.uint8)
            self.give_back()


class DeviceMemory(Protocol):
    """A device as its own process sees it. Thread-safe."""

    @property
    def kind(self) -> str:
        """`cuda` or `host`: both ends of a channel need the same."""

    @property
    def device(self) -> torch.device:
        """Tensors of this device are copied to its regions and from them."""

    def allocate(self, nbytes: int) -> Region:
        """New memory of this process, `nbytes` above 0. Its owner closes it after whoever has opened it has done so, or
        is dead. Raises DeviceMemoryError."""

    def open(self, handle: bytes, device_name: str, nbytes: int) -> Region:
        """Another process's region of `nbytes`, to be read. Its device is this one, or another one that this process
        sees and this device reads without a detour. Raises DeviceMemoryError."""

    def settle(self) -> None:
        """Wait until the device has done all that this thread has asked of it: what was written is there for every
        process, and what was read is read no more."""
