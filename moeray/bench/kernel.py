"""How near the expert kernels come to what the machine can do: bytes a second at few rows, operations at many.

Each figure stands beside ceilings that are measured in turns with it. The weights of all experts are several times
larger than the last cache, as those of a model are, and each forward takes other experts than the one before.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GptOssConfig, MixtralConfig

from moeray.bench.environment import environment
from moeray.bench.machine import Machine, machine_of
from moeray.errors import ConfigError
from moeray.model.expert_tensor import ExpertTensor
from moeray.model.experts import ExpertBank
from moeray.model.family import Family, load_family
from moeray.model.formats import Fp8Block, Int8, Mxfp4, Plain, StoredWeight, quantize_int8
from moeray.model.pages import zeros_on_demand
from moeray.settings.experts import ExpertKernel
from moeray.types import ExpertId

FORMATS = ("bf16", "int8", "fp8", "mxfp4")
KERNELS: dict[str, tuple[ExpertKernel, ...]] = {"cpu": ("native", "torch"), "cuda": ("triton", "torch")}
_TURNS = 3
_FP8_BLOCK, _FP8_MOST = 128, 448.0
_CACHES_FULL = 4  # the working set, in last caches


@dataclass(frozen=True)
class KernelPlan:
    """Experts of `hidden` x `intermediate`, `distinct` of them a forward, each with as many of `rows`.

    `kernels`: none for all of the device; `repeat` forwards in each turn. On a GPU `threads` says nothing.
    """

    hidden: int = 1024
    intermediate: int = 512
    distinct: int = 8
    formats: tuple[str, ...] = FORMATS
    kernels: tuple[ExpertKernel, ...] = ()
    device: Literal["cpu", "cuda"] = "cpu"
    rows: tuple[int, ...] = (1, 2, 4, 8, 32, 256)
    threads: tuple[int, ...] = (1,)
    repeat: int = 7

    def __post_init__(self) -> None:
        if unknown := set(self.formats) - set(FORMATS):
            raise ConfigError(f"format {min(unknown)!r} is not one of {', '.join(FORMATS)}")
        if wrong := set(self.kernels) - set(KERNELS[self.device]):
            raise ConfigError(f"kernel {min(wrong)!r} is not one of {', '.join(KERNELS[self.device])}")
        if "mxfp4" in self.formats and (self.hidden % 32 or self.intermediate % 32):
            raise ConfigError(
                f"mxfp4 has groups of 32 weights, which do not fill sizes {self.hidden} and {self.intermediate}: leave "
                "mxfp4 out of --formats, or give multiples of 32"
            )


@dataclass(frozen=True)
class KernelFigure:
    """One line. All but `median_s` are of the best time, since whatever else runs on the machine can only add to it.

    `error`: of the output, relative to fp32 products of the weights that were stored (for int8: before
    they were rounded). `roofline`: the least time that the two ceilings allow, over the time taken."""

    format: str
    kernel: str
    rows: int
    threads: int
    seconds: float
    median_s: float
    gb_per_s: float
    gflop_per_s: float
    read_gb_per_s: float
    peak_gflop_per_s: float
    roofline: float
    error: float


def measure(
    plan: KernelPlan, report: Callable[[str, int, int], None] = lambda what, done, total: None
) -> dict[str, Any]:
    """All combinations. Raises ConfigError where the device or a kernel is not there."""
    machine = machine_of(plan.device)
    figures: list[KernelFigure] = []
    for done, form in enumerate(plan.formats):
        report(form, done, len(plan.formats))
        weights = _Weights.make(form, plan, machine.cache_bytes)
        for kernel in plan.kernels or KERNELS[plan.device]:
            figures += _figures(plan, weights, kernel, machine)
    return {
        "plan": asdict(plan),
        "machine": machine.what,
        "multiplies": machine.multiplies,
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
        self._memory = {  # as a checkpoint's: one expert behind the other
            name: zeros_on_demand((self.count, *_data(weight).shape), _data(weight).dtype, torch.device("cpu"))
            for name, weight in self._stored.items()
        }
        self._made: dict[tuple[str, int], ExpertTensor] = {}

    @classmethod
    def make(cls, form: str, plan: KernelPlan, cache_bytes: int) -> _Weights:
        generator = torch.Generator().manual_seed(0)
        up = torch.randn(2 * plan.intermediate, plan.hidden, generator=generator) * plan.hidden**-0.5
        down = torch.randn(plan.hidden, plan.intermediate, generator=generator) * plan.intermediate**-0.5
        stored = [_stored(form, weight.bfloat16(), generator) for weight in (up, down)]
        kept = (up.bfloat16().float(), down.bfloat16().float())
        if form in ("fp8", "mxfp4"):
            kept = (stored[0].dense(torch.float32), stored[1].dense(torch.float32))
        nbytes = stored[0].nbytes + stored[1].nbytes
        count = max(2 * plan.distinct, _CACHES_FULL * cache_bytes // nbytes)
        return cls(form, _family(form, plan, count), stored[0], stored[1], kept)

    def expert(self, name: str, expert: int) -> ExpertTensor:
        which = "down" if "down" in name else "up"
        if "bias" in name:
            shape = self.family.full.get_parameter(name).shape[1:]
            return ExpertTensor((Plain(torch.zeros(shape)),))
        if (which, expert) not in self._made:
            weight = _over(self._stored[which], self._memory[which][expert])
            self._made[which, expert] = ExpertTensor((weight,), cat_dim=0)
        return self._made[which, expert]

    def not_finite(self, name: str, expert: int) -> str | None:
        """Nothing: they were drawn here."""
        return None


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


def _data(weight: StoredWeight) -> Tensor:
    """What is read once a forward, but for scales."""
    match weight:
        case Int8() | Fp8Block():
            return weight.weight
        case Mxfp4():
            return weight.blocks
        case Plain():
            return weight.tensor
    raise AssertionError(weight)


def _over(weight: StoredWeight, data: Tensor) -> StoredWeight:
    """The same, over this memory."""
    data.view(torch.uint8).copy_(_data(weight).view(torch.uint8))
    match weight:
        case Int8():
            return Int8(data, weight.scale, weight.transposed)
        case Fp8Block():
            return Fp8Block(data, weight.scale_inv, weight.block)
        case Mxfp4():
            return Mxfp4(data, weight.scales.clone())
    return Plain(data)


def _family(form: str, plan: KernelPlan, count: int) -> Family:
    """One layer of Mixtral's experts; of gpt-oss's for MXFP4, which only that family's weights come in."""
    sizes: dict[str, Any] = {
        "hidden_size": plan.hidden, "intermediate_size": plan.intermediate, "num_hidden_layers": 1,
        "num_local_experts": count, "vocab_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1,
    }  # fmt: skip
    if form == "mxfp4":
        return load_family(GptOssConfig(**sizes, head_dim=32, layer_types=["full_attention"]))
    return load_family(MixtralConfig(**sizes))


# -- figures ----------------------------------------------------------------------------------------------------------


def _figures(plan: KernelPlan, weights: _Weights, kernel: ExpertKernel, machine: Machine) -> Iterator[KernelFigure]:
    bank = ExpertBank(weights.family, weights, torch.bfloat16, machine.device, kernel)
    layer = next(iter(weights.family.layers))
    bank.load(ExpertId(layer, expert) for expert in range(weights.count))
    for threads in plan.threads:
        for rows in plan.rows:
            x_RD = torch.randn(rows * plan.distinct, plan.hidden).bfloat16().to(machine.device)
            error = _error(weights, x_RD[:rows], bank.forward(layer, x_RD[:rows], [0], [rows]))
            counts = [rows] * plan.distinct

            def forward(i: int, x_RD: Tensor = x_RD, counts: list[int] = counts) -> None:
                first = i * plan.distinct % (weights.count - plan.distinct + 1)
                bank.forward(layer, x_RD, list(range(first, first + plan.distinct)), counts)

            with using_threads(threads):
                times = _times(machine, forward, plan.repeat)
            yield _figure(plan, weights, kernel, rows, threads, times, error)


def _figure(
    plan: KernelPlan,
    weights: _Weights,
    kernel: ExpertKernel,
    rows: int,
    threads: int,
    times: tuple[float, float, float, float],
    error: float,
) -> KernelFigure:
    seconds, median, read, peak = times
    nbytes = plan.distinct * weights.nbytes
    operations = 2 * plan.distinct * rows * 3 * plan.hidden * plan.intermediate
    roofline = max(nbytes / read, operations / peak) / seconds
    return KernelFigure(
        weights.form, kernel, rows, threads, seconds, median, nbytes / seconds / 1e9, operations / seconds / 1e9,
        read / 1e9, peak / 1e9, roofline, error,
    )  # fmt: skip


def _times(machine: Machine, forward: Callable[[int], None], repeat: int) -> tuple[float, float, float, float]:
    """Best and median seconds of a forward; at best, bytes read a second and operations a second.

    They take turns, a few of each at a time: a model's forwards follow one another too, and after a spell of nothing
    but multiplications some CPUs run slower for a while.
    """
    forwards, reads, peaks = [], [], []
    for turn in range(_TURNS):
        forward(turn * (repeat + 1))
        forwards += [machine.seconds(partial(forward, turn * (repeat + 1) + i)) for i in range(1, repeat + 1)]
        reads.append(machine.read_rate())
        peaks.append(machine.multiply_rate())
    return min(forwards), statistics.median(forwards), max(reads), max(peaks)


def _error(weights: _Weights, x_RD: Tensor, out_RD: Tensor) -> float:
    moe = next(iter(weights.family.layers.values()))
    up, down = weights.dense
    if moe.is_transposed:
        up, down = up.t(), down.t()
    wanted = moe.activate(x_RD.cpu().float() @ up.t()) @ down.t()
    return float((out_RD.cpu().float() - wanted).norm() / wanted.norm())


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """torch's threads, and so the kernels', meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
