"""Experts for the kernels: where their stored weights lie, and which activation theirs is."""

from __future__ import annotations

import ctypes
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeray.model.expert_tensor import ExpertTensor
from moeray.model.family import ExpertsLayer
from moeray.model.formats import MXFP4_GROUP, Fp8Block, Int8, Mxfp4, Plain, StoredWeight, float_scales
from moeray.model.kernels.layout import Activation, Expert, Format, Layer, Matrix, Outputs
from moeray.model.kernels.linear import DENSE
from moeray.model.kernels.native import CALL_FORMATS, Block, Instructions, best_instructions, forward, run

_TANH_GELU = (2 * math.sqrt(2 / math.pi), 0.044715)  # 1 + tanh z = 2 sigmoid(2 z)


class UnsupportedByKernelError(Exception):
    """Why an expert cannot be computed by the kernels."""


@dataclass(frozen=True)
class KernelExpert:
    """One expert as the kernels see it: where its `Expert` structure lies. Keeps its weights alive."""

    address: int
    _kept: tuple[Expert | Tensor, ...]


class KernelLayer(ABC):
    """The experts of a layer whose activation the kernels have. Raises UnsupportedByKernelError."""

    def __init__(self, moe: ExpertsLayer) -> None:
        self._moe = moe
        self._activation = kernel_activation(moe)
        self._form: Layer | None = None

    @abstractmethod
    def expert(self, up: ExpertTensor, down: ExpertTensor, biases: dict[str, Tensor]) -> KernelExpert:
        """`biases`: parameter name -> fp32 bias. Raises UnsupportedByKernelError for weights that lie otherwise, or
        otherwise than those of the layer's other experts."""

    @abstractmethod
    def forward(self, experts: Sequence[KernelExpert], x_RD: Tensor, counts: list[int]) -> Tensor:
        """Rows sorted by expert -> each expert's output, [R, D] of x's dtype."""

    @property
    def form(self) -> Layer:
        """What the layer's experts have in common."""
        assert self._form is not None, "the layer has experts"
        return self._form

    def _describe(
        self, up: ExpertTensor, down: ExpertTensor, biases: dict[str, Tensor]
    ) -> tuple[Expert, tuple[Tensor, ...]]:
        """The structure and the tensors that it points into. Raises UnsupportedByKernelError as `expert`."""
        moe = self._moe
        ups = [_stored(part, moe.is_transposed) for part in up.parts]
        downs = [_stored(part, moe.is_transposed) for part in down.parts]
        if len(downs) != 1 or (len(ups) > 1 and up.cat_dim != (1 if moe.is_transposed else 0)):
            raise UnsupportedByKernelError("its weights lie in pieces")
        if downs[0].matrix.outputs != ups[0].matrix.inputs:
            raise UnsupportedByKernelError("its outputs are not as many as its inputs")
        gate_outputs, up_outputs = _up_outputs(moe, ups, downs[0].matrix.inputs, biases.get(moe.up_name))
        expert = Expert(gate_outputs, up_outputs, _outputs(downs[0], biases.get("down_proj"), 0, 1))
        form = Layer(ups[0].matrix, downs[0].matrix, self._activation, bool(moe.module.has_gate))
        if self._form is None:
            self._form = form
        elif bytes(form) != bytes(self._form):
            raise UnsupportedByKernelError("its weights are stored in another form than those of the layer's others")
        kept = [t for s in (*ups, *downs) for t in (s.data, s.scale) if t is not None]
        return expert, (*kept, *biases.values())


class NativeLayer(KernelLayer):
    """Computed by the kernels in C, over weights on the CPU."""

    def expert(self, up: ExpertTensor, down: ExpertTensor, biases: dict[str, Tensor]) -> KernelExpert:
        expert, kept = self._describe(up, down, biases)
        return KernelExpert(ctypes.addressof(expert), (expert, *kept))

    def forward(
        self,
        experts: Sequence[KernelExpert],
        x_RD: Tensor,
        counts: list[int],
        instructions: Instructions | None = None,
    ) -> Tensor:
        self._check_width(x_RD.shape[1])
        return forward(self.form, [e.address for e in experts], counts, x_RD, self.form.down.outputs, instructions)

    def compute_at(self, experts: list[int], x: Block, index: bytes, counts: list[int], out: int, threads: int) -> None:
        """The same from memory to memory, of the experts at these addresses: a row of x for each number of the index
        (int64); x's dtype is one of CALL_FORMATS, and that of the outputs."""
        self._check_width(x.width)
        run(
            ctypes.addressof(self.form), experts, counts, x.address, index, out,
            CALL_FORMATS[x.dtype], CALL_FORMATS[x.dtype], threads, best_instructions(),
        )  # fmt: skip

    def _check_width(self, width: int) -> None:
        if width != self.form.up.inputs:
            raise ValueError(f"rows of {width} numbers do not go with experts of {self.form.up.inputs} inputs")


@dataclass(frozen=True)
class _Stored:
    """A matrix [outputs, inputs] in memory, with the tensors that it points into."""

    matrix: Matrix
    data: Tensor
    scale: Tensor | None


def kernel_activation(moe: ExpertsLayer) -> Activation:
    """The kernels' form of the layer's activation, found by its values. Raises UnsupportedByKernelError."""
    # Of fp32, whatever torch's default is while another model is built; near 0, where a steep one bends, more of them.
    near, far, ups = (torch.linspace(-end, end, n, dtype=torch.float32) for end, n in ((0.3, 25), (20, 41), (20, 17)))
    probe_N2 = torch.cartesian_prod(torch.cat([far, near]), ups)
    gate_N, up_N = probe_N2.double().unbind(1)
    gated = bool(moe.module.has_gate)
    wanted = moe.activate(probe_N2 if gated else probe_N2[:, :1])[:, 0].double()
    own = sorted({float(v) for v in vars(moe.module).values() if isinstance(v, int | float) and v > 0})
    slopes = [(1.0, 0.0), _TANH_GELU, *((alpha, 0.0) for alpha in own)]
    for (alpha, cubic), limit, shift in itertools.product(slopes, (math.inf, *own), (0.0, 1.0)):
        g, u = gate_N.clamp(max=limit), up_N.clamp(-limit, limit)
        ours = g * torch.sigmoid(alpha * (g + cubic * g**3)) * (u + shift if gated else 1)
        if torch.allclose(ours, wanted, rtol=1e-5, atol=1e-5):
            return Activation(alpha, cubic, limit, shift)
    raise UnsupportedByKernelError("its activation is none that the kernels have")


def _up_outputs(moe: ExpertsLayer, ups: list[_Stored], width: int, bias: Tensor | None) -> tuple[Outputs, Outputs]:
    """Where the gate's outputs and those of up lie: halves, every other one, or matrices of their own."""
    rows = [s.matrix.outputs for s in ups]
    if not moe.module.has_gate and rows == [width]:
        return Outputs(), _outputs(ups[0], bias, 0, 1)
    if moe.module.has_gate and rows == [2 * width]:
        if moe.module.is_concatenated:
            return _outputs(ups[0], bias, 0, 1), _outputs(ups[0], bias, width, 1)
        return _outputs(ups[0], bias, 0, 2), _outputs(ups[0], bias, 1, 2)
    if moe.module.has_gate and moe.module.is_concatenated and rows == [width, width]:
        if bytes(ups[0].matrix) != bytes(ups[1].matrix):
            raise UnsupportedByKernelError("its gate and up are stored in different forms")
        halves = (None, None) if bias is None else (bias[:width], bias[width:])
        return _outputs(ups[0], halves[0], 0, 1), _outputs(ups[1], halves[1], 0, 1)
    raise UnsupportedByKernelError(f"its up projection is in pieces of {rows} rows for a width of {width}")


def _outputs(stored: _Stored, bias: Tensor | None, first: int, step: int) -> Outputs:
    scale = None if stored.scale is None else stored.scale.data_ptr()
    return Outputs(stored.data.data_ptr(), scale, None if bias is None else bias.data_ptr(), first, step)


def _stored(weight: StoredWeight, transposed: bool) -> _Stored:
    match weight:
        case Plain():
            return _plain(weight.tensor.t() if transposed else weight.tensor)
        case Int8() if weight.transposed == transposed:
            return _Stored(_matrix(Format.INT8, weight.weight, 4), weight.weight, weight.scale)
        case Mxfp4() if transposed:
            groups = weight.blocks.shape[1]
            matrix = Matrix(Format.MXFP4, groups * MXFP4_GROUP, len(weight.blocks), groups * MXFP4_GROUP // 2, groups)
            return _Stored(matrix, weight.blocks.contiguous(), weight.scales.contiguous())
        case Fp8Block() if not transposed and weight.weight.dtype is torch.float8_e4m3fn:
            return _fp8(weight)
    raise UnsupportedByKernelError(f"its weights are {type(weight).__name__}, transposed: {transposed}")


def _plain(tensor_OI: Tensor) -> _Stored:
    if tensor_OI.dtype not in DENSE or tensor_OI.stride(-1) != 1:
        raise UnsupportedByKernelError(f"its weights are {tensor_OI.dtype} with strides {tensor_OI.stride()}")
    return _Stored(_matrix(DENSE[tensor_OI.dtype], tensor_OI, 0), tensor_OI, None)


def _fp8(weight: Fp8Block) -> _Stored:
    rows, columns = weight.block
    if rows & (rows - 1) or columns & (columns - 1) or columns < 16 or weight.weight.stride(-1) != 1:
        raise UnsupportedByKernelError(f"its FP8 blocks are {rows}x{columns}")
    scales = float_scales(weight.scale_inv).contiguous()
    matrix = _matrix(Format.FP8, weight.weight, scales.shape[1] * 4)
    matrix.out_shift, matrix.in_shift = rows.bit_length() - 1, columns.bit_length() - 1
    return _Stored(matrix, weight.weight, scales)


def _matrix(form: Format, tensor_OI: Tensor, scale_bytes: int) -> Matrix:
    outputs, inputs = tensor_OI.shape
    return Matrix(form, inputs, outputs, tensor_OI.stride(0) * tensor_OI.itemsize, scale_bytes)
