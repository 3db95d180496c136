"""Keys and values on their way to the cache, as `index_copy_` writes them."""

import pytest
import torch

from moeray.model.kernels import keep

HEADS, SIZE, SLOTS = 4, 24, 4096


def randn(*sizes, dtype):
    return torch.randn(sizes).to(dtype)


LAYOUTS = {
    "contiguous": lambda tokens, dtype: randn(tokens, HEADS, SIZE, dtype=dtype),
    "of a fused projection": lambda tokens, dtype: randn(tokens, 3 * HEADS, SIZE, dtype=dtype)[:, HEADS : 2 * HEADS],
    "heads before tokens": lambda tokens, dtype: randn(HEADS, tokens, SIZE, dtype=dtype).transpose(0, 1),
    "part of each head": lambda tokens, dtype: randn(tokens, HEADS, 2 * SIZE, dtype=dtype)[..., :SIZE],
    "numbers apart": lambda tokens, dtype: randn(tokens, HEADS, 2 * SIZE, dtype=dtype)[..., ::2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 33, 3000])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_each_token_is_in_its_slot_and_no_other_is_touched(layout, tokens, dtype):
    torch.manual_seed(tokens)
    x_THD, slots_T = layout(tokens, dtype), torch.randperm(SLOTS)[:tokens]
    cache, expected = (torch.full((SLOTS, HEADS, SIZE), -1.0, dtype=dtype) for _ in range(2))
    keep(x_THD, slots_T, cache)
    assert torch.equal(cache, expected.index_copy_(0, slots_T, x_THD))
