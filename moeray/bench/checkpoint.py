"""A small random Mixture-of-Experts checkpoint, for measurements that need no trained weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM


@dataclass(frozen=True)
class Shape:
    """`layers` MoE layers of `experts` experts, `top_k` a token; `vocab` tokens; hidden and intermediate sizes."""

    hidden: int = 1024
    intermediate: int = 512
    experts: int = 32
    top_k: int = 8
    layers: int = 2
    vocab: int = 64
    heads: int = 8


def write_random_moe(shape: Shape, folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Write it with `save_pretrained`. Weights are scaled so that experts differ and tokens vary."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=1,
        num_local_experts=shape.experts, num_experts_per_tok=shape.top_k, max_position_embeddings=4096,
        dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                scale = 1.0 if "embed_tokens" in name else weight.shape[-1] ** -0.5
                weight.normal_(0.0, scale)
    model.to(dtype).save_pretrained(folder)
    return folder
