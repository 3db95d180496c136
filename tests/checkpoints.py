"""Tiny random checkpoints of real families, written by `save_pretrained` and so with the families' own tensor names.

Weights are scaled so that outputs are not degenerate: experts differ, the gate's choice differs from token to token,
and norms, biases and sinks are not left at their neutral initial values.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

EXPERTS = 8
VOCAB = 320

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 20,
}
_ROUTED: dict[str, Any] = {"n_routed_experts": EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
_SLIDING_FULL = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "sliding_window": 9},
    "qwen2_moe": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "use_sliding_window": True,
        "sliding_window": 11,
        "max_window_layers": 1,
        "num_key_value_heads": 4,
    },
    "qwen3_moe": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "head_dim": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "olmoe": {"num_experts": EXPERTS, "num_experts_per_tok": 3, "clip_qkv": 3.0, "num_key_value_heads": 4},
    "granitemoe": {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "embedding_multiplier": 0.2,
        "logits_scaling": 2.0,
        "residual_multiplier": 1.5,
        "attention_multiplier": 0.2,
        "tie_word_embeddings": True,
    },
    "deepseek_v2": {
        **_MLA,
        **_ROUTED,
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.0,
    },
    "deepseek_v3": {
        **_MLA,
        **_ROUTED,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "gpt_oss": {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "intermediate_size": 64,
        "head_dim": 16,
        "sliding_window": 10,
        "layer_types": _SLIDING_FULL,
        "swiglu_limit": 1.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
    "glm4_moe": {
        **_ROUTED,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "head_dim": 24,
        "use_qk_norm": True,
        "attention_bias": True,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
    },
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS,
        "moe_k": 3,
        "moe_intermediate_size": 40,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "moe_layer_interval": 1,
    },
    "phimoe": {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "sliding_window": 12,
        "attention_bias": True,
        "lm_head_bias": True,
    },
    "dots1": {
        **_ROUTED,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "head_dim": 16,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "sliding_window": 13,
        "max_window_layers": 2,
    },
}
"""The families that the project promises; `FURTHER_FAMILIES` answer the same interface."""

FURTHER_FAMILIES: dict[str, dict[str, Any]] = {
    "flex_olmo": {"num_experts": EXPERTS, "num_experts_per_tok": 3},
    "minimax_m2": {"num_local_experts": EXPERTS, "num_experts_per_tok": 3, "head_dim": 24},
    "hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": 3, "head_dim": 16},
    "solar_open": {**_ROUTED, "n_shared_experts": 1, "head_dim": 16},
    "granitemoeshared": {"num_local_experts": EXPERTS, "num_experts_per_tok": 3, "shared_intermediate_size": 48},
    "granitemoe_swa": {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "shared_intermediate_size": 48,
        "sliding_window": 10,
        "layer_types": _SLIDING_FULL,
    },
    "exaone_moe": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "sliding_window": 10,
        "layer_types": _SLIDING_FULL,
        "head_dim": 16,
    },
    "afmoe": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "num_shared_experts": 1,
        "num_dense_layers": 1,
        "head_dim": 16,
        "sliding_window": 10,
        "layer_types": _SLIDING_FULL,
        "mup_enabled": True,
    },
    "cohere2_moe": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "num_shared_experts": 1,
        "head_dim": 16,
        "sliding_window": 10,
        "layer_types": _SLIDING_FULL,
    },
    "glm4_moe_lite": {**_MLA, **_ROUTED, "n_shared_experts": 1, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "axk1": {**_MLA, **_ROUTED, "n_shared_experts": 1, "n_group": 4, "topk_group": 2},
    "mellum": {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "head_dim": 16,
        "sliding_window": 10,
        "layer_types": _SLIDING_FULL,
    },
    "hy_v3": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "num_shared_experts": 1,
        "head_dim": 16,
    },
    "mimo_v2_flash": {
        **_ROUTED,
        "head_dim": 24,
        "v_head_dim": 16,
        "sliding_window": 11,
        "layer_types": _SLIDING_FULL,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "aria_text": {"moe_num_experts": EXPERTS, "moe_topk": 3, "moe_num_shared_experts": 1},
    "beam": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "head_dim": 16,
        "n_group": 2,
        "topk_group": 1,
        "sliding_window": 10,
        "layer_types": _SLIDING_FULL,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "final_logit_softcapping": 2.0,
    },
    "flint": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "head_dim": 16,
        "mlp_only_layers": [1],
        "sliding_window": 10,
        "layer_types": _SLIDING_FULL,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": EXPERTS,
        "top_k_experts": 2,
        "moe_intermediate_size": 40,
        "head_dim": 16,
        "global_head_dim": 20,
        "num_kv_shared_layers": 1,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "sliding_window": 10,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "final_logit_softcapping": 3.0,
    },
    "kolibri1": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "head_dim": 16,
        "sliding_window": 10,
        "layer_types": _SLIDING_FULL,
    },
    "laguna": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "head_dim": 16,
        "num_attention_heads_per_layer": [2, 4, 6],
        "moe_router_logit_softcapping": 2.0,
        "sliding_window": 10,
        "layer_types": _SLIDING_FULL,
    },
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """A config of a real family at a size that runs in milliseconds: 3 layers, hidden size 64, 8 experts."""
    own = FAMILIES.get(family) or FURTHER_FAMILIES[family]
    settings = {**_COMMON, **own, **overrides}
    for key in ("layer_types", "mlp_layer_types"):
        if key in settings:
            settings[key] = settings[key][: settings["num_hidden_layers"]]
    return CONFIG_MAPPING[family](**settings)


def tiny_model(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model in evaluation mode."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(model.state_dict().items()):
            if value.is_floating_point():
                value.copy_(_random(name, value, generator))
    model.tie_weights()
    return model


def _random(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(like.shape, generator=generator)
    if re.search(r"norm[^.]*\.weight$", name):
        return 1 + 0.2 * noise
    if like.dim() == 1 or "bias" in name:
        return 0.3 * noise
    if re.search(r"(^|[._])(gate|router)(\.(wg|layer))?\.weight$", name):
        return 0.4 * noise  # the gate's logits spread by about 3
    if "embed_tokens" in name:
        return noise
    fan_in = min(like.shape[-2:]) if "experts" in name else like.shape[-1]
    return 1.5 * noise / math.sqrt(fan_in)


def make_tiny(
    family: str,
    path: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int | None = None,
    tokenizer: bool = False,
    **overrides: Any,
) -> Path:
    """Write a tiny checkpoint of `family` to `path` and return it. `overrides` are config keys.

    `shard_bytes` splits it into files of at most that size; `tokenizer` adds a byte-level tokenizer with a chat
    template.
    """
    model = tiny_model(tiny_config(family, **overrides), seed=seed).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(path, **({} if shard_bytes is None else {"max_shard_size": shard_bytes}))
    if tokenizer:
        save_tokenizer(path)
    return path


def spoil(folder: Path, *tensors: str, index: int = 5, value: float = math.nan) -> Path:
    """One number of each becomes another."""
    weights = load_file(folder / "model.safetensors")
    for tensor in tensors:
        weights[tensor].view(-1)[index] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_tokenizer(path: Path) -> None:
    """A byte-level tokenizer (any text round-trips) with `<pad> <s> </s>` as 0, 1, 2 and role marks, in `VOCAB` ids."""
    special = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
