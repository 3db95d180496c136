"""A linear layer over a dense weight as it lies in memory. T rows, I inputs, O outputs."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moeray.model.kernels.layout import Expert, Format, Layer, Matrix, Outputs
from moeray.model.kernels.native import Instructions, available, forward, threads_for

DENSE = {torch.float32: Format.F32, torch.float16: Format.F16, torch.bfloat16: Format.BF16}
_ROWS_AT_ONCE = 8  # or so many, while a weight is read from memory


class NativeLinear:
    """y = x W^T + b with fp32 sums. Reads the weight's own memory, which it keeps alive; thread-safe.

    weight [O, I] bf16, fp16 or fp32 on the CPU, each row contiguous; bias [O] of any float dtype.
    A row's result does not depend on the other rows or on the number of threads. Raises ValueError.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        if not available():
            raise ValueError("the CPU kernels are not there; ask kernels.available() first")
        if weight_OI.dtype not in DENSE or weight_OI.device.type != "cpu" or weight_OI.stride(-1) != 1:
            raise ValueError(
                f"a native linear layer wants a float weight on the CPU with contiguous rows, got {weight_OI.dtype} "
                f"on {weight_OI.device} with strides {weight_OI.stride()}"
            )
        self.out_features, self.in_features = weight_OI.shape
        self._weight = weight_OI
        self._bias = None if bias_O is None else bias_O.float().contiguous()
        row_bytes = weight_OI.stride(0) * weight_OI.itemsize
        matrix = Matrix(DENSE[weight_OI.dtype], self.in_features, self.out_features, row_bytes)
        bias = None if self._bias is None else self._bias.data_ptr()
        self._layer = Layer(down=matrix)
        self._expert = Expert(down=Outputs(weight_OI.data_ptr(), None, bias, 0, 1))
        self._address = ctypes.addressof(self._expert)

    def __call__(
        self, x_TI: Tensor, instructions: Instructions | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """x [..., I] bf16, fp16 or fp32 -> [..., O] of `dtype`, or of the same; sums are rounded to it once."""
        rows_TI = x_TI.reshape(-1, self.in_features)
        threads = threads_for(self.out_features, self._weight.numel() * (1 + len(rows_TI) // _ROWS_AT_ONCE))
        y_TO = forward(
            self._layer, [self._address], [len(rows_TI)], rows_TI, self.out_features, instructions, dtype, threads
        )
        return y_TO.view(*x_TI.shape[:-1], self.out_features)


class NativeLinears:
    """A linear layer for each of H heads, in one call: weight [H, O, I] float on the CPU, its rows contiguous."""

    def __init__(self, weight_HOI: Tensor) -> None:
        self._heads = [NativeLinear(weight_OI) for weight_OI in weight_HOI]
        self._addresses = [head._address for head in self._heads]

    def __call__(self, x_HTI: Tensor) -> Tensor:
        """x [H, T, I] -> [H, T, O] of its dtype."""
        count, rows, inputs = x_HTI.shape
        layer, outputs = self._heads[0]._layer, self._heads[0].out_features
        y = forward(layer, self._addresses, [rows] * count, x_HTI.reshape(-1, inputs), outputs, None)
        return y.view(count, rows, outputs)


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """One product; for a layer that is called again, keep a `NativeLinear`."""
    return NativeLinear(weight_OI, bias_O)(x_TI)
