"""The weighted sum of each token's expert outputs. T tokens, K experts a token, D hidden size."""

from __future__ import annotations

from torch import Tensor

from moeray.model.kernels.native import CALL_FORMATS, available, functions, threads_for


def combine(rows_TKD: Tensor, weights_TK: Tensor, out_TD: Tensor | None = None) -> Tensor:
    """Weighted sum over k in fp32, k = 0 first, whatever the order in which rows arrived, rounded to the rows' dtype.

    [T, D], written to `out_TD` (contiguous, of any float dtype) where one is given.
    """
    tokens, top_k, size = rows_TKD.shape
    if out_TD is None:
        out_TD = rows_TKD.new_empty(tokens, size)
    native = rows_TKD.is_cpu and available() and rows_TKD.dtype in CALL_FORMATS and out_TD.dtype is rows_TKD.dtype
    if not native or not rows_TKD.numel():
        return out_TD.copy_(_combine(rows_TKD, weights_TK))
    rows, weights = rows_TKD.contiguous(), weights_TK.float().contiguous()
    functions().combine(
        CALL_FORMATS[rows.dtype], rows.data_ptr(), weights.data_ptr(), tokens, top_k, size, out_TD.data_ptr(),
        threads_for(tokens, rows.numel()),
    )  # fmt: skip
    return out_TD


def _combine(rows_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """The same in torch."""
    weighted = rows_TKD.float() * weights_TK.float().unsqueeze(-1)
    out_TD = weighted[:, 0]
    for k in range(1, weighted.shape[1]):
        out_TD = out_TD + weighted[:, k]
    return out_TD.to(rows_TKD.dtype)
