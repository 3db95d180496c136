"""What of transformers' modules costs more than it must on a CPU: norms and rotary positions are computed in one pass
each by the kernels in C, gates that compute in fp32 keep their weights so, and the others multiply by the kernels.

A family's own form is not known by its name but by what it computes: something is replaced where that gives the
module's results on random numbers, and is left alone otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from moeray.model import kernels
from moeray.model.kernels import NativeLinear, RmsNorm, can_rotate, rotate
from moeray.model.kernels.native import CALL_FORMATS

_EPS = ("variance_epsilon", "eps")
_ROTARY = "apply_rotary_pos_emb"
_SAME = 0.99
"""This part of a probe's numbers must have the very bits of the module's own (the order of a sum may change a few)."""

Rotary = Callable[..., tuple[Tensor, Tensor]]


@torch.inference_mode()
def fuse(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace what can be replaced in a model on the CPU."""
    if not kernels.available() or dtype not in CALL_FORMATS:
        return
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            norm = _equal_norm(module, dtype)
            if norm is not None:
                module.forward = norm
        elif "Router" in type(module).__name__:
            _widen(module, dtype)
            _multiply_natively(module)
    for file in {type(module).__module__ for module in model.modules()}:
        _fuse_rotary(sys.modules[file], dtype)


def _equal_norm(module: Any, dtype: torch.dtype) -> RmsNorm | None:
    weight: Tensor | None = getattr(module, "weight", None)
    eps = next((getattr(module, name) for name in _EPS if hasattr(module, name)), None)
    if weight is None or weight.dim() != 1 or not isinstance(eps, float):
        return None
    probe = torch.randn(8, len(weight), generator=torch.Generator().manual_seed(0)).to(dtype)
    theirs = _results(module, probe)
    if len(theirs) != 1 or theirs[0].dtype is not dtype:
        return None
    for offset in (0.0, 1.0):
        for early in (True, False):
            norm = RmsNorm(weight.float() + offset, eps, early)
            if _are_same(norm(probe), theirs[0]):
                return norm
    return None


def _widen(gate: Any, dtype: torch.dtype) -> None:
    """DeepSeek's gates convert all of their weights in every step."""
    narrow: nn.Parameter | None = gate._parameters.get("weight")
    if narrow is None or narrow.dim() != 2 or narrow.dtype is torch.float32:
        return
    probe = torch.randn(8, narrow.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    theirs = _results(gate, probe)
    gate.weight = nn.Parameter(narrow.float(), requires_grad=False)
    if not _are_equal(_results(gate, probe), theirs):  # such as one that multiplies in the dtype of its input
        gate.weight = narrow


def _multiply_natively(gate: Any) -> None:
    """Gates multiply by a call of `F.linear`, not of a layer that could be replaced."""
    weight: nn.Parameter | None = gate._parameters.get("weight")
    if weight is not None and weight.dim() == 2 and weight.dtype is torch.bfloat16 and weight.is_contiguous():
        gate.weight = _GateWeight.of(weight)


class _GateWeight(nn.Parameter):
    """A parameter whose products are the kernels'. Whatever else is done with it is torch's."""

    product: NativeLinear

    @classmethod
    def of(cls, weight: nn.Parameter) -> _GateWeight:
        made: _GateWeight = torch.Tensor._make_subclass(cls, weight.detach(), False)
        made.product = NativeLinear(weight.detach())
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and len(args) == 2 and not kwargs and isinstance(args[1], cls):
            return args[1].product(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _results(call: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    """The tensors that come of it; none where it takes something else than these."""
    try:
        return [leaf for leaf in tree_leaves(call(*inputs)) if isinstance(leaf, Tensor)]
    except (TypeError, ValueError, RuntimeError, IndexError):
        return []


def _are_equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) > 0 and all(map(torch.equal, ours, theirs))


def _are_same(ours: Tensor, theirs: Tensor) -> bool:
    close = torch.allclose(ours.float(), theirs.float(), rtol=1e-2 if ours.dtype is torch.bfloat16 else 1e-5, atol=1e-6)
    return close and (ours.dtype is torch.float32 or float((ours == theirs).float().mean()) >= _SAME)


def _fuse_rotary(file: Any, dtype: torch.dtype) -> None:
    """Its modules call this function by its name in the file. The replacement has the same bits, and hands on to the
    original what it does not know, so that nobody else who uses the file can tell."""
    original: Rotary | None = getattr(file, _ROTARY, None)
    if original is None or isinstance(original, _Rotary):
        return
    numbers = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 16, generator=numbers).to(dtype) for heads in (4, 2))
    cos, sin = (torch.randn(1, 3, 16, generator=numbers).to(dtype) for _ in range(2))
    replacement = _Rotary(original)
    if _are_equal(_results(replacement, q, k, cos, sin), _results(original, q, k, cos, sin)):
        setattr(file, _ROTARY, replacement)


class _Rotary:
    """`apply_rotary_pos_emb` of packed tokens."""

    def __init__(self, original: Rotary) -> None:
        self._original = original

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        """q [1, H, T, D], k [1, G, T, D], cos and sin [1, T, D]."""
        known = not args and not kwargs and q.dim() == k.dim() == 4 and cos.dim() == 3 and not torch.is_grad_enabled()
        known = known and can_rotate(q, cos) and can_rotate(k, cos) and cos.shape == sin.shape
        if not (known and cos.is_contiguous() and sin.is_contiguous() and cos.dtype is sin.dtype):
            return self._original(q, k, cos, sin, *args, **kwargs)
        return rotate(q, cos, sin), rotate(k, cos, sin)
