"""Experts on a GPU: two launches of a Triton kernel (grouped.py) for all experts of a layer that have rows.

Can be imported without triton; `available()` says whether it is there.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from subprocess import CalledProcessError
from typing import Any

import torch
from torch import Tensor

from moeray.model.expert_tensor import ExpertTensor
from moeray.model.family import ExpertsLayer
from moeray.model.kernels.experts import KernelExpert, KernelLayer, UnsupportedByKernelError
from moeray.model.kernels.layout import Expert, Format, Layer
from moeray.model.kernels.tiles import (
    CANDIDATES,
    DEFAULTS,
    Tile,
    Tiles,
    Trial,
    choose,
    inputs_at_once,
    spread,
    tile_for,
)

log = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ALIGNED = 16  # bytes: what a thread of a GPU loads at once
_CACHES_FULL, _COPIES = 2, 64  # weights of a trial, in the GPU's last cache, and at most so many experts


def available(device: torch.device) -> bool:
    """Whether triton is installed and computes there: on a GPU, or anywhere where its interpreter is switched on
    (TRITON_INTERPRET=1, for tests: it is very slow)."""
    return find_spec("triton") is not None and (device.type == "cuda" or interpreted())


@cache
def interpreted() -> bool:
    """Whether kernels run in triton's interpreter, on the CPU."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


class TritonLayer(KernelLayer):
    """Computed by the kernel in Triton, over weights on a GPU.

    Products are of the rows' dtype, with fp32 sums. Tiles are chosen when the layer's first expert is there, by running
    them; `measured` keeps what was found, for layers that are alike.
    """

    def __init__(self, moe: ExpertsLayer, dtype: torch.dtype, measured: dict[bytes, Tiles]) -> None:
        super().__init__(moe)
        self._dtype = dtype
        self._measured = measured
        self._tiles: Tiles = {}

    def expert(self, up: ExpertTensor, down: ExpertTensor, biases: dict[str, Tensor]) -> KernelExpert:
        expert, kept = self._describe(up, down, biases)
        if not self._tiles:
            self._tiles = self._choose_tiles(up, down, biases, kept[0].device)
        return _on_device(expert, kept)

    def forward(self, experts: Sequence[KernelExpert], x_RD: Tensor, counts: list[int]) -> Tensor:
        x = (x_RD if x_RD.dtype in _DTYPES else x_RD.float()).contiguous()
        with_rows = [(e.address, count) for e, count in zip(experts, counts, strict=True) if count]
        if not with_rows:
            return torch.empty_like(x_RD)
        addresses, counts = [address for address, _ in with_rows], [count for _, count in with_rows]
        return self._run(tile_for(self._tiles, counts), addresses, x, counts).to(x_RD.dtype)

    def _run(self, tile: Tile, addresses: list[int], x_RD: Tensor, counts: list[int]) -> Tensor:
        table = _table(tile, addresses, counts, x_RD.device)
        return self._launches(tile, table, x_RD)

    def _launches(self, tile: Tile, table: Tensor, x_RD: Tensor) -> Tensor:
        form = self.form
        inner_RI = x_RD.new_empty(len(x_RD), form.down.inputs)
        out_RD = x_RD.new_empty(len(x_RD), form.down.outputs)
        biased = [f"{name}_bias" in self._moe.shapes for name in (self._moe.up_name, "down_proj")]
        _launch(tile, form, table, x_RD, inner_RI, upwards=True, biased=biased[0])
        _launch(tile, form, table, inner_RI, out_RD, upwards=False, biased=biased[1])
        return out_RD

    # -- tiles ----------------------------------------------------------------------------------------------------

    def _choose_tiles(
        self, up: ExpertTensor, down: ExpertTensor, biases: dict[str, Tensor], device: torch.device
    ) -> Tiles:
        """Raises UnsupportedByKernelError where none runs."""
        if device.type != "cuda":
            return DEFAULTS  # interpreted, where time says nothing
        check_launcher()
        key = bytes(self.form)
        if key not in self._measured:
            began = time.perf_counter()
            self._measured[key] = self._measure(up, down, biases, device)
            took = time.perf_counter() - began
            log.info("tiles of layers like %d, measured in %.1f s: %s", self._moe.layer, took, self._measured[key])
        if not self._measured[key]:
            raise UnsupportedByKernelError("no tile of the kernel runs on this GPU (see the log)")
        return self._measured[key]

    def _measure(self, up: ExpertTensor, down: ExpertTensor, biases: dict[str, Tensor], device: torch.device) -> Tiles:
        cached = torch.cuda.get_device_properties(device).L2_cache_size
        count = min(_COPIES, math.ceil(_CACHES_FULL * cached / (up.nbytes + down.nbytes)))
        copies = [_on_device(*self._describe(deepcopy(up), deepcopy(down), biases)) for _ in range(count)]
        addresses = [copy.address for copy in copies]
        most = max(CANDIDATES)
        x_RD = torch.randn(most * count, self.form.up.inputs, dtype=self._dtype, device=device)
        return choose(CANDIDATES, lambda tile, rows: self._trial(tile, addresses, x_RD, rows), torch.equal)

    def _trial(self, tile: Tile, addresses: list[int], x_RD: Tensor, rows: int) -> Trial[Tensor] | None:
        from triton import TritonError

        counts = [rows] * len(addresses)
        table = _table(tile, addresses, counts, x_RD.device)
        x_RD = x_RD[: sum(counts)]
        try:
            out_RD = self._launches(tile, table, x_RD)  # compiles
        except TritonError as error:
            log.info("%s does not run on this GPU: %s", tile, error)
            return None
        return Trial(out_RD[: min(CANDIDATES)], seconds_on_gpu(lambda: self._launches(tile, table, x_RD)))


def check_launcher() -> None:
    """Have triton compile what it launches kernels with. Raises UnsupportedByKernelError."""
    from triton.runtime import driver

    try:
        driver.active.get_current_device()
    except (RuntimeError, OSError, CalledProcessError) as error:
        raise UnsupportedByKernelError(
            f"triton cannot launch kernels here ({error}); it needs a GPU, a C compiler and Python's headers"
        ) from error


def _table(tile: Tile, addresses: list[int], counts: list[int], device: torch.device) -> Tensor:
    table = torch.tensor(spread(addresses, counts, tile.rows), dtype=torch.int64)
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)  # waits for nothing that the GPU has yet to do


def _on_device(expert: Expert, kept: tuple[Tensor, ...]) -> KernelExpert:
    """The structure where its weights are."""
    device = kept[0].device
    if device.type == "cuda" and any((o.data or 0) % _ALIGNED for o in (expert.gate, expert.up, expert.down)):
        raise UnsupportedByKernelError(f"its weights do not begin at a multiple of {_ALIGNED} bytes")
    fields = torch.frombuffer(bytearray(expert), dtype=torch.int64).to(device)
    return KernelExpert(fields.data_ptr(), (fields, *kept))


def seconds_on_gpu(call: Callable[[], Any], repeat: int = 10) -> float:
    """The least time of a call's launches, which must be compiled by then; replayed, so without Python's part."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on
        call()
    times = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e3)
    return min(times)


def _launch(tile: Tile, form: Layer, table: Tensor, x: Tensor, y: Tensor, *, upwards: bool, biased: bool) -> None:
    from moeray.model.kernels.grouped import experts_kernel

    scalars, constants = launch_arguments(tile, form, x.dtype, upwards=upwards, biased=biased)
    experts_kernel[len(table), -(-y.shape[1] // tile.outs)](
        table, x, y, *scalars, **constants, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True
    )


def launch_arguments(
    tile: Tile, form: Layer, dtype: torch.dtype, *, upwards: bool, biased: bool
) -> tuple[tuple[float, ...], dict[str, Any]]:
    """What the kernel gets beside tensors, and what it is compiled for, for inputs of `dtype`."""
    matrix, act = form.up if upwards else form.down, form.activation
    outputs = form.down.inputs if upwards else form.down.outputs
    stored, scales, operand = _types(Format(matrix.format), dtype)
    steps = matrix.row_bytes // _itemsize(stored), matrix.scale_bytes // _itemsize(scales)
    scalars = (
        matrix.inputs, outputs, *steps, matrix.out_shift, matrix.in_shift, act.alpha, act.cubic, act.limit, act.shift,
    )  # fmt: skip
    return scalars, {
        "UPWARDS": upwards, "GATED": upwards and bool(form.gated), "BIASED": biased, "FORMAT": matrix.format,
        "STORED": stored, "SCALES": scales, "OPERAND": operand, "ROWS": tile.rows, "OUTS": tile.outs,
        "INS": inputs_at_once(tile, matrix, dtype.itemsize),
    }  # fmt: skip


def _types(form: Format, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Types of a matrix's weights, of its scales and of what is multiplied, in triton's words."""
    from triton import language as tl

    dtypes = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    stored = {Format.F32: tl.float32, Format.F16: tl.float16, Format.BF16: tl.bfloat16, Format.INT8: tl.int8}
    operand = dtypes[dtype]
    if interpreted() and dtype is torch.bfloat16:
        operand = tl.float32  # the interpreter would multiply the bits of bf16 numbers as if they were integers
    return stored.get(form, tl.uint8), tl.uint8 if form == Format.MXFP4 else tl.float32, operand


def _itemsize(triton_type: Any) -> int:
    return int(triton_type.primitive_bitwidth) // 8
