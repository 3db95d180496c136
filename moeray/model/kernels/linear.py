"""A linear layer over a dense weight as it lies in memory. T rows, I inputs, O outputs."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from moeray.model.kernels.native import Call, Format, Instructions, Matrix, Outputs, best_instructions, library, scratch

FORMATS = {torch.float32: Format.F32, torch.float16: Format.F16, torch.bfloat16: Format.BF16}


class NativeLinear:
    """y = x W^T + b with fp32 sums. Reads the weight's own memory, which it keeps alive; thread-safe.

    weight [O, I] bf16, fp16 or fp32 on the CPU, its rows contiguous; bias [O] of any float dtype.
    A row's result does not depend on the other rows or on the number of threads. Raises ValueError.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        lib = library()
        if lib is None:
            raise ValueError("the CPU kernels are not there; ask kernels.available() first")
        if weight_OI.dtype not in FORMATS or weight_OI.device.type != "cpu" or weight_OI.stride(-1) != 1:
            raise ValueError(
                f"a native linear layer wants a float weight on the CPU with contiguous rows, got {weight_OI.dtype} "
                f"on {weight_OI.device} with strides {weight_OI.stride()}"
            )
        self.out_features, self.in_features = weight_OI.shape
        self._lib = lib
        self._weight = weight_OI
        self._bias = None if bias_O is None else bias_O.float().contiguous()
        row_bytes = weight_OI.stride(0) * weight_OI.itemsize
        self._matrix = Matrix(FORMATS[weight_OI.dtype], self.in_features, self.out_features, row_bytes, 0, 1, 0)
        bias = None if self._bias is None else self._bias.data_ptr()
        self._outputs = Outputs(weight_OI.data_ptr(), None, bias, 0, 1)

    def __call__(self, x_TI: Tensor, instructions: Instructions | None = None) -> Tensor:
        """x [..., I] bf16, fp16 or fp32 -> [..., O] of the same dtype."""
        dtype = x_TI.dtype
        x_TI = x_TI.float() if dtype is torch.float16 else x_TI
        x_TI = x_TI.contiguous()
        y_TO = x_TI.new_empty(*x_TI.shape[:-1], self.out_features)
        rows, threads = x_TI.numel() // self.in_features, torch.get_num_threads()
        if rows:
            nbytes = self._lib.moeray_linear_scratch(byref(self._matrix), rows, threads)
            memory, address = scratch(nbytes)
            chosen = best_instructions() if instructions is None else instructions
            call = Call(x_TI.data_ptr(), y_TO.data_ptr(), address, FORMATS[x_TI.dtype], threads, chosen)
            self._lib.moeray_linear(byref(self._matrix), byref(self._outputs), rows, byref(call))
            del memory
        return y_TO.to(dtype)


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """One product; for a layer that is called again, keep a `NativeLinear`."""
    return NativeLinear(weight_OI, bias_O)(x_TI)
