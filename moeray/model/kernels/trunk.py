"""What lies between the trunk's products: root mean square norms, rotary positions, and keys and values on their way to
the cache, each in one pass, in C.

T tokens, H heads, D numbers that are normed or turned together, N slots of a cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeray.model.kernels.native import CALL_FORMATS, available, functions, threads_for
from moeray.model.recording import perform

_FEW_BYTES = 1 << 20
"""More are worth several threads."""


class RmsNorm:
    """y = x / sqrt(mean(x^2) + eps) * weight, sums in fp32. weight [D].

    early: the quotient is rounded to x's dtype before it is weighed, as in Llama's modules; else only the end is.
    """

    def __init__(self, weight_D: Tensor, eps: float, early: bool) -> None:
        self._norm = functions().norm
        self._weight = weight_D.detach().float().contiguous()
        self._address = self._weight.data_ptr()
        self._size = len(weight_D)
        self._eps = float(eps)
        self._early = int(early)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., D] bf16 or fp32 on the CPU -> the same shape and dtype."""
        x = x.contiguous()
        y, rows = torch.empty_like(x), x.numel() // self._size
        assert x.shape[-1] == self._size
        perform(
            self._norm, CALL_FORMATS[x.dtype], x.data_ptr(), self._address, rows, self._size, self._early, y.data_ptr(),
            threads_for(rows, x.numel()), self._eps,
        )  # fmt: skip
        return y


def can_rotate(x: Tensor, cos: Tensor) -> bool:
    """Whether `rotate` knows tensors like these."""
    return (
        x.shape[0] == 1
        and x.shape[2:] == cos.shape[1:]
        and cos.shape[0] == 1
        and x.dtype is cos.dtype
        and x.dtype in CALL_FORMATS
        and x.is_cpu
        and x.stride(3) == 1
        and not x.shape[3] % 2
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + (-x's second half, its first half) sin. x [1, H, T, D], cos and sin [1, T, D] contiguous, as transformers
    has them -> x's shape, lying in memory as [T, H, D].

    All bf16 or all fp32 on the CPU, the numbers of a head contiguous, D even. Rounds where torch does: the same bits.
    """
    _, heads, tokens, size = x.shape
    _, head, token, _ = x.stride()
    y = x.new_empty(1, tokens, heads, size)
    perform(
        functions().rotate, CALL_FORMATS[x.dtype], x.data_ptr(), token, head, tokens, heads, size, cos.data_ptr(),
        sin.data_ptr(), y.data_ptr(), threads_for(tokens, tokens * heads * size),
    )  # fmt: skip
    return y.transpose(1, 2)


def keep(x_THD: Tensor, slots_T: Tensor, cache_NHD: Tensor) -> None:
    """cache[slots] = x; what few tokens have is written without waking threads. slots int64; all contiguous but x, of
    which the numbers of a head are."""
    tokens, heads, size = x_THD.shape
    whole = x_THD.is_cpu and x_THD.stride(2) == 1 and cache_NHD.is_contiguous() and slots_T.is_contiguous()
    if not (whole and available() and x_THD.dtype is cache_NHD.dtype and x_THD.nbytes <= _FEW_BYTES):
        cache_NHD.index_copy_(0, slots_T, x_THD)
        return
    token, head, each = x_THD.stride(0), x_THD.stride(1), x_THD.itemsize
    perform(
        functions().keep, x_THD.data_ptr(), token * each, head * each, tokens, heads, size * each, slots_T.data_ptr(),
        cache_NHD.data_ptr(),
    )  # fmt: skip
