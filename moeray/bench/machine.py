"""A machine's ceilings, measured: bytes read a second, and operations a second."""

from __future__ import annotations

import glob
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from moeray.errors import ConfigError
from moeray.model.kernels import available
from moeray.model.kernels.native import Instructions, best_instructions, multiply, read_all
from moeray.model.pages import zeros_on_demand


class Machine(Protocol):
    """`what`: its name or kind; `multiplies`: the numbers whose products the ceiling is of."""

    device: torch.device
    what: str
    multiplies: str
    cache_bytes: int

    def seconds(self, call: Callable[[], Any]) -> float:
        """Wall time until the work of a call is done."""

    def read_rate(self) -> float:
        """Bytes a second, at best of a few readings of memory that was not read before."""

    def multiply_rate(self) -> float:
        """Operations a second, at best of a few."""


def machine_of(device: str) -> Machine:
    """Raises ConfigError where there is nothing to measure with."""
    if device == "cpu":
        if not available():
            raise ConfigError(
                "the CPU kernels were not compiled, so there is nothing to measure; see the warning above"
            )
        return Cpu()
    if not torch.cuda.is_available():
        raise ConfigError("device cuda: there is no GPU here, or this torch is built without CUDA; use --device cpu")
    return Gpu()


class Cpu:
    """On torch's number of threads."""

    device = torch.device("cpu")
    _BYTES, _TIMES, _TURNS = 64 << 20, 100_000, 3

    def __init__(self) -> None:
        self.what = f"{best_instructions().name.lower()} kernels"
        self.multiplies = "bf16" if best_instructions() >= Instructions.AVX512_BF16 else "fp32"
        self.cache_bytes = last_cache_bytes()
        self._memory = zeros_on_demand((self._TURNS, self._BYTES), torch.uint8, self.device).fill_(1)

    def seconds(self, call: Callable[[], Any]) -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    def read_rate(self) -> float:
        return max(self._BYTES / self.seconds(partial(read_all, part)) for part in self._memory)

    def multiply_rate(self) -> float:
        rates = []
        for _ in range(self._TURNS):
            began = time.perf_counter()
            operations = multiply(self._TIMES)
            rates.append(operations / (time.perf_counter() - began))
        return max(rates)


class Gpu:
    """The current CUDA device. Its ceilings: torch's own sum over much memory, and its matrix product."""

    device = torch.device("cuda")
    multiplies = "bf16"
    _BYTES, _SIDE, _TURNS = 1 << 30, 8192, 3

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(self.device)
        self.what = str(properties.name)
        self.cache_bytes = int(properties.L2_cache_size)
        self._memory = torch.ones(self._BYTES // 4, device=self.device)
        self._matrix = torch.randn(self._SIDE, self._SIDE, device=self.device, dtype=torch.bfloat16)
        self._memory.sum(), self._matrix @ self._matrix  # loads what they are computed with

    def seconds(self, call: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    def read_rate(self) -> float:
        return max(self._BYTES / self.seconds(self._memory.sum) for _ in range(self._TURNS))

    def multiply_rate(self) -> float:
        operations = 2 * self._SIDE**3
        return max(operations / self.seconds(lambda: self._matrix @ self._matrix) for _ in range(self._TURNS))


def last_cache_bytes() -> int:
    """Size of the last cache that Linux tells of; 64 MiB where it tells of none."""
    sizes = [Path(path).read_text().strip() for path in glob.glob("/sys/devices/system/cpu/cpu0/cache/index*/size")]
    return max((int(size.removesuffix("K")) << 10 for size in sizes if size.endswith("K")), default=64 << 20)
