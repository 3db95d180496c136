"""What cannot be served right is refused at start, with the reason."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moeray.errors import CheckpointError, UnsupportedModelError
from moeray.model.family import load_family
from moeray.model.loading import open_model
from moeray.model.trunk import Trunk

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def load(config, path):
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    files = open_model(str(path), None, node="here")
    return Trunk.load(files.checkpoint, files.family, files.weights, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "use_mamba_kernels": False}),
        ("qwen3_next", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                        "shared_expert_intermediate_size": 16}),
        ("lfm2_moe", {"num_experts": 4, "moe_intermediate_size": 16, "num_dense_layers": 1,
                      "layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    ],
)  # fmt: skip
def test_state_beside_the_cache(family, options, tmp_path):
    config = CONFIG_MAPPING[family](**SMALL, **options)
    with pytest.raises(UnsupportedModelError, match=r"state|layers use attention|served wrong") as error:
        load(config, tmp_path)
    assert "\n" not in str(error.value)


SPARSE = {
    "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "first_k_dense_replace": 1, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2, "num_key_value_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("zaya", {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 1, "head_dim": 8}),
    ],
)  # fmt: skip
def test_a_family_with_an_attention_or_a_state_of_its_own(family, options, tmp_path):
    """Also where it writes to what has been loaded."""
    with pytest.raises(UnsupportedModelError, match=f"'{family}'|keeps state beside") as error:
        load(CONFIG_MAPPING[family](**SMALL | options), tmp_path)
    assert "\n" not in str(error.value)


def test_more_experts_a_token_than_there_are(tmp_path):
    config = CONFIG_MAPPING["mixtral"](**SMALL, num_local_experts=4, num_experts_per_tok=9)
    with pytest.raises(
        CheckpointError, match=r"num_experts_per_tok is 9 and must be at most num_local_experts, which is 4"
    ):
        load(config, tmp_path)


@pytest.mark.parametrize("family", ["axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4"])
def test_a_family_that_attends_by_an_index(family):
    with pytest.raises(UnsupportedModelError, match=f"'{family}' has an index that chooses what each token attends to"):
        load_family(CONFIG_MAPPING[family](**SMALL | SPARSE, pad_token_id=0))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_experts_per_tok", "two", "is 'two' and must be of type int"),
        ("num_experts_per_tok", None, "is None and must be 1 or more"),
        ("num_experts_per_tok", 0, "is 0 and must be 1 or more"),
        ("num_hidden_layers", -1, "is -1 and must be 1 or more"),
        ("num_hidden_layers", 2.5, r"is 2\.5 and must be of type int"),
        ("hidden_size", 0, "is 0 and must be 1 or more"),
        ("num_local_experts", 0, "is 0 and must be 1 or more"),
        ("num_key_value_heads", 0, "is 0 and must be 1 or more"),
        ("sliding_window", -3, "is -3 and must be 0 or more, or null"),
        ("sliding_window", "wide", "is 'wide' and must be of type int"),
        ("hidden_act", "nope", "is 'nope' and must be an activation"),
        ("rms_norm_eps", None, "is None and must be of type float"),
        ("rope_theta", None, "is None and must be a number above 0"),
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": "x"},
            "rope_theta is 'x' and must be a number above 0",
        ),
    ],
)
def test_a_value_that_no_model_has(key, value, words, tmp_path):
    CONFIG_MAPPING["mixtral"](**SMALL, num_local_experts=4).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"config.json: {key}.*{words}.*; use the config.json") as error:
        open_model(str(tmp_path), None, node="here")
    assert "\n" not in str(error.value)


def test_routing_groups_that_the_experts_do_not_fill(tmp_path):
    """Whose gate computes for some numbers of tokens."""
    config = CONFIG_MAPPING["deepseek_v3"](**SMALL | SPARSE | {"n_routed_experts": 8, "n_group": 3, "topk_group": 2})
    with pytest.raises(UnsupportedModelError, match=r"config.json does not fit it.*shape"):
        load(config, tmp_path)


def test_a_gate_whose_bias_is_no_number(tmp_path):
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["deepseek_v3"](**SMALL | SPARSE))
    tensor = "model.layers.1.mlp.gate.e_score_correction_bias"
    model.state_dict()[tensor][2] = float("nan")
    model.save_pretrained(tmp_path)
    files = open_model(str(tmp_path), None, node="here")
    with pytest.raises(CheckpointError, match=f"tensor {tensor} of the trunk holds NaN; fetch"):
        Trunk.load(files.checkpoint, files.family, files.weights, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("tensor", ["lm_head.weight", "model.norm.weight"])
def test_weights_that_are_not_finite(tensor, tmp_path):
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["mixtral"](**SMALL, num_local_experts=4))
    model.state_dict()[tensor].view(-1)[3] = float("nan")
    model.save_pretrained(tmp_path)
    files = open_model(str(tmp_path), None, node="here")
    with pytest.raises(CheckpointError, match=rf"tensor {tensor} of the trunk is not finite.*fetch"):
        Trunk.load(files.checkpoint, files.family, files.weights, torch.float32, torch.device("cpu"))


def test_a_dtype_that_overflows(tmp_path):
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["mixtral"](**SMALL, num_local_experts=4))
    for tensor in ("lm_head.weight", "model.norm.weight"):
        model.state_dict()[tensor].mul_(6e3)
    model.save_pretrained(tmp_path)
    files = open_model(str(tmp_path), None, node="here")
    with pytest.raises(CheckpointError, match=r"float16 overflows; set dtype to bfloat16"):
        Trunk.load(files.checkpoint, files.family, files.weights, torch.float16, torch.device("cpu"))


def test_a_dense_model(tmp_path):
    with pytest.raises(UnsupportedModelError, match="upcycle"):
        load(CONFIG_MAPPING["llama"](**SMALL), tmp_path)


def test_a_multimodal_model():
    with pytest.raises(UnsupportedModelError, match="multimodal"):
        load_family(CONFIG_MAPPING["qwen3_vl_moe"]())


def test_an_encoder_decoder():
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        load_family(CONFIG_MAPPING["switch_transformers"]())


def test_a_model_whose_tokens_see_their_neighbours(tmp_path, monkeypatch):
    """A family that mixes packed tokens on its own is caught by the self-check."""
    from transformers.models.mixtral import modeling_mixtral

    from tests.checkpoints import make_tiny

    path = make_tiny("mixtral", tmp_path / "m")
    forward = modeling_mixtral.MixtralSparseMoeBlock.forward

    def shifted(self, hidden_states):
        return forward(self, hidden_states + 0.5 * hidden_states.roll(1, dims=1))

    monkeypatch.setattr(modeling_mixtral.MixtralSparseMoeBlock, "forward", shifted)
    files = open_model(str(path), None, node="here")
    with pytest.raises(UnsupportedModelError, match="served wrong"):
        Trunk.load(files.checkpoint, files.family, files.weights, torch.float32, torch.device("cpu"))
