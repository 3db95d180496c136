"""Experts that are kept as int8, and those that are smaller as they are."""

from __future__ import annotations

import os

import pytest
import torch

from moeray.model.loading import open_bank, open_model
from moeray.types import ExpertId
from tests.checkpoints import make_tiny
from tests.quantize import make_fp8, make_mxfp4
from tests.systems import tiny_config


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    made = {
        name: make_tiny(name, folder / name, dtype=torch.bfloat16) for name in ("mixtral", "deepseek_v3", "gpt_oss")
    }
    return made | {
        "deepseek_v3 in FP8": make_fp8(made["deepseek_v3"], folder / "fp8", block=(32, 32))[0],
        "gpt_oss in MXFP4": make_mxfp4(made["gpt_oss"], folder / "mxfp4")[0],
    }


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize(
    ("model", "shrinks"),
    [
        ("mixtral", True), ("deepseek_v3", True), ("gpt_oss", True), ("deepseek_v3 in FP8", False),
        ("gpt_oss in MXFP4", False),
    ],
)  # fmt: skip
def test_a_placement_counts_the_bytes_that_an_expert_takes(checkpoints, tmp_path, model, shrinks, quantization):
    config = tiny_config(
        checkpoints[model], dtype="bfloat16", experts__quantization=quantization, cache_dir=str(tmp_path)
    )
    files = open_model(config.model, None, node="here")
    counted, stored = files.expert_bytes(quantization), files.expert_bytes("none")
    for layer, size in counted.items():
        bank = open_bank(files, config, torch.device("cpu"))
        bank.load([ExpertId(layer, 1)])
        assert size == bank.nbytes
        assert (size < 0.6 * stored[layer]) == (shrinks and quantization == "int8")


def test_two_models_of_the_same_sizes_and_times_have_an_int8_form_each(tmp_path):
    outputs = []
    for seed in (1, 2):
        folder = make_tiny("mixtral", tmp_path / str(seed), seed=seed)
        os.utime(folder / "model.safetensors", (0, 0))
        config = tiny_config(folder, experts__quantization="int8", cache_dir=str(tmp_path / "cache"))
        bank = open_bank(open_model(str(folder), None, node="here"), config, torch.device("cpu"))
        bank.load([ExpertId(0, 1)])
        generator = torch.Generator().manual_seed(0)
        x_RD = torch.randn(3, files_width(bank), generator=generator)
        outputs.append(bank.forward(0, x_RD, [1], [3]))
    assert not torch.allclose(*outputs, rtol=0.1)


def files_width(bank):
    _, held = bank.hold_any()
    return held.zeros(1).shape[1]
