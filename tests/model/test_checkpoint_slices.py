"""Every expert's slice, and the trunk, equal what transformers loads from the same files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, conversion_mapping
from transformers.core_model_loading import Interleave, Transpose, WeightConverter, WeightRenaming

from moeray.errors import UnsupportedModelError
from moeray.model.checkpoint import Checkpoint, resolve
from moeray.model.family import load_family, model_class, without_experts
from moeray.model.formats import Fp8Block, Mxfp4, Plain
from moeray.model.loading import open_model
from moeray.model.slices import WeightMap
from tests.checkpoints import EXPERTS, FAMILIES, FURTHER_FAMILIES, make_tiny
from tests.quantize import make_fp8, make_mxfp4

Opened = tuple[Checkpoint, WeightMap, dict[str, int]]


def opened(path: Path) -> Opened:
    checkpoint = Checkpoint.open(resolve(str(path), None, node="here"))
    family = load_family(checkpoint.config)
    return checkpoint, WeightMap.build(family.full, checkpoint, family.expert_counts()), family.expert_counts()


def reference(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def assert_same(path: Path, dense: Path) -> None:
    """What moeray reads from `path` is what transformers reads from `dense`."""
    checkpoint, weights, counts = opened(path)
    model = reference(dense)
    state = model.state_dict()
    for name, count in counts.items():
        rows = [weights.expert(name, e) for e in range(count)]
        for e, row in enumerate(rows):
            assert torch.equal(row.dense(torch.float32), state[name][e]), (name, e)
            assert row.shape == tuple(state[name].shape[1:])
        assert sum(row.nbytes for row in rows) == weights.expert_bytes(name) * count
        assert not torch.equal(rows[0].dense(torch.float32), rows[1].dense(torch.float32))
    trunk_class = without_experts(model_class(checkpoint.config))
    trunk_state = weights.trunk_state_dict()
    again = trunk_class.from_pretrained(None, config=checkpoint.config, state_dict=trunk_state, dtype=torch.float32)
    assert set(state) - set(again.state_dict()) == set(counts)
    for name, value in again.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("family", [*FAMILIES, *FURTHER_FAMILIES])
def test_family(family: str, tmp_path: Path) -> None:
    path = make_tiny(family, tmp_path)
    assert_same(path, path)


@pytest.mark.parametrize("shard_bytes", [None, 60_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_dtype_that_the_config_does_not_name_is_the_weights_own(
    dtype: torch.dtype, shard_bytes: int | None, tmp_path: Path
) -> None:
    path = make_tiny("mixtral", tmp_path, dtype=dtype, shard_bytes=shard_bytes)
    config = json.loads((path / "config.json").read_text())
    del config["dtype"]
    (path / "config.json").write_text(json.dumps(config))
    assert open_model(str(path), None, node="here").dtype("auto") is dtype


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_sharded_equals_single_and_each_part_names_its_files(family: str, tmp_path: Path) -> None:
    path = make_tiny(family, tmp_path, shard_bytes=60_000)
    assert_same(path, path)
    checkpoint, weights, counts = opened(path)
    files = set(json.loads((path / "model.safetensors.index.json").read_text())["weight_map"].values())
    layers = sorted({int(name.split(".")[2]) for name in counts})
    everything = weights.files_for_experts({layer: range(EXPERTS) for layer in layers}) | weights.files_for_trunk()
    assert everything == files
    one = weights.files_for_experts({layers[-1]: [EXPERTS - 1]})
    assert one
    assert one < files
    assert weights.files_for_experts({}) == set()
    for unneeded in files - one:
        (path / unneeded).unlink()
    _, weights, _ = opened(path)
    for name in counts:
        if int(name.split(".")[2]) == layers[-1]:
            weights.expert(name, EXPERTS - 1)
    assert checkpoint.fingerprint == opened(path)[0].fingerprint


def test_sizes_are_known_without_the_files(tmp_path: Path) -> None:
    path = make_tiny("deepseek_v3", tmp_path, shard_bytes=100_000, dtype=torch.bfloat16)
    _, weights, counts = opened(path)
    exact = {name: weights.expert_bytes(name) for name in counts}
    trunk = weights.trunk_bytes()
    for file in path.glob("*.safetensors"):
        file.unlink()
    _, weights, _ = opened(path)
    assert {name: weights.expert_bytes(name) for name in counts} == exact
    assert weights.trunk_bytes() == trunk


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 192, "kv_lora_rank": 512, "qk_rope_head_dim": 64}])
def test_fp8_blocks_with_576_and_192_rows(fused: bool, sizes: dict[str, int], tmp_path: Path) -> None:
    plain = make_tiny("deepseek_v3", tmp_path / "plain", **sizes, num_hidden_layers=2)
    path, dense = make_fp8(plain, tmp_path, block=(128, 128) if sizes else (32, 32), fused=fused)
    assert_same(path, dense)
    _, weights, counts = opened(path)
    parts = [part for name in counts for part in weights.expert(name, 3).parts]
    assert all(isinstance(part, Fp8Block) for part in parts)
    assert len(parts) == (2 if fused else 3)


def test_fp8_sizes_without_the_files(tmp_path: Path) -> None:
    path, _ = make_fp8(make_tiny("qwen3_moe", tmp_path / "plain"), tmp_path, block=(32, 32))
    checkpoint, weights, counts = opened(path)
    exact = {name: weights.expert_bytes(name) for name in counts}
    index = {"weight_map": dict.fromkeys(checkpoint.keys(), "model-00001-of-00001.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "model.safetensors").unlink()
    assert {name: opened(path)[1].expert_bytes(name) for name in counts} == exact


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 192, "intermediate_size": 576}])
def test_mxfp4(sizes: dict[str, int], tmp_path: Path) -> None:
    path, dense = make_mxfp4(make_tiny("gpt_oss", tmp_path / "plain", **sizes, num_hidden_layers=2), tmp_path)
    assert_same(path, dense)
    _, weights, counts = opened(path)
    for name in counts:
        (part,) = weights.expert(name, 3).parts
        assert isinstance(part, Plain if name.endswith("_bias") else Mxfp4)


def test_fused_checkpoint_of_a_per_expert_family(tmp_path: Path) -> None:
    plain = make_tiny("qwen3_moe", tmp_path / "plain")
    _, fused = make_fp8(plain, tmp_path, block=(32, 32), fused=True)
    assert_same(fused, fused)
    _, weights, counts = opened(fused)
    assert {len(weights.expert(name, 0).parts) for name in counts} == {1}


def test_experts_are_views_of_the_map_and_read_only_what_is_asked(tmp_path: Path) -> None:
    path = make_tiny("mixtral", tmp_path)
    checkpoint, weights, _ = opened(path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    first, second = weights.expert(name, 2), weights.expert(name, 2)
    for one, other in zip(first.parts, second.parts, strict=True):
        assert isinstance(one, Plain)
        assert isinstance(other, Plain)
        assert one.tensor.data_ptr() == other.tensor.data_ptr()
        assert one.dense(torch.float32).data_ptr() == one.tensor.data_ptr()
    maps = Path(f"/proc/{os.getpid()}/maps").read_text()
    mine = [line for line in maps.splitlines() if line.endswith(str(path / "model.safetensors"))]
    assert {line.split()[1] for line in mine} == {"r--s"}
    assert checkpoint.tensor("model.norm.weight").shape == (64,)


def test_tied_embeddings_may_be_stored_under_either_name_or_both(tmp_path: Path) -> None:
    path = make_tiny("granitemoe", tmp_path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    assert_same(path, path)
    embeddings = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embeddings.clone()}, file, metadata={"format": "pt"})
    assert_same(path, path)


def test_extra_tensors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_tiny("glm4_moe", tmp_path, num_hidden_layers=2)
    file = path / "model.safetensors"
    tensors = load_file(file)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**tensors, **extra}, file, metadata={"format": "pt"})
    opened(path)
    assert not caplog.records
    save_file({**tensors, "model.surprise.weight": torch.ones(4)}, file, metadata={"format": "pt"})
    assert_same(path, path)
    assert "model.surprise.weight" in caplog.text


def test_experts_slices_move_to_a_device(tmp_path: Path) -> None:
    _, weights, _ = opened(make_tiny("mixtral", tmp_path))
    tensor = weights.expert("model.layers.0.mlp.experts.down_proj", 1)
    assert torch.equal(tensor.to(torch.device("cpu")).dense(torch.float32), tensor.dense(torch.float32))
    assert tensor.to(torch.device("meta")).dense(torch.bfloat16).device.type == "meta"


@pytest.fixture
def fused_mixtral_mapping(request: pytest.FixtureRequest) -> Iterator[None]:
    """Until the test ends, Mixtral's experts lie in its checkpoints as the parametrised operations undo."""
    known = conversion_mapping.get_checkpoint_conversion_mapping("mixtral")
    entries = [WeightRenaming(".block_sparse_moe.", ".mlp.")]
    for name in ("gate_up_proj", "down_proj"):
        entries.append(WeightConverter(f"mlp.experts.{name}", f"mlp.experts.{name}", list(request.param)))
    conversion_mapping.register_checkpoint_conversion_mapping("mixtral", entries, overwrite=True)
    yield
    conversion_mapping.register_checkpoint_conversion_mapping("mixtral", known, overwrite=True)
    conversion_mapping.USER_REGISTERED_MAPPINGS.discard("mixtral")


@pytest.mark.parametrize(
    "fused_mixtral_mapping",
    [[Transpose(1, 2)], [Transpose(1, 2, check_dims=True)], [Interleave(dim=1)]],
    indirect=True,
    ids=["transpose", "transpose-if-needed", "interleave"],
)
@pytest.mark.usefixtures("fused_mixtral_mapping")
def test_any_other_chain_of_operations(tmp_path: Path) -> None:
    path = make_tiny("mixtral", tmp_path, intermediate_size=64)  # so that down_proj is square
    assert "model.layers.0.block_sparse_moe.experts.gate_up_proj" in load_file(path / "model.safetensors")
    assert_same(path, path)


@pytest.mark.parametrize("fused_mixtral_mapping", [[Transpose(0, 1)]], indirect=True, ids=["across-experts"])
@pytest.mark.usefixtures("fused_mixtral_mapping")
def test_a_chain_that_mixes_experts_is_refused(tmp_path: Path) -> None:
    path = make_tiny("mixtral", tmp_path, hidden_size=8, intermediate_size=EXPERTS, num_attention_heads=2, head_dim=4)
    _, weights, _ = opened(path)
    with pytest.raises(UnsupportedModelError, match=r"down_proj: transformers' conversion .* mixes experts"):
        weights.expert("model.layers.0.mlp.experts.down_proj", 0)
