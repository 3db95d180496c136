"""The kernels' benchmark: every format and kernel at a small size, and what it refuses."""

import json

import pytest
import torch
from click.testing import CliRunner

from moeray.bench.kernel import FORMATS, KernelPlan, measure
from moeray.bench.machine import machine_of
from moeray.cli.bench_kernel import command
from moeray.errors import ConfigError
from moeray.model.kernels import available


@pytest.mark.skipif(not available(), reason="the kernels were not compiled on this machine")
def test_every_format_is_measured_beside_the_ceilings():
    plan = KernelPlan(hidden=1024, intermediate=512, distinct=2, rows=(1, 3), threads=(1,), repeat=1)
    figures = measure(plan)["figures"]
    assert {(f["format"], f["kernel"], f["rows"]) for f in figures} == {
        (form, kernel, rows) for form in FORMATS for kernel in ("native", "torch") for rows in (1, 3)
    }
    for f in figures:
        assert min(f["seconds"], f["gb_per_s"], f["read_gb_per_s"], f["peak_gflop_per_s"], f["roofline"]) > 0
        assert 0 < f["error"] < (0.03 if f["format"] == "int8" else 0.01)


@pytest.mark.skipif(not available(), reason="the kernels were not compiled on this machine")
def test_the_command_prints_json():
    options = ["--formats", "bf16", "--kernels", "native", "--rows", "1", "--threads", "1", "--repeat", "1"]
    result = CliRunner().invoke(command, [*options, "--output", "json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["plan"]["rows"] == [1]
    assert printed["environment"]["cpu"]


@pytest.mark.parametrize(("settings", "words"), [
    ({"formats": ("bf17",)}, "'bf17' is not one of bf16"),
    ({"kernels": ("mkl",)}, "'mkl' is not one of native"),
    ({"kernels": ("native",), "device": "cuda"}, "'native' is not one of triton"),
    ({"hidden": 72}, "leave mxfp4 out of --formats, or give multiples of 32"),
])  # fmt: skip
def test_a_wrong_plan_is_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        KernelPlan(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_none_to_measure():
    with pytest.raises(ConfigError, match="no GPU here"):
        machine_of("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured_beside_its_ceilings():
    plan = KernelPlan(hidden=1024, intermediate=512, distinct=2, rows=(1, 200), device="cuda", repeat=1)
    for f in measure(plan)["figures"]:
        assert min(f["seconds"], f["gb_per_s"], f["read_gb_per_s"], f["peak_gflop_per_s"], f["roofline"]) > 0
        assert 0 < f["error"] < (0.03 if f["format"] == "int8" else 0.01)
