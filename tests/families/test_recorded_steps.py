"""Decode steps that are recorded and repeated give the bits of steps that are computed anew, in every family."""

from __future__ import annotations

import random

import pytest
import torch

from moeray.model import kernels
from moeray.model.dispatched import dispatching
from tests.checkpoints import FAMILIES, FURTHER_FAMILIES, make_tiny
from tests.families.decode_steps import decode_step, experts, load

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the kernels were not compiled")


def modules_called(trunk):
    calls = []
    trunk.model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family", [*FAMILIES, *FURTHER_FAMILIES])
def test_the_bits_of_steps_computed_anew(family, dtype, tmp_path):
    trunk = load(make_tiny(family, tmp_path / family, dtype=dtype), dtype)
    rng, calls = random.Random(family), modules_called(trunk)
    counts = [3, 3, 3, 1, 1, 5, 5, 1, 3, 5, 2, 3]
    computed = 0
    for count in counts:
        given = decode_step(trunk, count, rng)
        ours = trunk.forward(*given, experts)
        computed += len(calls)
        with torch.inference_mode(), dispatching(experts):
            assert torch.equal(ours, trunk.compute(*given)), f"{family}: {count} sequences"
        calls.clear()
    assert computed == 7  # twice for each of three numbers that came twice in succession, once for the other


def test_recordings_that_were_not_used_for_long_make_room(tmp_path):
    trunk = load(make_tiny("granitemoe", tmp_path / "m"))
    rng, calls = random.Random(0), modules_called(trunk)
    for count in [n for n in range(1, 41) for _ in range(2)]:
        trunk.forward(*decode_step(trunk, count, rng), experts)
    calls.clear()
    for count in (40, 20, 1):
        given = decode_step(trunk, count, rng)
        ours = trunk.forward(*given, experts)
        with torch.inference_mode(), dispatching(experts):
            assert torch.equal(ours, trunk.compute(*given))
    assert len(calls) == 3 + 1  # one was forgotten


def test_eager_computes_each_step_anew(tmp_path):
    trunk = load(make_tiny("granitemoe", tmp_path / "m"), eager=True)
    rng, calls = random.Random(0), modules_called(trunk)
    for _ in range(4):
        trunk.forward(*decode_step(trunk, 2, rng), experts)
    assert len(calls) == 4


ROPE = {"rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}


def test_positions_whose_form_the_longest_sequence_decides(tmp_path):
    rope = ROPE | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    trunk = load(make_tiny("mixtral", tmp_path / "m", rope_parameters=rope, head_dim=8))
    rng, lengths = random.Random(0), []
    for _ in range(12):
        given = decode_step(trunk, 2, rng)
        lengths.append(int(given[1].max()) + 1)
        ours = trunk.forward(*given, experts)
        with torch.inference_mode(), dispatching(experts):
            assert torch.equal(ours, trunk.compute(*given)), f"of {lengths[-1]} tokens"
    assert min(lengths[2:]) < 64 < max(lengths[2:])


def test_what_python_decides_by_value_is_computed_anew(tmp_path, caplog):
    trunk = load(make_tiny("mixtral", tmp_path / "m", rope_parameters=ROPE | {"rope_type": "dynamic"}, head_dim=8))
    calls, rng = modules_called(trunk), random.Random(0)
    for _ in range(4):
        trunk.forward(*decode_step(trunk, 2, rng), experts)
    assert len(calls) == 4
    assert "computed anew each time" in caplog.text
