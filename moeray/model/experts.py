"""The experts that one actor hosts, and their forward: rows in, rows out, no state.

Shapes: R rows sorted by expert, D hidden size, I intermediate size, E distinct experts of a call.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterable, Mapping
from ctypes import addressof
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moeray.errors import PlacementError
from moeray.model.expert_tensor import ExpertTensor
from moeray.model.expert_weights import ExpertWeights, refusal
from moeray.model.family import ExpertsLayer, Family
from moeray.model.int8 import Int8Cache
from moeray.model.kernels.experts import KernelExpert, KernelLayer, NativeLayer
from moeray.model.kernels.layers import LayerKernels
from moeray.model.kernels.native import CALL_FORMATS, Block
from moeray.model.residence import fault_in
from moeray.settings.experts import ExpertKernel
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
    """`kernel` is None, and `address` 0, where the products run on torch."""

    up: _Linear
    down: _Linear
    nbytes: int
    kernel: KernelExpert | None
    address: int


class ExpertTable(NamedTuple):
    """A layer's experts for the kernels in C: where its form lies, the width of its rows, and where each expert's
    structure lies, int64 by the expert's number, 0 for one that is not hosted; `kept` keeps them alive."""

    form: int
    width: int
    addresses: bytes
    kept: tuple[NativeLayer, Mapping[int, _Expert]]


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
        self._lock = threading.Lock()  # held for a change, never while weights are read
        self._layers: dict[int, Mapping[int, _Expert]] = {}  # each layer's experts: replaced, never changed
        self.tables: dict[int, ExpertTable] = {}
        """The same of the layers that the kernels in C compute, to be read only."""

    def load(self, experts: Iterable[ExpertId], progress: Callable[[int], None] = lambda done: None) -> None:
        """Map the experts' slices. `progress` gets the number loaded so far. Raises CheckpointError."""
        for done, expert in enumerate(sorted(experts), start=1):
            if expert.expert not in self._of(expert.layer):
                loaded = self._load(expert)
                with self._lock:
                    self._put(expert.layer, {**self._of(expert.layer), expert.expert: loaded})
            progress(done)

    def fault_in(self, experts: Iterable[ExpertId], until: Callable[[], bool] = lambda: False) -> None:
        """Bring the mapped weights of those that are hosted into this process's page table, until it is `until`."""
        for layer, expert in experts:
            held = self._of(layer).get(expert)
            if until():
                return
            for linear in (held.up, held.down) if held is not None else ():
                fault_in(tensor for part in linear.weight.parts for tensor in part.tensors)

    def forget(self, experts: Iterable[ExpertId]) -> None:
        """Host these no more; those that are not hosted are passed over."""
        with self._lock:
            for layer, gone in _by_layer(experts).items():
                self._put(layer, {e: held for e, held in self._of(layer).items() if e not in gone})

    def _put(self, layer: int, experts: Mapping[int, _Expert]) -> None:
        """The lock is held."""
        self._layers[layer] = experts
        kernel = self._kernels.of(layer)
        if isinstance(kernel, NativeLayer) and experts:
            self.tables[layer] = _table(kernel, experts)
        else:
            self.tables.pop(layer, None)

    def _of(self, layer: int) -> Mapping[int, _Expert]:
        return self._layers.get(layer, {})

    def _load(self, expert: ExpertId) -> _Expert:
        moe = self._family.layers[expert.layer]
        up = self._linear(moe, moe.up_name, expert.expert)
        down = self._linear(moe, "down_proj", expert.expert)
        nbytes = up.nbytes + down.nbytes
        biases = {name: x.bias for name, x in ((moe.up_name, up), ("down_proj", down)) if x.bias is not None}
        kernel = self._kernels.expert(moe, up.weight, down.weight, biases)
        return _Expert(up, down, nbytes, kernel, kernel.address if kernel is not None else 0)

    def _linear(self, moe: ExpertsLayer, name: str, expert: int) -> _Linear:
        full, bias = f"{moe.name}.{name}", None
        if self._int8 is None:
            weight = self._weights.expert(full, expert)
        else:
            weight = self._int8.expert(full, expert, moe.is_transposed, self._weights)
        if f"{name}_bias" in moe.shapes:
            bias = self._weights.expert(f"{full}_bias", expert).dense(self._dtype).to(self._device)
        if self._copies:
            weight = weight.to(self._device).by_outputs(moe.is_transposed)
            if not weight.looks_finite():  # every byte has been read just now
                raise refusal(self._weights, full, expert)
        return _Linear(weight, bias, moe.is_transposed, self._dtype)

    @property
    def hosted(self) -> frozenset[ExpertId]:
        with self._lock:
            return frozenset(ExpertId(layer, expert) for layer, experts in self._layers.items() for expert in experts)

    @property
    def nbytes(self) -> int:
        """Stored bytes of the hosted experts."""
        with self._lock:
            return sum(expert.nbytes for experts in self._layers.values() for expert in experts.values())

    def hold_any(self) -> tuple[ExpertId, HeldExperts] | None:
        """One of the hosted experts, if there is any."""
        with self._lock:
            layers = list(self._layers.items())
        for layer, hosted in layers:
            for expert, held in hosted.items():
                return ExpertId(layer, expert), self._held(layer, {expert: held})
        return None

    def missing(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Those of a layer's experts that are not hosted."""
        hosted = self._of(layer)
        return [expert for expert in experts if expert not in hosted]

    def forward(self, layer: int, x_RD: Tensor, experts: list[int], counts: list[int]) -> Tensor:
        """Rows sorted by expert -> each expert's output, in the same order [R, D].

        `experts`: the distinct experts in order; `counts`: rows of each, summing to R. Raises PlacementError for an
        expert that is not hosted here.
        """
        return self.hold(layer, experts)(x_RD, counts)

    def hold(self, layer: int, experts: list[int]) -> HeldExperts:
        """These experts' weights, also where they are forgotten meanwhile. Raises PlacementError as `forward`."""
        hosted = self._of(layer)
        try:
            held = {expert: hosted[expert] for expert in experts}
        except KeyError as missing:
            raise PlacementError(
                f"expert {missing} of layer {layer} is not hosted here; the sender's epoch is stale"
            ) from None
        return self._held(layer, held)

    def _held(self, layer: int, experts: Mapping[int, _Expert]) -> HeldExperts:
        return HeldExperts(self._family.layers.get(layer), self._kernels.of(layer), experts)


def _table(kernel: NativeLayer, experts: Mapping[int, _Expert]) -> ExpertTable:
    addresses = [0] * (max(experts) + 1)
    for number, expert in experts.items():
        addresses[number] = expert.address
    return ExpertTable(
        addressof(kernel.form), kernel.form.up.inputs, array("q", addresses).tobytes(), (kernel, experts)
    )


def _by_layer(experts: Iterable[ExpertId]) -> dict[int, set[int]]:
    layers: dict[int, set[int]] = {}
    for layer, expert in experts:
        layers.setdefault(layer, set()).add(expert)
    return layers


class HeldExperts(NamedTuple):
    """The weights of one forward."""

    moe: ExpertsLayer | None
    kernel: KernelLayer | None
    experts: Mapping[int, _Expert]

    @torch.inference_mode()
    def __call__(self, x_RD: Tensor, counts: list[int]) -> Tensor:
        """As `ExpertBank.forward`, for the experts that are held."""
        if self.moe is None or not self.experts:
            return x_RD.new_empty(0, x_RD.shape[-1])
        known = self._known()
        if self.kernel is not None and known is not None:
            return self.kernel.forward(known, x_RD, counts)
        act = self.moe.activate
        pieces = zip(self.experts.values(), torch.split(x_RD, counts), strict=True)
        return torch.cat([expert.down(act(expert.up(x_rD))) for expert, x_rD in pieces])

    def zeros(self, rows: int) -> Tensor:
        """Rows of zeros as the experts take them, [rows, D]."""
        up = next(iter(self.experts.values())).up
        return torch.zeros(rows, up.weight.shape[0 if up.transposed else 1], dtype=up.dtype)

    def compute_at(self, x: Block, index: bytes, counts: list[int], place: Callable[[], int], threads: int) -> bool:
        """The same without tensors: a row of x for each number of the index (int64); outputs go to the address that
        `place` says.

        False, and nothing is done, where the kernels in C do not compute these experts or x's dtype.
        Raises ValueError for rows of another width than the layer's.
        """
        addresses = [expert.address for expert in self.experts.values()]
        if not addresses or 0 in addresses or not isinstance(self.kernel, NativeLayer) or x.dtype not in CALL_FORMATS:
            return False
        self.kernel.compute_at(addresses, x, index, counts, place(), threads)
        return True

    def _known(self) -> list[KernelExpert] | None:
        """All of them as the kernels see them, if they do."""
        known = [expert.kernel for expert in self.experts.values() if expert.kernel is not None]
        return known if len(known) == len(self.experts) else None

    def with_those_of(self, others: Iterable[HeldExperts]) -> HeldExperts:
        """All of them, in the experts' order; those of one layer of one bank."""
        experts = dict(self.experts)
        for other in others:
            experts |= other.experts
        return self._replace(experts=dict(sorted(experts.items())))


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. torch raises a plain RuntimeError where that was on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATION_FAILED)
