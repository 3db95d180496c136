"""A broken checkpoint stops the start with one line that names file and tensor, and the mend."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moeray.errors import CheckpointError, MoerayError, UnsupportedModelError
from moeray.model.checkpoint import Checkpoint, Quantization, Scheme, resolve
from moeray.model.loading import eos_token_ids, open_model
from moeray.model.safetensors_file import SafetensorsFile
from tests.checkpoints import EXPERTS, make_tiny
from tests.model.test_checkpoint_slices import opened
from tests.quantize import make_fp8, make_mxfp4


def read_all(path: Path) -> None:
    """What the actors of a node do at their start."""
    _, weights, counts = opened(path)
    for lazy in weights.trunk_state_dict().values():
        lazy[...]
    for name, count in counts.items():
        for expert in range(count):
            weights.expert(name, expert)


def refused(path: Path, error: type[MoerayError] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        read_all(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], Any], file: str = "model.safetensors") -> None:
    tensors = load_file(path / file)
    change(tensors)
    save_file(tensors, path / file, metadata={"format": "pt"})


def configure(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    return make_tiny("mixtral", tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_tiny("mixtral", tmp_path, shard_bytes=60_000)


@pytest.mark.parametrize("kept", [0.9, 0.5])
def test_truncated_file(mixtral: Path, kept: float) -> None:
    file = mixtral / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])
    message = refused(mixtral)
    assert f"{file} is truncated: tensor " in message
    assert "fetch it again" in message


def test_truncated_shard(sharded: Path) -> None:
    file = sorted(sharded.glob("*.safetensors"))[2]
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file} is truncated: tensor " in refused(sharded)


@pytest.mark.parametrize("size", [0, 4, 8, 100])
def test_truncated_within_its_header(mixtral: Path, size: int) -> None:
    file = mixtral / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert str(file) in refused(mixtral)


def _with_header(header: bytes, data: bytes = b"\0" * 64) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "run git lfs pull"),
        (struct.pack("<Q", 1 << 62), "no valid header length"),
        (_with_header(b"not json at all"), "not JSON"),
        (_with_header(b"\xff\xfe\xff\xfe"), "not JSON"),
        (_with_header(b"[1, 2, 3]"), "not a JSON object"),
        (_with_header(b'{"a": 3}'), "entry of tensor a is malformed"),
        (_with_header(b'{"a": {"dtype": "F32", "shape": [2]}}'), "entry of tensor a is malformed"),
        (_with_header(b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}'), "malformed"),
        (_with_header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}'), "malformed"),
        (_with_header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 12]}}'), "does not fill"),
        (_with_header(b'{"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}'), "dtype"),
        (_with_header(b'{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'), "dtype 'F4'"),
        (_with_header(b'{"a": {"dtype": "F32", "shape": [200], "data_offsets": [0, 800]}}'), "tensor a ends at byte"),
    ],
)
def test_garbage_header(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile.open(file)
    assert said in str(caught.value)
    assert str(file) in str(caught.value)


def test_unaligned_and_empty_tensors_are_read(tmp_path: Path) -> None:
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "odd": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        "none": {"dtype": "BF16", "shape": [0, 4], "data_offsets": [9, 9]},
        "scalar": {"dtype": "BOOL", "shape": [], "data_offsets": [9, 10]},
    }
    data = b"\x07" + struct.pack("<2f", 1.5, -2.0) + b"\x01"
    file = tmp_path / "x.safetensors"
    file.write_bytes(_with_header(json.dumps(header).encode(), data))
    opened_file = SafetensorsFile.open(file)
    assert opened_file.tensor("odd").tolist() == [1.5, -2.0]
    assert opened_file.tensor("none").shape == (0, 4)
    assert opened_file.tensor("scalar").item() is True
    with pytest.raises(CheckpointError, match="tensor other is not in file"):
        opened_file.tensor("other")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.block_sparse_moe.experts.3.w1.weight",
        f"model.layers.0.block_sparse_moe.experts.{EXPERTS - 1}.w2.weight",
        "model.layers.2.block_sparse_moe.experts.0.w3.weight",
        "model.layers.2.block_sparse_moe.gate.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_missing_tensor(mixtral: Path, name: str) -> None:
    edit(mixtral, lambda tensors: tensors.pop(name))
    message = refused(mixtral)
    assert f"tensor {name} is not in model.safetensors" in message
    assert "fetch the checkpoint again" in message


def test_names_of_another_tool(mixtral: Path) -> None:
    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"module.{name}"] = tensors.pop(name)

    edit(mixtral, wrap)
    message = refused(mixtral)
    assert "tensor model.embed_tokens.weight is not in model.safetensors" in message
    assert "this holds module.lm_head.weight" in message


def test_all_tensors_of_one_kind_missing(mixtral: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.1.") and ".w3." in name]:
            del tensors[name]

    edit(mixtral, drop)
    message = refused(mixtral)
    assert "model.layers.1.mlp.experts.gate_up_proj" in message
    assert "w3" in message


def test_missing_fused_tensor(tmp_path: Path) -> None:
    path = make_tiny("granitemoe", tmp_path)
    edit(path, lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.input_linear.weight"))
    assert "tensor model.layers.1.block_sparse_moe.input_linear.weight is not in" in refused(path)


def test_missing_shard(sharded: Path) -> None:
    file = sorted(sharded.glob("*.safetensors"))[-1]
    file.unlink()
    message = refused(sharded)
    assert f"file {file} is not there on node here" in message


def test_tensor_named_by_the_index_but_not_in_its_file(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    name = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    file = index["weight_map"][name]
    edit(sharded, lambda tensors: tensors.pop(name), file)
    assert f"tensor {name} is not in file {sharded / file}" in refused(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.block_sparse_moe.experts.3.w1.weight",
        "model.layers.1.block_sparse_moe.experts.3.w2.weight",
        "model.layers.2.block_sparse_moe.gate.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_wrong_shape(mixtral: Path, name: str) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:-1].clone()

    edit(mixtral, cut)
    message = refused(mixtral)
    assert name in message
    assert "model.safetensors" in message
    assert "config" in message


def test_config_of_another_size(mixtral: Path) -> None:
    configure(mixtral, intermediate_size=88)
    assert "w1.weight [96, 64]" in refused(mixtral)


def test_config_with_more_or_fewer_experts(mixtral: Path) -> None:
    configure(mixtral, num_local_experts=EXPERTS + 1)
    assert f"experts.{EXPERTS}.w1.weight is not in" in refused(mixtral)
    configure(mixtral, num_local_experts=EXPERTS - 2)
    assert f"the config wants {EXPERTS - 2} experts" in refused(mixtral)


def test_fused_with_another_number_of_experts(tmp_path: Path) -> None:
    path = make_tiny("granitemoe", tmp_path)
    configure(path, num_local_experts=EXPERTS - 2)
    _, weights, counts = opened(path)
    for name in counts:
        with pytest.raises(CheckpointError, match=r"_linear\.weight \[8, .* is not of the 6 experts"):
            weights.expert(name, 0)


def test_config_with_another_number_of_layers(mixtral: Path) -> None:
    configure(mixtral, num_hidden_layers=4)
    assert "tensor model.layers.3." in refused(mixtral)


def test_fp8_without_its_scales(tmp_path: Path) -> None:
    path, _ = make_fp8(make_tiny("qwen3_moe", tmp_path / "plain", num_hidden_layers=2), tmp_path, block=(32, 32))
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    edit(path, lambda tensors: tensors.pop(f"{name}_scale_inv"))
    message = refused(path)
    assert f"{name}_scale_inv" in message
    assert "model.safetensors" in message


@pytest.mark.parametrize(
    "name", ["model.layers.1.block_sparse_moe.experts.3.w2.weight", "model.layers.0.self_attn.q_proj.weight"]
)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_whole_numbers_without_a_quantization_config(mixtral: Path, name: str, dtype: torch.dtype) -> None:
    """Such as bitsandbytes' or GPTQ's behind a config.json of the model that was quantised."""
    edit(mixtral, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    message = refused(mixtral)
    assert f"tensor {name} in file model.safetensors is {dtype}" in message
    assert "use a bf16" in message


@pytest.mark.parametrize(
    "weight", ["model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
)
@pytest.mark.parametrize("part", ["", "_scale_inv"])
def test_fp8_or_its_scales_as_bytes(weight: str, part: str, tmp_path: Path) -> None:
    """As tools store them that know no such dtype."""
    path, _ = make_fp8(make_tiny("qwen3_moe", tmp_path / "plain", num_hidden_layers=2), tmp_path, block=(32, 32))
    name = weight + part
    edit(path, lambda tensors: tensors.update({name: tensors[name].to(torch.uint8)}))
    assert f"tensor {name} in file model.safetensors is torch.uint8" in refused(path)


def test_fp8_with_scales_of_another_block_size(tmp_path: Path) -> None:
    path, _ = make_fp8(make_tiny("qwen3_moe", tmp_path / "plain", num_hidden_layers=2), tmp_path, block=(32, 32))
    configure(path, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert "_scale_inv in file model.safetensors has shape" in refused(path)


def test_mxfp4_with_scales_that_do_not_fit(tmp_path: Path) -> None:
    path, _ = make_mxfp4(make_tiny("gpt_oss", tmp_path / "plain"), tmp_path)

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.mlp.experts.down_proj_scales"
        tensors[name] = tensors[name][..., :1].clone()

    edit(path, cut)
    assert "tensor model.layers.1.mlp.experts.down_proj_scales in file" in refused(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-q4.gguf"])
def test_folder_of_another_form(mixtral: Path, name: str) -> None:
    (mixtral / "model.safetensors").rename(mixtral / name)
    message = refused(mixtral)
    assert f"holds {name} but no safetensors" in message
    assert "convert it to safetensors" in message


def test_shards_without_their_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    first = min(path.name for path in sharded.glob("*.safetensors"))
    message = refused(sharded)
    assert f"holds {first} but neither model.safetensors nor model.safetensors.index.json; fetch" in message


def test_link_to_weights_that_are_not_there(mixtral: Path) -> None:
    (mixtral / "model.safetensors").rename(mixtral / "weights")
    (mixtral / "model.safetensors").symlink_to("nowhere")
    assert f"file {mixtral / 'model.safetensors'} is not there" in refused(mixtral)


def test_index_of_unsafe_files(sharded: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "pytorch_model-00001-of-00001.bin"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "convert the checkpoint to safetensors" in refused(sharded)


def test_index_that_leads_out_of_the_folder(sharded: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../other/model.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.norm.weight lies in '../other/model.safetensors'" in refused(sharded)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_broken_index(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refused(sharded)


def test_no_weights_at_all(mixtral: Path) -> None:
    (mixtral / "model.safetensors").unlink()
    assert f"{mixtral / 'model.safetensors'} is not there on node here" in refused(mixtral)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_broken_config(mixtral: Path, content: str) -> None:
    (mixtral / "config.json").write_text(content)
    assert "config.json" in refused(mixtral)


def test_unknown_model_type(mixtral: Path) -> None:
    configure(mixtral, model_type="no_such_family")
    assert "'no_such_family'" in refused(mixtral, UnsupportedModelError)


def test_code_of_the_checkpoints_own(mixtral: Path) -> None:
    """It is never run, and not needed where transformers has the family itself."""
    configure(mixtral, auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    read_all(mixtral)
    configure(mixtral, model_type="own_moe")
    message = refused(mixtral, UnsupportedModelError)
    assert "'own_moe'" in message
    assert "auto_map" in message
    assert "set model_type" in message


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", None])
def test_unknown_quantisation(mixtral: Path, method: str | None) -> None:
    configure(mixtral, quantization_config={"quant_method": method, "bits": 4})
    assert f"quant_method {method!r}" in refused(mixtral, UnsupportedModelError)


@pytest.mark.parametrize("value", ["fp8", ["x"], 8])
def test_a_quantization_that_is_no_object(mixtral: Path, value: Any) -> None:
    configure(mixtral, quantization_config=value)
    assert f"quantization_config of config.json must be a JSON object, got {value!r}" in refused(mixtral)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pad_token_id": 9999}, "adding_idx"),
        ({"dtype": "int8"}, "int8"), ({"dtype": "float99"}, "float99"),
        ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, "foo"),
    ],
)  # fmt: skip
def test_a_config_that_no_model_can_be_built_by(mixtral: Path, change: dict[str, Any], words: str) -> None:
    configure(mixtral, **change)
    message = refused(mixtral, UnsupportedModelError)
    assert "'mixtral'" in message
    assert "config.json" in message
    assert words in message


@pytest.mark.parametrize("value", ["</s>", ["2"], [1, None], {"id": 2}])
def test_an_end_of_sequence_that_is_no_token_id(mixtral: Path, value: Any) -> None:
    (mixtral / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match="eos_token_id of generation_config"):
        eos_token_ids(open_model(str(mixtral), None, node="here"))


def test_one_file_goes_before_an_index_that_an_earlier_save_has_left(tmp_path: Path) -> None:
    """As with transformers, whose `save_pretrained` leaves it there."""
    both = make_tiny("mixtral", tmp_path / "both", seed=1, shard_bytes=60_000)
    shards = {path: path.read_bytes() for path in both.glob("*.safetensors")}
    make_tiny("mixtral", both, seed=2)
    for path, content in shards.items():
        path.write_bytes(content)
    assert (both / "model.safetensors.index.json").is_file()
    theirs = AutoModelForCausalLM.from_pretrained(both).model.norm.weight
    ours = Checkpoint.open(resolve(str(both), None, node="here"))
    alone = Checkpoint.open(resolve(str(make_tiny("mixtral", tmp_path / "alone", seed=2)), None, node="here"))
    key = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(ours.tensor(key), alone.tensor(key))
    assert torch.equal(ours.tensor("model.norm.weight"), theirs)
    assert ours.fingerprint == alone.fingerprint


@pytest.mark.parametrize("block", [None, [128], [0, 128], "128"])
def test_fp8_without_blocks(mixtral: Path, block: Any) -> None:
    configure(mixtral, quantization_config={"quant_method": "fp8", "weight_block_size": block})
    assert f"weight_block_size {block!r}" in refused(mixtral, UnsupportedModelError)


def test_quantisation_is_split_off_the_config(mixtral: Path) -> None:
    configure(mixtral, quantization_config={"quant_method": "fp8", "weight_block_size": [64, 128]})
    checkpoint = Checkpoint.open(resolve(str(mixtral), None, node="here"))
    assert checkpoint.quantization == Quantization(Scheme.FP8_BLOCK, (64, 128))
    assert not hasattr(checkpoint.config, "quantization_config")


def test_fingerprint_tells_checkpoints_apart(tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str:
        return Checkpoint.open(resolve(str(path), None, node="here")).fingerprint

    one = make_tiny("mixtral", tmp_path / "one")
    assert fingerprint(one) == fingerprint(one)
    assert fingerprint(one) == fingerprint(make_tiny("mixtral", tmp_path / "again"))
    assert fingerprint(one) != fingerprint(make_tiny("mixtral", tmp_path / "wider", intermediate_size=128))
    assert fingerprint(one) != fingerprint(make_tiny("mixtral", tmp_path / "half", dtype=torch.bfloat16))
