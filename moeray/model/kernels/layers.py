"""Which kernels compute the experts of which layers."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from moeray.errors import ConfigError
from moeray.model.expert_tensor import ExpertTensor
from moeray.model.family import ExpertsLayer, Family
from moeray.model.kernels import cuda, native
from moeray.model.kernels.cuda import TritonLayer
from moeray.model.kernels.experts import KernelExpert, KernelLayer, NativeLayer, UnsupportedByKernelError
from moeray.model.kernels.tiles import Tiles
from moeray.settings.experts import ExpertKernel

log = logging.getLogger(__name__)

_NEEDS = {
    "native": "needs a CPU (this is {device}) and compiled kernels (see the log); use auto, triton or torch",
    "triton": "needs a GPU (this is {device}) and the package triton (pip install 'moeray[gpu]'); use auto or torch",
}


def choose_kernel(asked: ExpertKernel, dtype: torch.dtype, device: torch.device) -> ExpertKernel:
    """What computes experts, as far as it knows a layer. Raises ConfigError where that cannot be.

    `auto` is `native` on a CPU and `triton` on a GPU, in half precision: fp32 stays with torch, whose results
    transformers' are.
    """
    if asked != "auto":
        if not _can(asked, device):
            raise ConfigError(f"config key experts.kernel: {asked} {_NEEDS[asked].format(device=device)}")
        return asked
    if dtype is torch.float32:
        return "torch"
    best: ExpertKernel = "native" if device.type == "cpu" else "triton"
    if _can(best, device):
        return best
    if best == "triton":
        log.warning("the package triton is not installed, so experts run on torch, slower; pip install 'moeray[gpu]'")
    return "torch"


def _can(kernel: ExpertKernel, device: torch.device) -> bool:
    if kernel == "native":
        return device.type == "cpu" and native.available()
    return kernel == "torch" or cuda.available(device)


class LayerKernels:
    """The kernels of a family's layers. Whether they know a layer turns out when its first expert is loaded; those that
    they do not know run on torch, with one warning, or a ConfigError where the config asks for the kernel.
    """

    def __init__(self, family: Family, dtype: torch.dtype, device: torch.device, asked: ExpertKernel) -> None:
        """Raises ConfigError where the kernel that is asked for cannot be had."""
        self._asked = asked
        self._warned = False
        self.kernel = choose_kernel(asked, dtype, device)
        self._layers: dict[int, KernelLayer] = {}
        measured: dict[bytes, Tiles] = {}
        makers: dict[ExpertKernel, Callable[[ExpertsLayer], KernelLayer]] = {
            "native": NativeLayer,
            "triton": lambda moe: TritonLayer(moe, dtype, measured),
        }
        for layer, moe in family.layers.items() if self.kernel in makers else ():
            try:
                self._layers[layer] = makers[self.kernel](moe)
            except UnsupportedByKernelError as error:
                self._refuse(moe, error)

    def of(self, layer: int) -> KernelLayer | None:
        return self._layers.get(layer)

    def expert(
        self, moe: ExpertsLayer, up: ExpertTensor, down: ExpertTensor, biases: dict[str, Tensor]
    ) -> KernelExpert | None:
        """None where torch computes the layer. `biases`: parameter name -> bias."""
        kernel = self._layers.get(moe.layer)
        if kernel is None:
            return None
        try:
            return kernel.expert(up, down, {name: bias.float() for name, bias in biases.items()})
        except UnsupportedByKernelError as error:
            del self._layers[moe.layer]
            self._refuse(moe, error)
            return None

    def _refuse(self, moe: ExpertsLayer, error: UnsupportedByKernelError) -> None:
        message = f"the {self.kernel} kernels cannot compute the experts of layer {moe.layer}: {error}"
        if self._asked != "auto":
            raise ConfigError(f"config key experts.kernel: {message}; use auto or torch") from error
        if not self._warned:
            log.warning("%s; they (and those of further layers that are alike) run on torch, slower", message)
        self._warned = True
