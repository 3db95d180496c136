"""Shared memory of the host in the place of a device's: its tensors are the CPU's, its handle is a memfd's path.

The way of rows over a device's memory runs with it where there is no GPU.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re

import torch

from moeray.wire.device_memory import DeviceMemoryError, Region

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_HANDLE = re.compile(rb"/proc/\d+/fd/\d+")
_NAME = "host"


class HostMemory:
    """See `DeviceMemory`."""

    kind = "host"
    device = torch.device("cpu")

    def allocate(self, nbytes: int) -> Region:
        """See `DeviceMemory`. The kernel keeps its pages as long as any process maps them."""
        fd = os.memfd_create("moeray-device", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            mapping = mmap.mmap(fd, nbytes)
        except OSError as error:
            os.close(fd)
            raise DeviceMemoryError(f"no shared memory of {nbytes} bytes ({error.strerror})") from error
        handle = f"/proc/{os.getpid()}/fd/{fd}".encode()
        return Region(torch.frombuffer(mapping, dtype=torch.uint8), handle, _NAME, lambda: os.close(fd))

    def open(self, handle: bytes, device_name: str, nbytes: int) -> Region:
        """See `DeviceMemory`."""
        if device_name != _NAME or not _HANDLE.fullmatch(handle):
            raise DeviceMemoryError(f"memory of {device_name!r} is none of this host's")
        try:
            fd = os.open(handle, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise DeviceMemoryError(f"the peer's memory cannot be opened ({error.strerror})") from error
        try:
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS or os.fstat(fd).st_size != nbytes:
                raise DeviceMemoryError(f"the peer's memory is not a sealed one of {nbytes} bytes")
            mapping = mmap.mmap(fd, nbytes)
        except OSError as error:
            raise DeviceMemoryError(f"the peer's memory cannot be mapped ({error.strerror})") from error
        finally:
            os.close(fd)
        return Region(torch.frombuffer(mapping, dtype=torch.uint8), handle, _NAME, lambda: None)

    def settle(self) -> None:
        """See `DeviceMemory`: a CPU's writes are done when the call that makes them returns."""
