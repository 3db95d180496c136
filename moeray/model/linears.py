"""How the trunk's linear layers are computed: by torch, by oneDNN with packed weights, or by the kernels in C.

Layers of one parent that multiply the same input (query, key and value; gate and up) become one product.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeray.errors import ConfigError
from moeray.model import kernels
from moeray.model.pages import zeros_on_demand
from moeray.settings.engine import LinearKernel

Product = Callable[[Tensor], Tensor]

# Names under which transformers' modules keep layers that multiply the same tensor, in the order in which they do.
_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_proj", "kv_a_proj_with_mqa"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
)

_PACKED_FOR = 8  # rows for which oneDNN chooses its layout; decoding is what to be fast for


def choose_linear(asked: LinearKernel, dtype: torch.dtype, device: torch.device) -> LinearKernel:
    """What computes the linear layers. Raises ConfigError where that cannot be.

    `auto` goes by what the CPU can, not by a measurement, so that every router of one kind of machine gives the same
    bits: in bf16 the kernels, which decode faster and read the checkpoint's own memory. fp32 stays with torch, whose
    results transformers' are.
    """
    low = dtype is torch.bfloat16 and device.type == "cpu"
    if asked == "auto":
        return _best() if low else "torch"
    if asked == "native" and not (device.type == "cpu" and kernels.available()):
        raise ConfigError("config key engine.linear: the native kernels compute on the CPU where they were compiled")
    if asked == "onednn" and not (low and packs_bf16()):
        raise ConfigError(
            "config key engine.linear: oneDNN's packed weights are for bfloat16 on a CPU with AVX-512; set it to auto"
        )
    return asked


def packs_bf16() -> bool:
    """Whether oneDNN is there and packs bf16 weights on this CPU."""
    return torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _best() -> LinearKernel:
    if kernels.available():
        return "native"
    return "onednn" if packs_bf16() and torch.cpu._is_avx512_bf16_supported() else "torch"


def use_linear(model: nn.Module, kernel: LinearKernel) -> None:
    """Make the model's linear layers compute with `kernel`."""
    if kernel == "torch":
        return
    absorbed: list[Any] = [module for module in model.modules() if hasattr(module, "moeray_latent")]
    if kernel == "native":
        for attention in absorbed:
            attention.moeray_latent.use_native()
    read = {attention.kv_b_proj for attention in absorbed}  # by model.latent too
    joined: set[nn.Module] = set()
    for layers in _same_input(model):
        _join(layers, kernel)
        joined |= set(layers)
    for module in model.modules():
        if type(module) is nn.Linear and module not in joined:
            keep = kernel == "native" or module in read or _is_tied(model, module)
            module.forward = _product(module.weight, module.bias, kernel)  # type: ignore[method-assign,assignment]
            if not keep:
                _release(module)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if kernel == "native" and type(head) is nn.Linear:
        # Rounded to bf16, the two likeliest tokens are often equally likely.
        head.forward = partial(head.forward, dtype=torch.float32)  # type: ignore[method-assign,call-arg]


def _same_input(model: nn.Module) -> Iterator[list[nn.Linear]]:
    for parent in model.modules():
        for names in _TOGETHER:
            layers = [layer for name in names if type(layer := getattr(parent, name, None)) is nn.Linear]
            if len(layers) == len(names) and len({layer.in_features for layer in layers}) == 1:
                yield layers


def _is_tied(model: nn.Module, module: nn.Linear) -> bool:
    return any(isinstance(other, nn.Embedding) and other.weight is module.weight for other in model.modules())


def _release(layer: nn.Linear) -> None:
    """Only the packed weight is left."""
    layer.weight = nn.Parameter(layer.weight.new_empty(0, layer.in_features), requires_grad=False)


def _product(weight_OI: Tensor, bias_O: Tensor | None, kernel: LinearKernel) -> Product:
    if kernel == "native":
        return kernels.NativeLinear(weight_OI.detach(), None if bias_O is None else bias_O.detach())
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), _PACKED_FOR)

    def onednn(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias_O, "none", [], "")
        return y

    return onednn


class _Joined:
    """Several layers' products at once: computed when the first is asked for, kept until the last has been."""

    def __init__(self, product: Product, sizes: list[int]) -> None:
        self._product = product
        self._sizes = sizes
        self._x: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def part(self, i: int) -> Product:
        last = i == len(self._sizes) - 1

        def forward(x: Tensor) -> Tensor:
            if x is not self._x:
                self._x, self._parts = x, self._product(x).split_with_sizes(self._sizes, -1)
            y = self._parts[i]
            if last:
                self._x, self._parts = None, ()
            return y

        return forward


def _join(layers: list[nn.Linear], kernel: LinearKernel) -> None:
    weights: list[Tensor] = [layer.weight.detach() for layer in layers]
    rows = sum(len(weight) for weight in weights)
    weight_OI = zeros_on_demand((rows, weights[0].shape[1]), weights[0].dtype, weights[0].device)
    torch.cat(weights, out=weight_OI)
    biases = [layer.bias for layer in layers]
    bias_O = None
    if any(bias is not None for bias in biases):
        filled: list[Tensor] = [
            weight_OI.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers
        ]
        bias_O = torch.cat(filled).detach()
    sizes = [layer.out_features for layer in layers]
    joined = _Joined(_product(weight_OI, bias_O, kernel), sizes)
    for i, (layer, part) in enumerate(zip(layers, torch.split_with_sizes(weight_OI, sizes), strict=True)):
        layer.forward = joined.part(i)  # type: ignore[method-assign,assignment]
        if kernel == "native":
            layer.weight = nn.Parameter(part, requires_grad=False)  # the joined weight's own memory
        else:
            _release(layer)
