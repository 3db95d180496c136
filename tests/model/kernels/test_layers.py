"""What computes experts, by config, dtype and device; and that nothing needs triton to be imported."""

import ast
import logging
import sys
from pathlib import Path

import pytest
import torch

import moeray
from moeray.errors import ConfigError
from moeray.model.kernels import available
from moeray.model.kernels.cuda import check_launcher
from moeray.model.kernels.experts import UnsupportedByKernelError
from moeray.model.kernels.layers import choose_kernel

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed


@pytest.mark.parametrize(("asked", "dtype", "device", "chosen"), [
    ("auto", torch.float32, CPU, "torch"),
    ("auto", torch.float32, GPU, "torch"),
    ("torch", torch.bfloat16, GPU, "torch"),
    ("auto", torch.bfloat16, CPU, "native" if available() else "torch"),
])  # fmt: skip
def test_what_computes(asked, dtype, device, chosen):
    assert choose_kernel(asked, dtype, device) == chosen


def test_a_gpu_has_triton():
    pytest.importorskip("triton")
    assert choose_kernel("auto", torch.bfloat16, GPU) == choose_kernel("triton", torch.float32, GPU) == "triton"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_triton_cannot_launch_it_says_what_it_needs():
    pytest.importorskip("triton")
    with pytest.raises(UnsupportedByKernelError, match=r"cannot launch kernels here .*needs a GPU, a C compiler"):
        check_launcher()


@pytest.mark.usefixtures("without_triton")
def test_a_gpu_without_triton_falls_back_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        assert choose_kernel("auto", torch.bfloat16, GPU) == "torch"
    assert [r.message for r in caplog.records] == [
        "the package triton is not installed, so experts run on torch, slower; pip install 'moeray[gpu]'"
    ]


@pytest.mark.usefixtures("without_triton")
@pytest.mark.parametrize(("asked", "device", "words"), [
    ("triton", GPU, r"experts\.kernel: triton needs a GPU \(this is cuda\) and the package triton"),
    ("triton", CPU, r"triton needs a GPU \(this is cpu\)"),
    ("native", GPU, r"native needs a CPU \(this is cuda\)"),
])  # fmt: skip
def test_what_cannot_be_had_is_refused(asked, device, words):
    with pytest.raises(ConfigError, match=words):
        choose_kernel(asked, torch.bfloat16, device)


def test_only_the_kernels_themselves_need_triton():
    def imported(node):
        return [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]

    root = Path(moeray.__file__).parent
    found = {
        path.name
        for path in root.rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom) and any(n.split(".")[0] == "triton" for n in imported(node))
    }
    assert found == {"grouped.py", "flash_decoding.py"}
