"""How near the expert kernels come to what the machine can do: bytes a second at few rows, operations at many.

Each figure stands beside ceilings that are measured in turn with it. The weights of all experts are several times
larger than the last cache, as those of a model are, and each forward takes other experts than the one before.
"""

from __future__ import annotations

import glob
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GptOssConfig, MixtralConfig

from moeray.bench.environment import environment
from moeray.config import Kernel
from moeray.errors import ConfigError
from moeray.model.experts import ExpertBank
from moeray.model.family import Family, load_family
from moeray.model.formats import Fp8Block, Int8, Mxfp4, Plain, StoredWeight, quantize_int8
from moeray.model.kernels import available
from moeray.model.kernels.native import best_instructions, multiply, read_all
from moeray.model.slices import ExpertTensor
from moeray.types import ExpertId

FORMATS = ("bf16", "int8", "fp8", "mxfp4")
KERNELS: tuple[Kernel, ...] = ("native", "torch")
_CPU = torch.device("cpu")
_READ_BYTES, _MULTIPLY_TIMES = 64 << 20, 100_000
_FP8_BLOCK, _FP8_MOST = 128, 448.0
_CACHES_FULL = 4  # the working set, in last caches


@dataclass(frozen=True)
class KernelPlan:
    """Experts of `hidden` x `intermediate`, `distinct` of them a forward, each with as many of `rows`."""

    hidden: int = 1024
    intermediate: int = 512
    distinct: int = 8
    formats: tuple[str, ...] = FORMATS
    kernels: tuple[Kernel, ...] = KERNELS
    rows: tuple[int, ...] = (1, 2, 4, 8, 32, 256)
    threads: tuple[int, ...] = (1,)
    repeat: int = 15

    def __post_init__(self) -> None:
        if unknown := set(self.formats) - set(FORMATS):
            raise ConfigError(f"format {min(unknown)!r} is not one of {', '.join(FORMATS)}")
        if wrong := set(self.kernels) - set(KERNELS):
            raise ConfigError(f"kernel {min(wrong)!r} is not one of {', '.join(KERNELS)}")
        if self.hidden % 32 or self.intermediate % 32:
            raise ConfigError("hidden and intermediate sizes must be multiples of 32, as MXFP4 groups are")


@dataclass(frozen=True)
class KernelFigure:
    """One line. `error`: of the output, relative to fp32 products of the weights that were stored (for int8: before
    they were rounded). `roofline`: the least time that the two ceilings allow, over the time taken."""

    format: str
    kernel: str
    rows: int
    threads: int
    seconds: float
    gb_per_s: float
    gflop_per_s: float
    read_gb_per_s: float
    peak_gflop_per_s: float
    roofline: float
    error: float


def measure(
    plan: KernelPlan, report: Callable[[str, int, int], None] = lambda what, done, total: None
) -> dict[str, Any]:
    """All combinations. Raises ConfigError where the kernels were not compiled."""
    if not available():
        raise ConfigError("the CPU kernels were not compiled, so there is nothing to measure; see the warning above")
    figures: list[KernelFigure] = []
    for done, form in enumerate(plan.formats):
        report(form, done, len(plan.formats))
        weights = _Weights.make(form, plan)
        for kernel in plan.kernels:
            figures += _figures(plan, weights, kernel)
    return {
        "plan": asdict(plan),
        "instructions": best_instructions().name.lower(),
        "figures": [asdict(figure) for figure in figures],
        "environment": environment(),
    }


# -- weights ----------------------------------------------------------------------------------------------------------


class _Weights:
    """Experts in one stored form, all with the same random values but each in memory of its own."""

    def __init__(
        self, form: str, family: Family, up: StoredWeight, down: StoredWeight, dense: tuple[Tensor, Tensor]
    ) -> None:
        self.form = form
        self.family = family
        self.dense = dense
        self.nbytes = up.nbytes + down.nbytes
        self.count = next(iter(family.layers.values())).num_experts
        self._stored = {"up": up, "down": down}
        self._made: dict[tuple[str, int], ExpertTensor] = {}

    @classmethod
    def make(cls, form: str, plan: KernelPlan) -> _Weights:
        generator = torch.Generator().manual_seed(0)
        up = torch.randn(2 * plan.intermediate, plan.hidden, generator=generator) * plan.hidden**-0.5
        down = torch.randn(plan.hidden, plan.intermediate, generator=generator) * plan.intermediate**-0.5
        stored = [_stored(form, weight.bfloat16(), generator) for weight in (up, down)]
        kept = (up.bfloat16().float(), down.bfloat16().float())
        if form in ("fp8", "mxfp4"):
            kept = (stored[0].dense(torch.float32), stored[1].dense(torch.float32))
        nbytes = stored[0].nbytes + stored[1].nbytes
        count = max(2 * plan.distinct, _CACHES_FULL * last_cache_bytes() // nbytes)
        return cls(form, _family(form, plan, count), stored[0], stored[1], kept)

    def expert(self, name: str, expert: int) -> ExpertTensor:
        which = "down" if "down" in name else "up"
        if "bias" in name:
            shape = self.family.full.get_parameter(name).shape[1:]
            return ExpertTensor((Plain(torch.zeros(shape)),))
        if (which, expert) not in self._made:
            self._made[which, expert] = ExpertTensor((_copy(self._stored[which]),), cat_dim=0)
        return self._made[which, expert]


def _stored(form: str, weight_OI: Tensor, generator: torch.Generator) -> StoredWeight:
    rows, columns = weight_OI.shape
    match form:
        case "int8":
            return Int8(*quantize_int8(weight_OI), transposed=False)
        case "fp8":
            scale = weight_OI.float().abs().max() / _FP8_MOST
            grid = (-(-rows // _FP8_BLOCK), -(-columns // _FP8_BLOCK))
            quantized = (weight_OI.float() / scale).to(torch.float8_e4m3fn)
            return Fp8Block(quantized, scale.expand(grid).contiguous(), (_FP8_BLOCK, _FP8_BLOCK))
        case "mxfp4":
            groups = columns // 32
            blocks = torch.randint(0, 256, (rows, groups, 16), dtype=torch.uint8, generator=generator)
            return Mxfp4(blocks, torch.randint(118, 122, (rows, groups), dtype=torch.uint8, generator=generator))
    return Plain(weight_OI)


def _copy(weight: StoredWeight) -> StoredWeight:
    match weight:
        case Int8():
            return Int8(weight.weight.clone(), weight.scale, weight.transposed)
        case Fp8Block():
            return Fp8Block(
                weight.weight.view(torch.uint8).clone().view(weight.weight.dtype), weight.scale_inv, weight.block
            )
        case Mxfp4():
            return Mxfp4(weight.blocks.clone(), weight.scales.clone())
        case Plain():
            return Plain(weight.tensor.clone())
    raise AssertionError(weight)


def _family(form: str, plan: KernelPlan, count: int) -> Family:
    """One layer of Mixtral's experts; of gpt-oss's for MXFP4, which only that family's weights come in."""
    sizes: dict[str, Any] = {
        "hidden_size": plan.hidden, "intermediate_size": plan.intermediate, "num_hidden_layers": 1,
        "num_local_experts": count, "vocab_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1,
    }  # fmt: skip
    if form == "mxfp4":
        return load_family(GptOssConfig(**sizes, head_dim=32, layer_types=["full_attention"]))
    return load_family(MixtralConfig(**sizes))


def last_cache_bytes() -> int:
    """Size of the last cache that Linux tells of; 64 MiB where it tells of none."""
    sizes = [Path(path).read_text().strip() for path in glob.glob("/sys/devices/system/cpu/cpu0/cache/index*/size")]
    return max((int(size.removesuffix("K")) << 10 for size in sizes if size.endswith("K")), default=64 << 20)


# -- figures ----------------------------------------------------------------------------------------------------------


def _figures(plan: KernelPlan, weights: _Weights, kernel: Kernel) -> Iterator[KernelFigure]:
    bank = ExpertBank(weights.family, weights, torch.bfloat16, _CPU, kernel)
    layer = next(iter(weights.family.layers))
    bank.load(ExpertId(layer, expert) for expert in range(weights.count))
    for threads in plan.threads:
        for rows in plan.rows:
            x_RD = torch.randn(rows * plan.distinct, plan.hidden).bfloat16()
            error = _error(weights, x_RD[:rows], bank.forward(layer, x_RD[:rows], [0], [rows]))
            counts = [rows] * plan.distinct

            def forward(i: int, x_RD: Tensor = x_RD, counts: list[int] = counts) -> None:
                first = i * plan.distinct % (weights.count - plan.distinct + 1)
                bank.forward(layer, x_RD, list(range(first, first + plan.distinct)), counts)

            with using_threads(threads):
                seconds, read, peak = _times(forward, plan.repeat)
            yield _figure(plan, weights, kernel, rows, threads, seconds, read, peak, error)


def _figure(
    plan: KernelPlan, weights: _Weights, kernel: str, rows: int, threads: int, seconds: float, read: float, peak: float,
    error: float,
) -> KernelFigure:  # fmt: skip
    nbytes = plan.distinct * weights.nbytes
    operations = 2 * plan.distinct * rows * 3 * plan.hidden * plan.intermediate
    roofline = max(nbytes / read, operations / peak) / seconds
    return KernelFigure(
        weights.form, kernel, rows, threads, seconds, nbytes / seconds / 1e9, operations / seconds / 1e9, read / 1e9,
        peak / 1e9, roofline, error,
    )  # fmt: skip


def _times(forward: Callable[[int], None], repeat: int) -> tuple[float, float, float]:
    """Medians, taken in turn: seconds of a forward, bytes read a second, operations a second."""
    memory = torch.ones(4, _READ_BYTES, dtype=torch.uint8)
    forwards, reads, peaks = [], [], []
    forward(0)
    for i in range(1, repeat + 1):
        forwards.append(_timed(partial(forward, i))[0])
        reads.append(_READ_BYTES / _timed(partial(read_all, memory[i % 4]))[0])
        seconds, operations = _timed(partial(multiply, _MULTIPLY_TIMES))
        peaks.append(operations / seconds)
    return statistics.median(forwards), statistics.median(reads), statistics.median(peaks)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def _error(weights: _Weights, x_RD: Tensor, out_RD: Tensor) -> float:
    moe = next(iter(weights.family.layers.values()))
    up, down = weights.dense
    if moe.is_transposed:
        up, down = up.t(), down.t()
    wanted = moe.activate(x_RD.float() @ up.t()) @ down.t()
    return float((out_RD.float() - wanted).norm() / wanted.norm())


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """torch's threads, and so the kernels', meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
