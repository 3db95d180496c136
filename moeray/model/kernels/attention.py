"""Attention of decoding sequences over a paged cache, in C.

B sequences, H query heads, G key/value heads, Dk and Dv head sizes, S slots of the cache, W blocks of a table.
"""

from __future__ import annotations

from struct import Struct

import torch
from torch import Tensor

from moeray.model.kernels.linear import DENSE
from moeray.model.kernels.native import Instructions, best_instructions, functions, with_scratch
from moeray.model.recording import perform

DTYPES = (torch.float32, torch.bfloat16)


_CALL = Struct("=9Q16q2f")
"""The Attention structure of native/layout.h."""


def decode(
    q_BHD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    tables_BW: Tensor,
    first_B: Tensor,
    end_B: Tensor,
    block_size: int,
    *,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    instructions: Instructions | None = None,
) -> Tensor:
    """Each sequence's query against its own keys `first_B` to `end_B` (at least one) -> [B, H, Dv], sums in fp32.

    q, k and v are bf16 or all fp32, their heads contiguous; v may be the beginning of k (the same memory). Key i of a
    sequence is in block `tables_BW[b, i // block_size]` (int64, as `first_B` and `end_B`). `sinks_H` is fp32. A
    sequence's result does not depend on the others or on the number of threads.
    """
    assert q_BHD.dtype in DTYPES, f"the kernel does not compute {q_BHD.dtype}"
    assert q_BHD.dtype is k_SGD.dtype is v_SGD.dtype, f"{q_BHD.dtype} queries for {k_SGD.dtype} keys"
    assert q_BHD.stride(2) == k_SGD.stride(2) == v_SGD.stride(2) == tables_BW.stride(1) == 1, "heads are not contiguous"
    assert sinks_H is None or sinks_H.dtype is torch.float32
    size = q_BHD.itemsize
    y_BHD = q_BHD.new_empty(*q_BHD.shape[:2], v_SGD.shape[2])
    call = _CALL.pack(
        q_BHD.data_ptr(), k_SGD.data_ptr(), v_SGD.data_ptr(), y_BHD.data_ptr(), 0, tables_BW.data_ptr(),
        first_B.data_ptr(), end_B.data_ptr(), 0 if sinks_H is None else sinks_H.data_ptr(),
        DENSE[q_BHD.dtype], *q_BHD.shape[:2], k_SGD.shape[1], k_SGD.shape[2], v_SGD.shape[2],
        *(size * stride for stride in (*q_BHD.stride()[:2], *k_SGD.stride()[:2], *v_SGD.stride()[:2])),
        tables_BW.stride(0), block_size, torch.get_num_threads(),
        best_instructions() if instructions is None else instructions, scale, softcap or 0.0,
    )  # fmt: skip
    perform(with_scratch, functions().attend, call)
    return y_BHD
