"""Penalties that are kept as a sequence grows, against their definitions over the whole of it."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeray.engine.penalties import Penalties
from moeray.engine.sequence import Sequence
from moeray.types import GenerationRequest, SamplingParams

VOCAB = 40


def defined(logits_V, params, tokens, num_prompt):
    """Bias and penalties as one reads them, from all tokens at once."""
    logits_V = logits_V.clone()
    if params.logit_bias:
        ids, bias = zip(*params.logit_bias, strict=True)
        logits_V.index_add_(0, torch.tensor(ids), torch.tensor(bias, dtype=torch.float32))
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(tokens)))
        old, by = logits_V[seen], params.repetition_penalty
        logits_V[seen] = torch.where(old > 0, old / by, old * by).clamp(max=torch.finfo(torch.float32).max)
    for token, count in Counter(tokens[num_prompt:]).items():
        logits_V[token] -= torch.tensor(params.presence_penalty + params.frequency_penalty * count)
    return logits_V


def _params(rng):
    return SamplingParams(
        max_tokens=1000,
        repetition_penalty=rng.choice([1.0, 1.0, 1e-40, 0.7, rng.uniform(0.01, 10.0)]),
        presence_penalty=rng.choice([0.0, rng.uniform(-2, 2)]),
        frequency_penalty=rng.choice([0.0, rng.uniform(-2, 2)]),
        logit_bias=rng.choice([(), ((3, 0.1), (7, -100), (3, 1.7))]),
    )


def _tokens(rng, least, most):
    return tuple(rng.randrange(rng.choice([3, VOCAB])) for _ in range(rng.randint(least, most)))


def _logits(rng):
    generator = torch.Generator().manual_seed(rng.randrange(1 << 40))
    logits_V = torch.randn(VOCAB, generator=generator) * rng.choice([1.0, 30.0])
    logits_V[rng.randrange(VOCAB)] = rng.choice([-torch.inf, 0.0, -0.0])
    return logits_V


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 32))
def test_bit_for_bit_what_the_whole_sequence_gives(seed):
    """Over prompts, resumes behind any number of tokens, several tokens between two draws, and draws that failed."""
    rng = random.Random(seed)
    request = GenerationRequest("a", _tokens(rng, 1, 12), _params(rng), _tokens(rng, 0, 12))
    seq = Sequence(request)
    for _ in range(rng.randint(1, 12)):
        logits_V = _logits(rng)
        want = defined(logits_V, request.sampling, seq.tokens, seq.num_prompt)
        resumed = Sequence(GenerationRequest("a", request.prompt_ids, request.sampling, tuple(seq.output_ids), 1))
        for row in (seq, resumed):
            got = logits_V.clone()
            if row.penalties is not None:
                row.penalties.apply(got, row.tokens)
            assert torch.equal(got.view(torch.int32), want.view(torch.int32))
        for token in _tokens(rng, 0, rng.choice([1, 3])):
            seq.append(token)


@pytest.mark.parametrize(
    ("asked", "some"),
    [
        ({}, False),
        ({"temperature": 0.5, "top_p": 0.9, "min_p": 0.1}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": -0.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"logit_bias": ((3, 1.0),)}, True),
    ],
)
def test_nothing_is_kept_where_nothing_is_asked_for(asked, some):
    assert (Penalties.of(SamplingParams(**asked), 1) is not None) is some


class Read(list):
    """Tokens that note how many of them are looked at."""

    count = 0

    def __getitem__(self, places):
        self.count += len(range(len(self))[places])
        return super().__getitem__(places)

    def __iter__(self):
        raise AssertionError("all tokens are looked at")


def test_a_step_looks_at_what_is_new():
    tokens = Read(range(VOCAB))
    penalties = Penalties(SamplingParams(repetition_penalty=1.2, frequency_penalty=0.3), num_prompt=30)
    penalties.apply(torch.zeros(VOCAB), tokens)
    assert tokens.count == 40 + 10
    tokens.append(3)
    penalties.apply(torch.zeros(VOCAB), tokens)
    assert tokens.count == 50 + 1 + 1
