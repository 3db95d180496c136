"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): the cache keeps each token's latent and rotated key.

Families with MLA compute the latent c and the shared rotated key, and expand them into keys and values of every head
only afterwards (`expand_kv`). Here expanding is left to attention, which keeps [c, rotated key] alone. A prefill
expands; a decoding query is multiplied by the key's expansion instead (absorbed), attends to the latents as to one head
that all queries share, and the value's expansion is applied to what comes out:

    q (W_k c) = (q W_k) c        sum_i p_i (W_v c_i) = W_v (sum_i p_i c_i)

T tokens, H heads, R the latent's rank, P rotated and N other dimensions of a key, V of a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moeray.model.kernels import NativeLinears

_PARTS = ("expand_kv", "kv_b_proj", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def is_latent(module: nn.Module) -> bool:
    """Whether the module has transformers' MLA interface, without a bias in the expansion."""
    return all(hasattr(module, name) for name in _PARTS) and getattr(module.kv_b_proj, "bias", None) is None


class Latent:
    """The expansion of one attention module, absorbed. It reads the module's own weight."""

    def __init__(self, module: Any) -> None:
        self.rank = int(module.kv_lora_rank)
        self.v_size = int(module.v_head_dim)
        self._nope = int(module.qk_nope_head_dim)
        self._weight: nn.Parameter = module.kv_b_proj.weight
        self._expand = module.expand_kv
        self._absorb: NativeLinears | None = None
        self._values: NativeLinears | None = None

    def use_native(self) -> None:
        """Multiply with the kernels; the key's part of the weight is kept a second time, transposed for them."""
        up_HDR = self._up_H().detach()
        self._absorb = NativeLinears(up_HDR[:, : self._nope].mT.contiguous())
        self._values = NativeLinears(up_HDR[:, self._nope :])

    def _up_H(self) -> Tensor:
        return self._weight.view(-1, self._nope + self.v_size, self.rank)

    def absorb(self, q_THD: Tensor) -> Tensor:
        """Queries [T, H, N + P] -> queries of latents [T, H, R + P]."""
        q_HTN = q_THD[..., : self._nope].transpose(0, 1)
        q_HTR = q_HTN @ self._up_H()[:, : self._nope] if self._absorb is None else self._absorb(q_HTN)
        return torch.cat((q_HTR.transpose(0, 1), q_THD[..., self._nope :]), dim=-1)

    def values(self, out_THR: Tensor) -> Tensor:
        """Sums of latents [T, H, R] -> sums of values [T, H, V]."""
        out_HTR = out_THR.transpose(0, 1)
        out_HTV = out_HTR @ self._up_H()[:, self._nope :].mT if self._values is None else self._values(out_HTR)
        return out_HTV.transpose(0, 1)

    def expand(self, kept_T1D: Tensor) -> tuple[Tensor, Tensor]:
        """What the cache keeps, [T, 1, R + P] -> keys [T, H, N + P] and values [T, H, V]."""
        kept_11TD = kept_T1D.transpose(0, 1).unsqueeze(0)
        k_1HTD, v_1HTV = self._expand(kept_11TD[..., : self.rank], kept_11TD[..., self.rank :])
        return k_1HTD[0].transpose(0, 1), v_1HTV[0].transpose(0, 1)


def keep_latents(module: Any, name: str) -> None:
    """Make the module hand latents to its attention, as long as that is the one called `name`."""
    latent = Latent(module)
    expand = module.expand_kv

    def expand_kv(kv: Tensor, k_rotated: Tensor) -> tuple[Tensor, Tensor]:
        if module.config._attn_implementation == name:
            return kv, k_rotated
        expanded: tuple[Tensor, Tensor] = expand(kv, k_rotated)
        return expanded

    module.expand_kv = expand_kv
    module.moeray_latent = latent
