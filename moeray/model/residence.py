"""Bringing mapped weights to where a product finds them at once, before there is one that waits."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable

from torch import Tensor

_POPULATE_READ = 22  # of madvise, in Linux from 5.14 on; Python's mmap does not name it
_libc = ctypes.CDLL(None)


def fault_in(tensors: Iterable[Tensor]) -> None:
    """Enter the pages of CPU tensors in this process's page table, and read from its file what is not in memory yet.

    A product over mapped weights would do that page by page, with a router waiting for it. A kernel that does not know
    how, or a file that cannot be read, changes nothing here: the product comes upon it.
    """
    for tensor in tensors:
        if tensor.is_cpu and tensor.numel():
            begin, end = tensor.data_ptr(), tensor.data_ptr() + _extent(tensor)
            begin -= begin % mmap.PAGESIZE
            _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _POPULATE_READ)


def _extent(tensor: Tensor) -> int:
    """Bytes from its first element to the end of its last one in memory."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.itemsize
