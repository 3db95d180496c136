"""The weighted sum of each token's expert outputs. T tokens, K experts a token, D hidden size."""

from __future__ import annotations

import torch
from torch import Tensor

from moeray.model.kernels.layout import Format
from moeray.model.kernels.native import library

_FORMATS = {torch.float32: Format.F32, torch.bfloat16: Format.BF16}
_ELEMENTS_PER_THREAD = 1 << 18
"""Fewer are done before another thread has woken up."""


def combine(rows_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """Weighted sum over k in fp32, k = 0 first, whatever the order in which rows arrived. [T, D] in the rows' dtype."""
    lib = library() if rows_TKD.device.type == "cpu" else None
    if lib is None or rows_TKD.dtype not in _FORMATS or not rows_TKD.numel():
        return _combine(rows_TKD, weights_TK)
    tokens, top_k, size = rows_TKD.shape
    rows, weights = rows_TKD.contiguous(), weights_TK.float().contiguous()
    out_TD = rows.new_empty(tokens, size)
    threads = min(torch.get_num_threads(), tokens, 1 + rows.numel() // _ELEMENTS_PER_THREAD)
    lib.moeray_combine(
        _FORMATS[rows.dtype], rows.data_ptr(), weights.data_ptr(), tokens, top_k, size, out_TD.data_ptr(), threads
    )
    return out_TD


def _combine(rows_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """The same in torch."""
    weighted = rows_TKD.float() * weights_TK.float().unsqueeze(-1)
    out_TD = weighted[:, 0]
    for k in range(1, weighted.shape[1]):
        out_TD = out_TD + weighted[:, k]
    return out_TD.to(rows_TKD.dtype)
