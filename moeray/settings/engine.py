"""How a router batches, keeps the KV cache and computes the trunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moeray.tree import require

AttentionKernel = Literal["auto", "native", "triton", "torch"]
LinearKernel = Literal["auto", "native", "onednn", "torch"]
Overlap = Literal["auto", "on", "off"]

LEAST_CHUNK = 16
"""Prefill tokens of a step, however long it lasts, so that every prompt gets on."""


@dataclass(frozen=True)
class EngineConfig:
    """Batching and the KV cache.

    `max_batch_tokens` is the token budget of a step (prefill chunks + one token per running sequence).
    `prefill_chunk` bounds the prefill tokens of one step while sequences are decoding; `control.slo_pace` makes them
    fewer.
    `kv_blocks` 0 means as many as `kv_cache_fraction` of the free memory at start holds, at most `kv_cache_bytes`; on a
    CPU, memory is taken as blocks are first used.

    `attention`: what computes the attention of decoding sequences: `native`, moeray's kernel in C (fp32 and bf16 on the
    CPU), `triton`, the one for GPUs, `torch`, or `auto`, the device's kernel where it can be had. `linear`: what
    computes the trunk's linear layers: `native`, `onednn` (packed weights, bf16 on the CPU), `torch`, or `auto`, which
    goes by dtype, device and CPU.
    `eager`: each step is computed anew by the modules; else, where a kernel attends, steps that do nothing but decode
    are recorded (on a GPU as CUDA graphs) and repeated, with the same results.
    `overlap`: whether a step's batch is computed as two halves, the trunk of one beside the experts of the other: `on`,
    `off`, or `auto`, where that measures faster (tried only where an expert actor is on another node than the router,
    or the router on a GPU: else both would compute on the same cores).
    """

    max_context: int = 0
    max_running: int = 64
    max_waiting: int = 1024
    max_batch_tokens: int = 2048
    prefill_chunk: int = 256
    block_size: int = 16
    kv_blocks: int = 0
    kv_cache_fraction: float = 0.2
    kv_cache_bytes: int = 4 << 30
    prefix_cache: bool = True
    attention: AttentionKernel = "auto"
    linear: LinearKernel = "auto"
    eager: bool = False
    overlap: Overlap = "auto"

    def __post_init__(self) -> None:
        for key in ("max_running", "max_waiting", "max_batch_tokens", "prefill_chunk", "block_size"):
            require(getattr(self, key) >= 1, f"engine.{key}", f"must be at least 1, got {getattr(self, key)}")
        require(self.max_context >= 0, "engine.max_context", "must be 0 (the model's own) or more")
        require(self.kv_blocks >= 0, "engine.kv_blocks", "must be 0 (chosen from free memory) or more")
        require(0 < self.kv_cache_fraction <= 0.9, "engine.kv_cache_fraction", "must be above 0 and at most 0.9")
        require(self.kv_cache_bytes >= 1, "engine.kv_cache_bytes", "must be above 0")
        require(
            self.max_running <= self.max_batch_tokens,
            "engine.max_running",
            f"must be at most engine.max_batch_tokens ({self.max_batch_tokens}), since each running sequence "
            "decodes a token a step",
        )
