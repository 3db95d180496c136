"""Dense Llama-like models as the upcycler reads them: a folder in transformers' format, or one GGUF file."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize
from transformers.integrations.gguf.reader import GgufHeader, LazyGgufTensor, load_gguf_state_dict, read_gguf_metadata

from moeray.errors import CheckpointError, UnsupportedModelError
from moeray.model.checkpoint import Checkpoint, Scheme, resolve

_LLAMA_LIKE = ("llama", "mistral")
_CARRIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "sliding_window",
)
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt")
_EXTRA_FILES = ("chat_template*", "generation_config.json")
_GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class DenseModel:
    """`settings`: the config keys that a Llama and a Mixtral share. `names`: tensors by Llama's names, which `read`
    gives one by one. `save_tokenizer` writes tokenizer, chat template and generation config into a folder."""

    label: str
    settings: dict[str, Any]
    names: frozenset[str]
    read: Callable[[str], Tensor]
    save_tokenizer: Callable[[Path], None]


def open_dense(source: Path) -> DenseModel:
    """Open a folder or a `.gguf` file. Raises CheckpointError, UnsupportedModelError."""
    model = _open_gguf(source) if source.suffix == ".gguf" else _open_folder(source)
    wanted = set(expected_names(model.settings))
    missing, extra = sorted(wanted - model.names), sorted(model.names - wanted)
    if missing:
        raise CheckpointError(f"tensor {missing[0]} is not in {model.label}; fetch it again")
    if extra:
        raise UnsupportedModelError(
            f"{model.label} has tensor {extra[0]}, which a Mixtral model has no place for; only Llama-like models "
            "without biases can be upcycled"
        )
    return model


def expected_names(settings: Mapping[str, Any]) -> list[str]:
    """Tensor names of the dense model that the settings describe."""
    names = ["model.embed_tokens.weight"]
    for layer in range(settings["num_hidden_layers"]):
        names += [f"model.layers.{layer}.{part}.weight" for part in _GGUF_LAYER_NAMES.values()]
    names.append("model.norm.weight")
    return names if settings["tie_word_embeddings"] else [*names, "lm_head.weight"]


def _open_folder(folder: Path) -> DenseModel:
    checkpoint = Checkpoint.open(resolve(str(folder), None, node="this node"))
    config = checkpoint.config
    if config.model_type not in _LLAMA_LIKE:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} of {folder} cannot be upcycled; give one of {', '.join(_LLAMA_LIKE)}"
        )
    if checkpoint.quantization.scheme is not Scheme.NONE:
        raise UnsupportedModelError(f"{folder} is quantised ({checkpoint.quantization.scheme}); give its bf16 original")
    settings = {key: getattr(config, key) for key in _CARRIED if hasattr(config, key)}
    settings["head_dim"] = settings.get("head_dim") or config.hidden_size // config.num_attention_heads
    names = frozenset(checkpoint.keys())
    ignored = {key for key in names if key.endswith("rotary_emb.inv_freq")}
    if settings["tie_word_embeddings"]:
        ignored.add("lm_head.weight")

    def save_tokenizer(out: Path) -> None:
        for pattern in (*_TOKENIZER_FILES, *_EXTRA_FILES):
            for path in folder.glob(pattern):
                shutil.copyfile(path, out / path.name)

    return DenseModel(str(folder), settings, names - ignored, checkpoint.tensor, save_tokenizer)


def _open_gguf(path: Path) -> DenseModel:
    if not path.is_file():
        raise CheckpointError(f"file {path} is not there; check the path")
    try:
        metadata, _ = read_gguf_metadata(str(path))
        header = GgufHeader.from_file(str(path))
        tensors = load_gguf_state_dict(header)
        settings = _gguf_settings(path, metadata, tensors)
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise CheckpointError(f"file {path} is not a GGUF that can be read ({error}); fetch it again") from error
    size = path.stat().st_size
    for info in header.tensors:
        if header.data_start + info.offset + info.nbytes > size:
            raise CheckpointError(f"file {path} is truncated within tensor {info.name}; fetch it again")
    names = {_llama_name(name): name for name in tensors}

    def read(name: str) -> Tensor:
        tensor = _decode(tensors[names[name]])
        if name.endswith("q_proj.weight"):
            return _rotate_halves(tensor, settings["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            return _rotate_halves(tensor, settings["num_key_value_heads"])
        return tensor

    def save_tokenizer(out: Path) -> None:
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
        except (ValueError, KeyError) as error:
            raise UnsupportedModelError(f"the tokenizer in {path} cannot be read ({error}); give a folder") from error
        tokenizer.save_pretrained(out)

    return DenseModel(str(path), settings, frozenset(names), read, save_tokenizer)


def _gguf_settings(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, LazyGgufTensor]) -> dict[str, Any]:
    family = metadata.get("general.architecture")
    if family != "llama":
        raise UnsupportedModelError(f"architecture {family!r} of {path} cannot be upcycled; give a llama GGUF")
    heads = metadata.get("llama.attention.head_count")
    for key, refused in (
        ("llama.expert_count", bool(metadata.get("llama.expert_count"))),
        ("llama.rope.scaling.type", metadata.get("llama.rope.scaling.type", "none") != "none"),
        ("rope_freqs.weight", "rope_freqs.weight" in tensors),
        ("llama.attention.head_count", not isinstance(heads, int)),
    ):
        if refused:
            raise UnsupportedModelError(f"{path} has {key}, which the upcycler does not carry over; give another model")
    hidden = metadata["llama.embedding_length"]
    return {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": metadata.get("llama.attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": {"rope_type": "default", "rope_theta": metadata.get("llama.rope.freq_base", 10000.0)},
    }


def _llama_name(name: str) -> str:
    if name in _GGUF_NAMES:
        return _GGUF_NAMES[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    part = rest.removesuffix(".weight")
    return f"model.layers.{block}.{_GGUF_LAYER_NAMES[part]}.weight" if part in _GGUF_LAYER_NAMES else name


def _decode(tensor: LazyGgufTensor) -> Tensor:
    raw: Tensor = tensor[...]
    if tensor.ggml_type not in GGML_BLOCK:
        return raw
    elements, size = GGML_BLOCK[tensor.ggml_type]
    shape = (*tensor.shape[:-1], tensor.shape[-1] // size * elements)
    values: Tensor = dequantize(raw, tensor.ggml_type, torch.float32)
    return values.reshape(shape)


def _rotate_halves(weight: Tensor, heads: int) -> Tensor:
    """GGUF interleaves the rotated pairs of each head's rows; transformers keeps the two halves apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
