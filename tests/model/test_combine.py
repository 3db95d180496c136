import pytest
import torch

from moeray.model.kernels import available, combine


def in_order(rows_TKD, weights_TK):
    """The definition: fp32, k = 0 first."""
    out_TD = torch.zeros(rows_TKD.shape[0], rows_TKD.shape[2])
    for k in range(rows_TKD.shape[1]):
        out_TD = out_TD + rows_TKD[:, k].float() * weights_TK[:, k, None].float()
    return out_TD.to(rows_TKD.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "top_k", "size"), [(1, 1, 1), (1, 8, 1024), (7, 2, 513), (40, 8, 1100), (300, 3, 33)]
)
def test_every_bit_is_that_of_the_sum_in_order(dtype, tokens, top_k, size):
    generator = torch.Generator().manual_seed(tokens)
    rows = torch.randn(tokens, top_k, size, generator=generator).to(dtype)
    weights = torch.rand(tokens, top_k, generator=generator).to(dtype)
    assert torch.equal(combine(rows, weights), in_order(rows, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_stays_visible(dtype):
    rows = torch.ones(1, 2, 40, dtype=dtype)
    rows[0, 1, 3], rows[0, 0, 5] = float("nan"), float("inf")
    out = combine(rows, torch.ones(1, 2))
    assert out[0, 3].isnan()
    assert out[0, 5].isinf()
    assert out.isfinite().sum() == 38


def test_rows_that_are_not_contiguous_and_no_rows():
    rows = torch.randn(6, 3, 50)[::2, :, ::2]
    weights = torch.rand(3, 6)[:, ::2]
    assert torch.equal(combine(rows, weights), in_order(rows, weights))
    assert combine(torch.empty(0, 3, 8), torch.empty(0, 3)).shape == (0, 8)


def test_the_kernels_were_compiled_here():
    """A checkout that is tested without them would test only half of what is served."""
    assert available()
