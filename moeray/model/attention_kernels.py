"""What decoding sequences attend with: the kernel in C on a CPU, the one in Triton on a GPU, or torch."""

from __future__ import annotations

import logging

import torch

from moeray.errors import ConfigError
from moeray.model import kernels
from moeray.model.kernels import cuda
from moeray.model.kernels.attention import DTYPES as NATIVE_DTYPES
from moeray.model.kernels.experts import UnsupportedByKernelError
from moeray.settings.engine import AttentionKernel

log = logging.getLogger(__name__)


def choose_attention(asked: AttentionKernel, dtype: torch.dtype, device: torch.device) -> AttentionKernel:
    """`auto` is the device's kernel where it can be had, else torch. Raises ConfigError for another in vain."""
    if asked != "auto":
        if lacks := _lacks(asked, dtype, device):
            raise ConfigError(f"config key engine.attention: {asked} {lacks}; set it to auto")
        return asked
    best: AttentionKernel = "native" if device.type == "cpu" else "triton"
    lacks = _lacks(best, dtype, device)
    if lacks is None:
        return best
    if best == "triton":
        log.warning("attention runs on torch, slower: the kernel %s", lacks)
    return "torch"


def _lacks(kernel: AttentionKernel, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernel cannot compute here; None where it can."""
    if kernel == "native" and not (device.type == "cpu" and dtype in NATIVE_DTYPES and kernels.available()):
        return f"computes fp32 and bf16 on the CPU where it was compiled, but this is {dtype} on {device}"
    if kernel == "triton" and not cuda.available(device):
        return f"needs a GPU (this is {device}) and the package triton (pip install 'moeray[gpu]')"
    if kernel == "triton" and device.type == "cuda":
        try:
            cuda.check_launcher()
        except UnsupportedByKernelError as error:
            return f"cannot be had: {error}"
    return None
