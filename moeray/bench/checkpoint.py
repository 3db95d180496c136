"""A small random Mixture-of-Experts checkpoint, for measurements that need no trained weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moeray.model.bars import without_bars


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


@dataclass(frozen=True)
class Steering:
    """Prompts of the tokens below `tokens` go to one expert: those tokens' embeddings have a direction in common, with
    which that expert's row of the gate is aligned. Other tokens have as much of it as of any other direction."""

    layer: int = 0
    expert: int = 0
    tokens: int = 64
    strength: float = 3.0
    """How long the common part is, to a random embedding's length of 1."""


def write_random_moe(
    shape: Shape, folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, steering: Steering | None = None
) -> Path:
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
    if steering is not None:
        _steer(model, steering)
    with without_bars():
        model.to(dtype).save_pretrained(folder)
    return folder


def write_small_moe(folder: Path) -> str:
    """The checkpoint of commands that were given none: in fp32, and small enough for any machine."""
    shape = Shape(hidden=128, intermediate=192, experts=8, top_k=2, layers=4, vocab=512)
    return str(write_random_moe(shape, folder / "random-moe", torch.float32))


@torch.no_grad()
def _steer(model: MixtralForCausalLM, steering: Steering) -> None:
    embedding_VD = model.get_input_embeddings().weight
    gate_ED = model.get_parameter(f"model.layers.{steering.layer}.mlp.gate.weight")
    row_D = gate_ED[steering.expert]
    direction_D = row_D / row_D.norm()
    embedding_VD[: steering.tokens] += steering.strength * embedding_VD.shape[1] ** 0.5 * direction_D
