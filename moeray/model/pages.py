"""Large memory: of which much may never be used, and which is read faster where its pages are large.

A CPU keeps the places of some thousand pages at hand. Of small ones that is a few megabytes, and weights that pass by
from memory wait for a place to be looked up once a page, in a virtual machine for as long as the page takes to read.
"""

from __future__ import annotations

import math
import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor


def prefer_large(memory: mmap.mmap) -> None:
    """Ask Linux for pages of 2 MiB where it has such. A file's are read so much at once, and stay small where it is in
    memory in small ones already, or where the file system or Linux (before 6.16 on ext4) knows no others."""
    if sys.platform == "linux":
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)


def zeros_on_demand(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On the CPU under Linux a page, a large one where it can be, comes from the system when it is first
    touched: gigabytes take no time before they are used."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or sys.platform != "linux" or not nbytes:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    prefer_large(memory)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
