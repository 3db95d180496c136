"""Memory that kernels and channels fill, aligned to the lines of a CPU's cache."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ALIGN = 64
KEPT_BYTES = 16 << 20
"""Larger memory than this is not kept for the next use, where most uses need far less."""

Bytes = npt.NDArray[np.uint8]


def aligned(size: int) -> int:
    """`size` rounded up to a multiple of 64."""
    return (size + ALIGN - 1) & -ALIGN


def new_buffer(size: int) -> Bytes:
    """A writable uint8 array of `size` bytes, 64 at least, whose start is 64-byte aligned; its content is undefined."""
    memory = np.empty(size + 2 * ALIGN, np.uint8)
    skipped = -memory.ctypes.data % ALIGN
    return memory[skipped : skipped + max(size, ALIGN)]
