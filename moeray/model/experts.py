"""The experts that one actor hosts, and their forward: rows in, rows out, no state.

Shapes: R rows sorted by expert, D hidden size, I intermediate size, E distinct experts of a call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from moeray.config import ExpertKernel
from moeray.errors import PlacementError
from moeray.model.family import ExpertsLayer, Family
from moeray.model.int8 import Int8Cache
from moeray.model.kernels.experts import KernelExpert, KernelLayer
from moeray.model.kernels.layers import LayerKernels
from moeray.model.slices import ExpertTensor
from moeray.types import ExpertId

FP32_FROM_ROWS = 6
_ALLOCATION_FAILED = ("DefaultCPUAllocator", "CUDA error: out of memory")
_SLOW_BF16 = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


@dataclass(frozen=True)
class _Linear:
    """y = x W^T + b over a weight in its stored form; dense parts are used where they lie, the rest decoded at use."""

    weight: ExpertTensor
    bias: Tensor | None
    transposed: bool
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x_RI: Tensor) -> Tensor:
        out_dim = 1 if self.transposed else 0
        if len(self.weight.parts) > 1 and self.weight.cat_dim != out_dim:
            matrices = [self.weight.dense(self.dtype)]
        else:
            matrices = [part.dense(self.dtype) for part in self.weight.parts]
        outs = [_product(x_RI, m.t() if self.transposed else m) for m in matrices]
        out_RO = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
        return out_RO if self.bias is None else out_RO + self.bias


def _product(x_RI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T. A CPU without bf16 instructions multiplies faster in fp32, from a few rows on, decoding included."""
    if x_RI.dtype is torch.bfloat16 and len(x_RI) >= FP32_FROM_ROWS and x_RI.device.type == "cpu" and _SLOW_BF16:
        return F.linear(x_RI.float(), weight_OI.float()).to(torch.bfloat16)
    return F.linear(x_RI, weight_OI)


@dataclass(frozen=True)
class _Expert:
    """`kernel` is None where the products run on torch."""

    up: _Linear
    down: _Linear
    nbytes: int
    kernel: KernelExpert | None


class ExpertWeights(Protocol):
    """Where a bank's experts come from, such as a `WeightMap`."""

    def expert(self, name: str, expert: int) -> ExpertTensor:
        """One expert's slice of the fused parameter `name`."""


class ExpertBank:
    """Weights of a set of experts, and their forward. Thread-safe: a forward only reads.

    CPU weights are views of the checkpoint's memory map, shared by every process of the node; on another device they
    are copied there.
    """

    def __init__(
        self,
        family: Family,
        weights: ExpertWeights,
        dtype: torch.dtype,
        device: torch.device,
        kernel: ExpertKernel = "auto",
        int8: Int8Cache | None = None,
    ) -> None:
        """`int8`: where dense weights are kept rounded, or None to use them as they are.

        `kernel`: see `choose_kernel`; layers that it does not know run on torch. Raises ConfigError.
        """
        self._family = family
        self._weights = weights
        self._dtype = dtype
        self._device = device
        self._int8 = int8
        self._kernels = LayerKernels(family, dtype, device, kernel)
        self._copies = device.type != "cpu" or self._kernels.kernel == "triton"
        self._lock = threading.Lock()  # guards the table, never held while weights are read
        self._experts: dict[ExpertId, _Expert] = {}

    def load(self, experts: Iterable[ExpertId], progress: Callable[[int], None] = lambda done: None) -> None:
        """Map the experts' slices. `progress` gets the number loaded so far. Raises CheckpointError."""
        for done, expert in enumerate(sorted(experts), start=1):
            if expert not in self._experts:
                loaded = self._load(expert)
                with self._lock:
                    self._experts[expert] = loaded
            progress(done)

    def forget(self, experts: Iterable[ExpertId]) -> None:
        """Host these no more; those that are not hosted are passed over."""
        with self._lock:
            for expert in experts:
                self._experts.pop(expert, None)

    def _load(self, expert: ExpertId) -> _Expert:
        moe = self._family.layers[expert.layer]
        up = self._linear(moe, moe.up_name, expert.expert)
        down = self._linear(moe, "down_proj", expert.expert)
        nbytes = up.nbytes + down.nbytes
        biases = {name: x.bias for name, x in ((moe.up_name, up), ("down_proj", down)) if x.bias is not None}
        return _Expert(up, down, nbytes, self._kernels.expert(moe, up.weight, down.weight, biases))

    def _linear(self, moe: ExpertsLayer, name: str, expert: int) -> _Linear:
        full, bias = f"{moe.name}.{name}", None
        if self._int8 is None:
            weight = self._weights.expert(full, expert)
        else:
            weight = self._int8.expert(full, expert, moe.is_transposed, lambda: self._weights.expert(full, expert))
        if f"{name}_bias" in moe.shapes:
            bias = self._weights.expert(f"{full}_bias", expert).dense(self._dtype).to(self._device)
        if self._copies:
            weight = weight.to(self._device).by_outputs(moe.is_transposed)
        return _Linear(weight, bias, moe.is_transposed, self._dtype)

    @property
    def hosted(self) -> frozenset[ExpertId]:
        with self._lock:
            return frozenset(self._experts)

    @property
    def nbytes(self) -> int:
        """Stored bytes of the hosted experts."""
        with self._lock:
            return sum(expert.nbytes for expert in self._experts.values())

    def missing(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Those of a layer's experts that are not hosted."""
        with self._lock:
            return [expert for expert in experts if ExpertId(layer, expert) not in self._experts]

    def forward(self, layer: int, x_RD: Tensor, experts: list[int], counts: list[int]) -> Tensor:
        """Rows sorted by expert -> each expert's output, in the same order [R, D].

        `experts`: the distinct experts in order; `counts`: rows of each, summing to R. Raises PlacementError for an
        expert that is not hosted here.
        """
        return self.hold(layer, experts)(x_RD, counts)

    def hold(self, layer: int, experts: list[int]) -> HeldExperts:
        """These experts' weights, also where they are forgotten meanwhile. Raises PlacementError as `forward`."""
        with self._lock:
            found = [self._experts.get(ExpertId(layer, expert)) for expert in experts]
        held = [expert for expert in found if expert is not None]
        if len(held) < len(experts):
            raise PlacementError(
                f"expert {experts[found.index(None)]} of layer {layer} is not hosted here; the sender's epoch is stale"
            )
        return HeldExperts(
            self._family.layers.get(layer), self._kernels.of(layer), dict(zip(experts, held, strict=True))
        )


@dataclass(frozen=True)
class HeldExperts:
    """The weights of one forward."""

    _moe: ExpertsLayer | None
    _kernel: KernelLayer | None
    _experts: dict[int, _Expert]

    @torch.inference_mode()
    def __call__(self, x_RD: Tensor, counts: list[int]) -> Tensor:
        """As `ExpertBank.forward`, for the experts that are held."""
        if self._moe is None or not self._experts:
            return x_RD.new_empty(0, x_RD.shape[-1])
        experts = list(self._experts.values())
        known = [expert.kernel for expert in experts if expert.kernel is not None]
        if self._kernel is not None and len(known) == len(experts):
            return self._kernel.forward(known, x_RD, counts)
        act = self._moe.activate
        pieces = zip(experts, torch.split(x_RD, counts), strict=True)
        return torch.cat([expert.down(act(expert.up(x_rD))) for expert, x_rD in pieces])

    def with_those_of(self, others: Iterable[HeldExperts]) -> HeldExperts:
        """All of them, in the experts' order; those of one layer of one bank."""
        experts = dict(self._experts)
        for other in others:
            experts |= other._experts
        return replace(self, _experts=dict(sorted(experts.items())))


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. torch raises a plain RuntimeError where that was on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATION_FAILED)
