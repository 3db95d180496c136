"""The weighted sum of each token's expert outputs. T tokens, K experts a token, D hidden size."""

from __future__ import annotations

from torch import Tensor

from moeray.model.kernels.native import CALL_FORMATS, available, functions, threads_for


def combine(rows_TKD: Tensor, weights_TK: Tensor, out_TD: Tensor | None = None) -> Tensor:
    """Weighted sum over k in fp32, k = 0 first, whatever the order in which rows arrived, rounded to the rows' dtype.

    [T, D], written to `out_TD` (contiguous, of any float dtype) where one is given.
    """
    if not (rows_TKD.is_cpu and available()) or rows_TKD.dtype not in CALL_FORMATS or not rows_TKD.numel():
        sums_TD = _combine(rows_TKD, weights_TK)
        return sums_TD if out_TD is None else out_TD.copy_(sums_TD)
    tokens, top_k, size = rows_TKD.shape
    rows, weights = rows_TKD.contiguous(), weights_TK.float().contiguous()
    fits = out_TD is not None and out_TD.dtype is rows.dtype
    sums_TD = out_TD if out_TD is not None and fits else rows.new_empty(tokens, size)
    functions().combine(
        CALL_FORMATS[rows.dtype], rows.data_ptr(), weights.data_ptr(), tokens, top_k, size, sums_TD.data_ptr(),
        threads_for(tokens, rows.numel()),
    )  # fmt: skip
    return sums_TD if out_TD is None or fits else out_TD.copy_(sums_TD)


def _combine(rows_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """The same in torch."""
    weighted = rows_TKD.float() * weights_TK.float().unsqueeze(-1)
    out_TD = weighted[:, 0]
    for k in range(1, weighted.shape[1]):
        out_TD = out_TD + weighted[:, k]
    return out_TD.to(rows_TKD.dtype)
