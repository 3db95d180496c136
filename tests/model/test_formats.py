"""FP8 and MXFP4 decoding against decoders that look up every element on its own."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moeray.errors import CheckpointError
from moeray.model.formats import Fp8Block, Mxfp4, Plain, dequantize_fp8_block, dequantize_mxfp4
from tests.quantize import decode_fp8_block, decode_mxfp4, quantize_fp8_block, quantize_mxfp4


@pytest.mark.parametrize("shape", [(576, 320), (192, 192), (128, 128), (1, 130), (3, 192, 72), (2, 256, 128)])
@pytest.mark.parametrize("block", [(128, 128), (64, 32)])
def test_fp8_blocks_decode_with_ragged_last_blocks(shape: tuple[int, ...], block: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    quantized, scales = quantize_fp8_block(weight, block)
    stored = Fp8Block(quantized, scales, block)
    assert stored.shape == shape
    assert stored.nbytes == quantized.numel() + 4 * scales.numel()
    assert torch.equal(stored.dense(torch.float32), decode_fp8_block(quantized, scales, block))
    assert torch.equal(stored.dense(torch.bfloat16), decode_fp8_block(quantized, scales, block).bfloat16())
    assert (stored.dense(torch.float32) - weight).abs().max() < 0.08 * weight.abs().max()


def test_fp8_scales_may_be_exponents() -> None:
    quantized, _ = quantize_fp8_block(torch.randn(192, 130), (128, 128))
    exponents = torch.tensor([[125, 130], [127, 120]], dtype=torch.uint8)
    expected = decode_fp8_block(quantized, (exponents.float() - 127).exp2(), (128, 128))
    assert torch.equal(dequantize_fp8_block(quantized, exponents, (128, 128), torch.float32), expected)
    as_e8m0 = exponents.view(torch.float8_e8m0fnu)
    assert torch.equal(dequantize_fp8_block(quantized, as_e8m0, (128, 128), torch.float32), expected)


def test_fp8_refuses_a_grid_that_does_not_fit() -> None:
    quantized, scales = quantize_fp8_block(torch.randn(192, 128), (128, 128))
    with pytest.raises(CheckpointError, match=r"needs scales \[2, 1\], got \[1, 1\]"):
        dequantize_fp8_block(quantized, scales[:1], (128, 128), torch.float32)


@pytest.mark.parametrize("shape", [(2, 64, 192), (1, 32, 576), (3, 96, 1500)])
def test_mxfp4_decodes_as_transformers_does(shape: tuple[int, int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    blocks, scales = quantize_mxfp4(weight)
    stored = Mxfp4(blocks, scales)
    assert stored.shape == shape
    assert stored.nbytes == weight.numel() // 2 + weight.numel() // 32
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(stored.dense(dtype), convert_moe_packed_tensors(blocks, scales, dtype=dtype))
    assert torch.equal(stored.dense(torch.float32), decode_mxfp4(blocks, scales))
    one = Mxfp4(blocks[0], scales[0])
    assert one.shape == shape[1:]
    assert torch.equal(one.dense(torch.float32), stored.dense(torch.float32)[0])


def test_mxfp4_decodes_every_code_and_scale() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    for exponent in (0, 1, 126, 127, 128, 200, 254):
        scales = torch.full((1, 1, 16), exponent, dtype=torch.uint8)
        assert torch.equal(dequantize_mxfp4(blocks, scales, torch.float32), decode_mxfp4(blocks, scales))


def test_mxfp4_refuses_scales_of_another_tensor() -> None:
    blocks, scales = quantize_mxfp4(torch.randn(2, 64, 8))
    with pytest.raises(CheckpointError, match="do not fit scales"):
        dequantize_mxfp4(blocks, scales[:, :, :1], torch.float32)


def test_plain_weights_are_not_copied() -> None:
    tensor = torch.randn(4, 4)
    assert Plain(tensor).dense(torch.float32) is tensor
    assert Plain(tensor).dense(torch.bfloat16).dtype is torch.bfloat16
