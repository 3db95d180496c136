import gc
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from moeray.model.pages import zeros_on_demand
from moeray.model.safetensors_file import SafetensorsFile

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 7), (0, 4, 8), (4, 0), (1 << 16, 2, 8)])
def test_they_are_zeros_that_can_be_written(shape, dtype):
    zeros = zeros_on_demand(shape, dtype, CPU)
    assert (tuple(zeros.shape), zeros.dtype) == (shape, dtype)
    assert zeros.is_contiguous()
    assert torch.equal(zeros, torch.zeros(shape, dtype=dtype))
    zeros += 1
    assert torch.equal(zeros, torch.ones(shape, dtype=dtype))


def test_memory_is_taken_as_it_is_used_and_given_back():
    process, size = psutil.Process(), 1 << 28
    before = process.memory_info().rss
    zeros = zeros_on_demand((size,), torch.uint8, CPU)
    part = zeros[: size // 4]
    assert process.memory_info().rss - before < size // 16
    part.fill_(1)
    assert process.memory_info().rss - before > size // 8
    del zeros, part
    gc.collect()
    assert process.memory_info().rss - before < size // 16


def flags_of(address):
    """What Linux keeps of the mapping at this address."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            found = begin <= address < end
        elif found and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(hex(address))


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this Linux has no large pages")
def test_weights_ask_for_large_pages(tmp_path):
    save_file({"weight": torch.ones(1 << 20, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    mapped = SafetensorsFile.open(tmp_path / "model.safetensors").tensor("weight")
    for weight in (mapped, zeros_on_demand((1 << 21,), torch.uint8, CPU)):
        assert "hg" in flags_of(weight.data_ptr())
