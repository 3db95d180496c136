"""The weighted sum of each token's expert outputs. T tokens, K experts a token, D hidden size."""

from __future__ import annotations

import ctypes
from functools import cache

from torch import Tensor

from moeray.model.kernels.native import CALL_FORMATS, available, functions, library, threads_for

Call = tuple[int, int, int, int, int]
"""What the part in C is told (`Combine` in native/combine.h)."""

Combining = tuple[int, *Call]
"""The address of the function in C, and what it is told."""


def combine(rows_TKD: Tensor, weights_TK: Tensor, out_TD: Tensor | None = None) -> Tensor:
    """Weighted sum over k in fp32, k = 0 first, whatever the order in which rows arrived, rounded to the rows' dtype.

    [T, D], written to `out_TD` (contiguous, of any float dtype) where one is given.
    """
    tokens, top_k, size = rows_TKD.shape
    if out_TD is None:
        out_TD = rows_TKD.new_empty(tokens, size)
    weights_TK = weights_TK.contiguous()
    call = _call(weights_TK, out_TD) if rows_TKD.dtype is out_TD.dtype else None
    if call is None or not rows_TKD.numel():
        return out_TD.copy_(_combine(rows_TKD, weights_TK))
    rows = rows_TKD.contiguous()
    functions().combine(*call, rows.data_ptr(), tokens, top_k, size * rows.itemsize, size)
    return out_TD


def combining(weights_TK: Tensor, out_TD: Tensor) -> Combining | None:
    """For whoever combines rows of out's dtype in C; None where it cannot.

    Both tensors are to be kept alive.
    """
    call = _call(weights_TK, out_TD)
    return None if call is None else (_address(), *call)


def _call(weights_TK: Tensor, out_TD: Tensor) -> Call | None:
    form, weights_form = CALL_FORMATS.get(out_TD.dtype), CALL_FORMATS.get(weights_TK.dtype)
    if form is None or weights_form is None or not (out_TD.is_cpu and available()):
        return None
    if not (out_TD.is_contiguous() and weights_TK.is_contiguous()):
        return None
    tokens, top_k = weights_TK.shape
    threads = threads_for(tokens, top_k * out_TD.numel())
    return form, weights_form, weights_TK.data_ptr(), out_TD.data_ptr(), threads


@cache
def _address() -> int:
    lib = library()
    assert lib is not None
    return ctypes.cast(lib.moeray_combine, ctypes.c_void_p).value or 0


def _combine(rows_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """The same in torch."""
    weighted = rows_TKD.float() * weights_TK.float().unsqueeze(-1)
    out_TD = weighted[:, 0]
    for k in range(1, weighted.shape[1]):
        out_TD = out_TD + weighted[:, k]
    return out_TD.to(rows_TKD.dtype)
