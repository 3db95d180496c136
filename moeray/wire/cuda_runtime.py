"""The calls of CUDA's runtime that hand memory from one process to another, which torch has none of in public.

torch shares its tensors, too (`torch.multiprocessing.reductions`), but it counts their readers in a file: one that is
killed is counted for ever, and its memory is never free again. Here the owner says when.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_void_p
from functools import cache

import torch

from moeray.wire.device_memory import DeviceMemoryError

HANDLE_BYTES = 64
OUT_OF_MEMORY = 2
_LAZY_PEER_ACCESS = 1


class _Handle(Structure):
    """cudaIpcMemHandle_t, which goes by value."""

    _fields_ = (("reserved", c_ubyte * HANDLE_BYTES),)


class CudaError(DeviceMemoryError):
    """A call failed; `code` is CUDA's."""

    def __init__(self, call: str, code: int, words: str) -> None:
        super().__init__(f"{call} failed: {words} ({code})")
        self.code = code


class CudaRuntime:
    """`library`: libcudart. All calls are about the device that is current in the calling thread, and raise
    CudaError."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.cudaMalloc.argtypes = [POINTER(c_void_p), c_size_t]
        library.cudaFree.argtypes = [c_void_p]
        library.cudaIpcGetMemHandle.argtypes = [POINTER(_Handle), c_void_p]
        library.cudaIpcOpenMemHandle.argtypes = [POINTER(c_void_p), _Handle, c_uint]
        library.cudaIpcCloseMemHandle.argtypes = [c_void_p]
        library.cudaGetLastError.argtypes = []
        library.cudaGetErrorString.argtypes = [c_int]
        library.cudaGetErrorString.restype = c_char_p

    def allocate(self, nbytes: int) -> int:
        """The address of new memory."""
        address = c_void_p()
        self._check("cudaMalloc", byref(address), nbytes)
        return address.value or 0

    def free(self, address: int) -> None:
        """Memory that was allocated here."""
        self._check("cudaFree", address)

    def handle_of(self, address: int) -> bytes:
        """By which another process opens what was allocated there; HANDLE_BYTES bytes."""
        handle = _Handle()
        self._check("cudaIpcGetMemHandle", byref(handle), address)
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        """The address of another process's memory."""
        address = c_void_p()
        given = _Handle.from_buffer_copy(handle)
        self._check("cudaIpcOpenMemHandle", byref(address), given, _LAZY_PEER_ACCESS)
        return address.value or 0

    def close(self, address: int) -> None:
        """Memory that was opened."""
        self._check("cudaIpcCloseMemHandle", address)

    def _check(self, call: str, *args: object) -> None:
        code = getattr(self._library, call)(*args)
        if code:
            self._library.cudaGetLastError()  # else torch takes it for the failure of its own next call
            raise CudaError(call, code, self._library.cudaGetErrorString(code).decode())


@cache
def cuda_runtime() -> CudaRuntime:
    """That which torch has loaded. Raises DeviceMemoryError where torch is not built for CUDA."""
    if torch.version.cuda is None:
        raise DeviceMemoryError("this torch is not built for CUDA; install one that is")
    name = f"libcudart.so.{torch.version.cuda.split('.')[0]}"
    try:
        return CudaRuntime(ctypes.CDLL(name))
    except OSError as error:
        raise DeviceMemoryError(f"{name} cannot be loaded; add its folder to LD_LIBRARY_PATH") from error
