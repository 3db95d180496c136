"""Quantised twins of tiny checkpoints, written by hand, and the dense checkpoint that each one decodes to.

The decoders here are written separately from moeray's, element by element, to be its reference.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FP8_TRUNK = re.compile(r"(self_attn|mlp)\..*proj[^.]*\.weight$")


def quantize_fp8_block(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """[..., R, C] -> float8_e4m3fn of that shape and fp32 scales [..., ceil(R / b0), ceil(C / b1)]."""
    *lead, rows, columns = weight.shape
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    flat = weight.reshape(-1, rows, columns).float()
    quantized = torch.empty(flat.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(flat.shape[0], *grid)
    for e in range(flat.shape[0]):
        for i in range(grid[0]):
            for j in range(grid[1]):
                at = (e, slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
                scales[e, i, j] = flat[at].abs().max().clamp_min(1e-12) / 448.0
                quantized[at] = (flat[at] / scales[e, i, j]).to(torch.float8_e4m3fn)
    return quantized.reshape(weight.shape), scales.reshape(*lead, *grid)


def decode_fp8_block(quantized: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The fp32 weight, by looking up each element's own scale."""
    rows, columns = quantized.shape[-2:]
    of_row = torch.arange(rows) // block[0]
    of_column = torch.arange(columns) // block[1]
    return quantized.float() * scales[..., of_row, :][..., of_column]


def quantize_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[E, K, N] (transposed, K a multiple of 32) -> blocks uint8 [E, N, K / 32, 16], scales uint8 [E, N, K / 32]."""
    experts, inner, outer = weight.shape
    groups = weight.transpose(1, 2).reshape(experts, outer, inner // 32, 32).float()
    exponent = (groups.abs().amax(-1).clamp_min(1e-30).log2() - 2).ceil().clamp(-127, 127)
    scaled = groups / exponent.exp2().unsqueeze(-1)
    nearest = (scaled.abs().unsqueeze(-1) - _FP4).abs().argmin(-1)
    codes = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (exponent + 127).to(torch.uint8)


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """The fp32 weight [E, K, N]."""
    codes = torch.stack([blocks & 0xF, blocks >> 4], dim=-1).flatten(-2).int()
    values = _FP4[codes & 7] * torch.where(codes >= 8, -1.0, 1.0)
    return (values * (scales.float() - 127).exp2().unsqueeze(-1)).flatten(-2).transpose(1, 2)


def make_fp8(source: Path, out: Path, *, block: tuple[int, int] = (128, 128), fused: bool = False) -> tuple[Path, Path]:
    """The FP8 twin of an unsharded checkpoint, and the dense one it decodes to. `fused` stacks the experts' tensors."""
    quantized: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    tensors = load_file(source / "model.safetensors")
    for name, weight in (_fuse(tensors) if fused else tensors).items():
        if _FP8_TRUNK.search(name) or name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            quantized[name], quantized[f"{name}_scale_inv"] = quantize_fp8_block(weight, block)
            dense[name] = decode_fp8_block(quantized[name], quantized[f"{name}_scale_inv"], block)
        else:
            quantized[name] = dense[name] = weight
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    return _write(source, out / "fp8", quantized, settings), _write(source, out / "dense", dense, None)


def make_mxfp4(source: Path, out: Path) -> tuple[Path, Path]:
    """The MXFP4 twin of an unsharded gpt-oss checkpoint, and the dense one it decodes to."""
    quantized: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            quantized[f"{name}_blocks"], quantized[f"{name}_scales"] = quantize_mxfp4(weight)
            dense[name] = decode_mxfp4(quantized[f"{name}_blocks"], quantized[f"{name}_scales"]).contiguous()
        else:
            quantized[name] = dense[name] = weight
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return _write(source, out / "mxfp4", quantized, settings), _write(source, out / "dense", dense, None)


def _fuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per-expert tensors stacked as transformers' parameters hold them; the rest as it is."""
    found = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")
    rest = {name: value for name, value in tensors.items() if not found.match(name)}
    for prefix in sorted({match[1] for name in tensors if (match := found.match(name))}):
        count = sum(1 for name in tensors if name.startswith(prefix) and name.endswith("down_proj.weight"))

        def stacked(part: str, prefix: str = prefix, count: int = count) -> Tensor:
            return torch.stack([tensors[f"{prefix}.{e}.{part}_proj.weight"] for e in range(count)])

        rest[f"{prefix}.gate_up_proj"] = torch.cat([stacked("gate"), stacked("up")], dim=1)
        rest[f"{prefix}.down_proj"] = stacked("down")
    return rest


def _write(source: Path, out: Path, tensors: dict[str, Tensor], settings: dict[str, Any] | None) -> Path:
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    if settings is not None:
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return out
