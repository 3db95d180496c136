"""What a process brings to rows over a device's memory: the memory, how much of it for a channel, and whether it must
be so."""

from __future__ import annotations

import logging
import threading

import torch

from moeray.errors import WireError
from moeray.settings.wire import RING_FROM, WireConfig
from moeray.wire.device_memory import DeviceMemory, DeviceMemoryError, Region
from moeray.wire.device_rings import OwnRing
from moeray.wire.lifeline import Lifeline
from moeray.wire.retired import Retired
from moeray.wire.ring import RingWriter

log = logging.getLogger(__name__)


class DeviceSide:
    """One for all channels of an actor. Thread-safe. `required`: `wire.device_rows` is `on`."""

    def __init__(self, memory: DeviceMemory, ring_bytes: int, *, required: bool) -> None:
        self.memory = memory
        self.retired = Retired()
        self._ring_bytes = ring_bytes
        self._required = required
        self._lock = threading.Lock()
        self._held = 0

    def new_ring(self, host: RingWriter) -> OwnRing:
        """A ring for a channel that has this one in host memory. Raises WireError where memory, or a descriptor, cannot
        be had."""
        self.retired.sweep()
        lifeline = Lifeline()
        try:
            region = self._allocate()
        except BaseException:
            lifeline.close()
            raise
        return OwnRing(region, lifeline, host)

    def _allocate(self) -> Region:
        region = self.memory.allocate(self._ring_bytes)
        give_back = region.give_back

        def counted() -> None:
            give_back()
            self._count(-self._ring_bytes)

        region.give_back = counted
        self._count(self._ring_bytes)
        return region

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._held += nbytes

    @property
    def held_bytes(self) -> int:
        """Device memory of all rings of this side, those included that peers have not let go of."""
        self.retired.sweep()
        return self._held

    def go_without(self, peer: str, why: str) -> None:
        """Rows to this peer and back go through the host's memory. Raises WireError where they must not."""
        if self._required:
            raise WireError(f"rows to {peer} cannot stay on the device: {why}; or set wire.device_rows: auto")
        log.warning("rows to %s and back go through the host's memory: %s", peer, why)


def device_side(device: torch.device, wire: WireConfig, memory: DeviceMemory | None = None) -> DeviceSide | None:
    """Of an actor on this device; None on a CPU, and where `wire.device_rows` or `wire.shared_memory_bytes` is off.

    `memory`: instead of a GPU's own. Raises WireError where `on` cannot be.
    """
    if wire.device_rows == "off" or (memory is None and device.type != "cuda"):
        return None
    if wire.shared_memory_bytes < RING_FROM:
        return None
    required = wire.device_rows == "on"
    if memory is None:
        from moeray.wire.cuda_memory import CudaMemory

        try:
            memory = CudaMemory(device)
        except DeviceMemoryError as error:
            if required:
                raise
            log.warning("rows go through the host's memory: %s", error)
            return None
    return DeviceSide(memory, wire.shared_memory_bytes & -RING_FROM, required=required)
