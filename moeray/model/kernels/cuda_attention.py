"""Attention of decoding sequences on a GPU, by two launches of Triton kernels (flash_decoding.py).

Can be imported without triton. B sequences, H query heads, G key/value heads, Dk and Dv head sizes, S slots of the
cache, W blocks of a table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeray.model.kernels.cuda import interpreted

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_PARTS = 16  # of a sequence's keys: with few sequences, so many times more of the GPU has work
_LEAST = 4  # steps of a part: fewer cost more to merge than they gain
_KEYS, _FEW_KEYS, _LONG = 32, 16, 2560  # of a step; of one whose keys and values have more bytes than that
_HEADS = 16  # of a tile: the least that tensor cores multiply
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def decode_on_gpu(
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
) -> Tensor:
    """Each sequence's query against its own keys `first_B` to `end_B` (at least one) -> [B, H, Dv], sums in fp32.

    q, k and v are of one of DTYPES, their heads contiguous; v may be the beginning of k (the same memory). Key i of a
    sequence is in block `tables_BW[b, i // block_size]` (int64, as `first_B` and `end_B`). All on one GPU; nothing is
    read back, so that the launches can be captured in a CUDA graph. A sequence's result does not depend on the others.
    """
    from moeray.model.kernels.flash_decoding import attend_kernel, merge_kernel

    assert q_BHD.stride(2) == k_SGD.stride(2) == v_SGD.stride(2) == tables_BW.stride(1) == 1, "heads are not contiguous"
    count, heads, k_size = q_BHD.shape
    groups, v_size = v_SGD.shape[1:]
    repeats = heads // groups
    found = q_BHD.new_empty(count, heads, _PARTS, v_size, dtype=torch.float32)
    maxima, weights = q_BHD.new_empty(2, count, heads, _PARTS, dtype=torch.float32)
    y_BHD = q_BHD.new_empty(count, heads, v_size)
    constants, stages = attend_constants(q_BHD.dtype, k_size, v_size, block_size, capped=bool(softcap))
    attend_kernel[count, groups * -(-repeats // _HEADS), _PARTS](
        q_BHD, k_SGD, v_SGD, tables_BW, first_B, end_B, found, maxima, weights, scale, softcap or 0.0, repeats,
        k_size, v_size, *q_BHD.stride()[:2], *k_SGD.stride()[:2], *v_SGD.stride()[:2], tables_BW.stride(0),
        **constants, **stages,
    )  # fmt: skip
    sinks = maxima if sinks_H is None else sinks_H
    merge_kernel[count, heads](
        found, maxima, weights, sinks, y_BHD, v_size, PARTS=_PARTS, VALUES=constants["VALUES"],
        SINKS=sinks_H is not None, **_OPTIONS,
    )  # fmt: skip
    return y_BHD


def attend_constants(
    dtype: torch.dtype, k_size: int, v_size: int, block_size: int, *, capped: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the kernel is compiled for, and with. A key of 576 numbers is 512 and 64, not 1024."""
    from triton import language as tl

    operand = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
    if interpreted() and dtype is torch.bfloat16:
        operand = tl.float32  # the interpreter would multiply the bits of bf16 numbers as if they were integers
    main = max(_power_of_two(k_size + 1) // 2, 16)
    rest = max(_power_of_two(k_size - main), 16) if k_size > main else 0
    values = max(_power_of_two(v_size), 16)
    long = (main + rest + values) * dtype.itemsize > _LONG
    constants = {
        "HEADS": _HEADS, "KEYS": _FEW_KEYS if long else _KEYS, "LEAST": _LEAST, "MAIN": main, "REST": rest,
        "VALUES": values, "BLOCK": block_size, "CAPPED": capped, "OPERAND": operand,
    }  # fmt: skip
    return constants, _OPTIONS | {"num_stages": 1 if long else 2}  # what it keeps fits the GPUs with the least memory


def _power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()
