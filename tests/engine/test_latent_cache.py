"""DeepSeek-V2 and V3 over a cache of latents: its size, absorbed against expanded, and transformers' tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeray.engine.engine import Engine
from moeray.engine.trunk_runner import TrunkRunner
from moeray.model import kernels
from moeray.model.dispatched import summed
from moeray.model.loading import open_model
from moeray.model.paged import Decodes, PagedCache, Span, Step
from moeray.model.trunk import Trunk
from moeray.settings.engine import EngineConfig
from moeray.types import GenerationRequest
from tests.checkpoints import make_tiny
from tests.families.test_bf16 import InProcess
from tests.families.test_equality import reference
from tests.systems import GREEDY24

CPU = torch.device("cpu")
FAMILIES = ("deepseek_v2", "deepseek_v3")
ATTENTION = ("torch", pytest.param("native", marks=pytest.mark.skipif(not kernels.available(), reason="not compiled")))


def loaded(path, config):
    files = open_model(str(path), None, node="here")
    trunk = Trunk.load(files.checkpoint, files.family, files.weights, torch.float32, CPU, config)
    return trunk, summed(InProcess(files, torch.float32))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_takes_a_latent_and_a_rotated_key_a_layer(family, tmp_path):
    trunk, _ = loaded(make_tiny(family, tmp_path), EngineConfig())
    config = trunk.family.config
    per_layer = config.kv_lora_rank + config.qk_rope_head_dim
    assert trunk.cache.bytes_per_slot(torch.bfloat16) == per_layer * config.num_hidden_layers * 2
    trunk.cache.allocate(10, torch.float32, CPU)
    held = {pool.untyped_storage().data_ptr(): pool.untyped_storage().nbytes()
            for layer in trunk.cache.layers.values() for pool in (layer.k, layer.v)}  # fmt: skip
    assert sum(held.values()) == 10 * per_layer * config.num_hidden_layers * 4


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", FAMILIES)
def test_absorbed_is_expanded(family, attention, tmp_path):
    """The last token's logits as a decode (absorbed) and as part of a prefill (expanded)."""
    trunk, experts = loaded(make_tiny(family, tmp_path), EngineConfig(attention=attention))
    ids, rows = torch.randint(3, 300, (40,), generator=torch.Generator().manual_seed(0)), torch.arange(40)

    def run(cache, start, decodes, prefills):
        step = Step(cache, rows[start:], decodes, prefills)
        return trunk.forward(ids[start:], rows[start:], step, torch.tensor([39 - start]), experts)

    def cache():
        own = PagedCache(trunk.cache.kernel, dict(trunk.cache.kept))
        own.allocate(48, torch.float32, CPU)
        return own

    expanded = run(cache(), 0, None, (Span(0, 40, 40, rows),))
    own = cache()
    trunk.forward(ids[:39], rows[:39], Step(own, rows[:39], None, (Span(0, 39, 39, rows[:39]),)), rows[38:39], experts)
    absorbed = run(own, 39, Decodes(torch.tensor([0]), torch.tensor([40]), torch.arange(3)[None], 16), ())
    assert float((absorbed - expanded).norm() / expanded.norm()) < 1e-5


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_transformers(family, attention, tmp_path):
    """In chunks, with a shared prefix, and in so small a cache that sequences are preempted and computed again."""
    path = make_tiny(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    config = EngineConfig(
        attention=attention, kv_blocks=22, block_size=8, prefill_chunk=16, max_batch_tokens=32, max_running=8
    )
    trunk, experts = loaded(path, config)
    engine = Engine(config, TrunkRunner(trunk, config, experts, ()))
    generator = torch.Generator().manual_seed(1)
    shared = torch.randint(3, 300, (24,), generator=generator).tolist()
    prompts = [shared + torch.randint(3, 300, (n,), generator=generator).tolist() for n in (3, 9, 14, 30, 1)]
    tokens: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        engine.submit(GenerationRequest(f"r{i}", tuple(prompt), GREEDY24))
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    assert engine.stats().preemptions > 0
    assert engine.stats().prefix_hit_tokens > 0
    assert [tokens[f"r{i}"] for i in range(len(prompts))] == [reference(model, prompt) for prompt in prompts]
