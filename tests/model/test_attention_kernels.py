"""What decoding sequences attend with, by what is asked for and what is there."""

import pytest
import torch

from moeray.errors import ConfigError
from moeray.model import kernels
from moeray.model.attention_kernels import choose_attention
from moeray.model.kernels import cuda

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.skipif(not kernels.available(), reason="the kernels were not compiled")
@pytest.mark.parametrize(("asked", "dtype", "chosen"), [
    ("auto", torch.bfloat16, "native"), ("auto", torch.float32, "native"), ("auto", torch.float16, "torch"),
    ("native", torch.float32, "native"), ("torch", torch.float32, "torch"),
])  # fmt: skip
def test_on_a_cpu(asked, dtype, chosen):
    assert choose_attention(asked, dtype, CPU) == chosen


@pytest.mark.parametrize(("asked", "device", "words"), [
    ("native", CPU, "native computes fp32 and bf16 on the CPU where it was compiled, but this is torch.float16 on cpu"),
    ("native", GPU, "but this is torch.float16 on cuda; set it to auto"),
    pytest.param("triton", CPU, r"triton needs a GPU \(this is cpu\) and the package triton", marks=pytest.mark.skipif(
        cuda.available(CPU), reason="triton's interpreter is on")),
])  # fmt: skip
def test_one_that_cannot_be_had_is_named(asked, device, words):
    with pytest.raises(ConfigError, match=f"config key engine.attention: .*{words}"):
        choose_attention(asked, torch.float16, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_what_a_gpu_needs_it_is_torch_with_a_warning(caplog):
    assert choose_attention("auto", torch.bfloat16, GPU) == "torch"
    assert "attention runs on torch, slower: the kernel" in caplog.text
