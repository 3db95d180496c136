"""Make a Mixtral-style Mixture-of-Experts checkpoint of a dense Llama-like one: every expert a copy of the MLP.

With the weights of the chosen experts summing to 1, the result computes what the dense model does.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, MixtralConfig

from moeray.errors import CheckpointError, ConfigError
from moeray.model.dense import DenseModel, expected_names, open_dense
from moeray.model.shards import Entry, write_shards

Progress = Callable[[str, int, int], None]
"""(what is going on, done, total)"""

_EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def upcycle(
    source: Path,
    out: Path,
    *,
    experts: int = 8,
    top_k: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress = lambda stage, done, total: None,
    seed: int = 0,
) -> Path:
    """Convert `source` (a folder in transformers' format, or a .gguf file) into the new folder `out`; returns `out`.

    `dtype` is float32, float16 or bfloat16. `seed` draws the gates, which are random since the experts are alike.
    The folder appears whole or not at all. Raises CheckpointError, UnsupportedModelError, ConfigError.
    """
    if not 1 <= top_k <= experts:
        raise ConfigError(f"top_k must be between 1 and experts ({experts}), got {top_k}")
    if out.exists():
        raise CheckpointError(f"folder {out} exists already; remove it or choose another")
    progress("read", 0, 1)
    model = open_dense(source)
    config = MixtralConfig(
        **model.settings, num_local_experts=experts, num_experts_per_tok=top_k, architectures=["MixtralForCausalLM"]
    )
    config.dtype = dtype
    progress("read", 1, 1)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write(model, config, draft, progress, seed)
        draft.chmod(0o755)
        os.rename(draft, out)
    except OSError as error:
        raise CheckpointError(
            f"folder {out} cannot be written: {error.strerror}; free space or choose another"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out


def _write(model: DenseModel, config: MixtralConfig, folder: Path, progress: Progress, seed: int) -> None:
    model.save_tokenizer(folder)
    config.save_pretrained(folder)
    if not (folder / "generation_config.json").exists():
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    write_shards(
        folder,
        _entries(model, config, seed),
        config.dtype,
        progress=lambda done, total: progress("convert", done, total),
    )


def _entries(model: DenseModel, config: MixtralConfig, seed: int) -> Iterator[Entry]:
    """The Mixtral checkpoint's tensors, copies of one MLP matrix next to each other so that it is read once."""

    dtype: torch.dtype = config.dtype

    @lru_cache(maxsize=1)
    def read(name: str) -> Tensor:
        tensor = model.read(name)
        if tuple(tensor.shape) != _shape(name, model.settings):
            raise CheckpointError(
                f"tensor {name} of {model.label} has shape {list(tensor.shape)}, but its config wants "
                f"{list(_shape(name, model.settings))}; fetch it again"
            )
        return tensor.to(dtype)

    for name in expected_names(model.settings):
        shape = _shape(name, model.settings)
        before, mlp, matrix = name.partition(".mlp.")
        if not mlp:
            yield Entry(name, shape, partial(read, name))
            continue
        moe = f"{before}.block_sparse_moe"
        if matrix == "gate_proj.weight":
            layer = int(before.rpartition(".")[2])
            gate_shape = (config.num_local_experts, config.hidden_size)
            yield Entry(f"{moe}.gate.weight", gate_shape, partial(_gate, gate_shape, seed, layer))
        short = _EXPERT_NAMES[matrix.removesuffix(".weight")]
        for expert in range(config.num_local_experts):
            yield Entry(f"{moe}.experts.{expert}.{short}.weight", shape, partial(read, name))


def _gate(shape: tuple[int, int], seed: int, layer: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 100_003 + layer)
    return torch.randn(shape, generator=generator) / math.sqrt(shape[1])


def _shape(name: str, settings: dict[str, Any]) -> tuple[int, ...]:
    hidden, inner, head = settings["hidden_size"], settings["intermediate_size"], settings["head_dim"]
    queries, keys = settings["num_attention_heads"] * head, settings["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (settings["vocab_size"], hidden),
        "lm_head": (settings["vocab_size"], hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    return shapes.get(name.split(".")[-2], (hidden,))
