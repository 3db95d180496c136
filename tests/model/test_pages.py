import gc

import psutil
import pytest
import torch

from moeray.model.pages import zeros_on_demand

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
