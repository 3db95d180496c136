"""Drawing over a real vocabulary: filters against their plain definitions, draws that no neighbour changes."""

import math
import random

import pytest
import torch

from moeray.engine.sampler import Sampler
from moeray.engine.sampling import draw, keyed_uniform, likeliest
from moeray.engine.sequence import Sequence
from moeray.types import GenerationRequest, SamplingParams

VOCAB = 5000


def kept(logits_V, params):
    """The tokens that temperature, top-k, top-p and min-p leave, written as one reads them."""
    p = torch.softmax(logits_V.double() / params.temperature, 0).tolist()
    order = sorted(range(len(p)), key=lambda token: -p[token])
    if params.top_k:
        order = order[: params.top_k]
    total, before, nucleus = math.fsum(p[token] for token in order), 0.0, []
    for token in order:
        if before / total >= params.top_p:
            break
        nucleus.append(token)
        before += p[token]
    return {token for token in nucleus if p[token] >= params.min_p * p[order[0]]}


@pytest.mark.parametrize("vocab", [1, 7, 255, 256, 257, 511, 512, 49155])
def test_the_likeliest_token_is_the_first_of_the_highest(vocab):
    generator = torch.Generator().manual_seed(vocab)
    few = torch.randint(-3, 3, (40, vocab), generator=generator).float()  # ties everywhere
    places = torch.randint(vocab, (40, 1), generator=generator)
    single = torch.full((40, vocab), -math.inf).scatter_(1, places, 1.0)
    last = torch.zeros(1, vocab).index_fill_(1, torch.tensor([vocab - 1]), 1.0)
    for logits_RV in (few, single, last):
        assert likeliest(logits_RV) == [row.index(max(row)) for row in logits_RV.tolist()]


@pytest.mark.parametrize("spread", [0.3, 2.0, 8.0])  # a nucleus of thousands of tokens, of hundreds, of a few
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=1),
        SamplingParams(top_k=40),
        SamplingParams(top_p=0.9),
        SamplingParams(top_p=0.05, temperature=0.5),
        SamplingParams(top_k=100, top_p=0.6, temperature=1.7),
        SamplingParams(min_p=0.1),
        SamplingParams(top_k=4999, top_p=0.95, min_p=0.01),
        SamplingParams(top_k=VOCAB + 1, top_p=0.5),
    ],
    ids=lambda p: f"k{p.top_k}-p{p.top_p}-min{p.min_p}-t{p.temperature}",
)
def test_filters_keep_what_their_definitions_say(params, spread):
    logits_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * spread
    want = kept(logits_V, params)
    # A grid of uniform numbers as fine as the tokens are likely reaches the ends of what is kept.
    grid = [i / 200 for i in range(200)] + [1.0 - 2.0**-52]
    got = draw(logits_V.expand(len(grid), -1), [params] * len(grid), grid)
    assert set(got) <= want
    p = torch.softmax(logits_V.double() / params.temperature, 0)
    mask = torch.zeros(VOCAB, dtype=torch.bool)
    mask[list(want)] = True
    cdf = torch.where(mask, p, 0).cumsum(0)
    for uniform, token in zip(grid, got, strict=True):
        low = (cdf[token] - p[token]) / cdf[-1]
        assert low - 1e-5 <= uniform <= cdf[token] / cdf[-1] + 1e-5


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 1000, 50257])
@pytest.mark.parametrize("possible", [1.0, 0.01])
def test_a_number_picks_the_token_at_which_the_sum_exceeds_it(vocab, possible):
    generator = torch.Generator().manual_seed(vocab)
    logits_V = torch.randn(vocab, generator=generator) * 3
    logits_V[torch.rand(vocab, generator=generator) >= possible] = -math.inf
    logits_V[vocab // 2] = 0.0
    uniform = [0.0, *torch.rand(30, generator=generator).tolist(), 1 - 2.0**-52]
    drawn = draw(logits_V.expand(len(uniform), -1), [SamplingParams()] * len(uniform), uniform)
    p_V = torch.softmax(logits_V.double(), 0)
    until_V = p_V.cumsum(0)
    for u, token in zip(uniform, drawn, strict=True):
        assert p_V[token] > 0
        assert until_V[token] - p_V[token] - 1e-6 <= u <= until_V[token] + 1e-6


def test_draws_follow_softmax():
    """Chi-square over 20,000 keyed draws, with room: 40 degrees of freedom exceed 90 once in 10 million."""
    logits_V = torch.randn(41, generator=torch.Generator().manual_seed(2))
    count = 20_000
    uniform = [keyed_uniform(seed=11, position=i) for i in range(count)]
    got = draw(logits_V.expand(count, -1), [SamplingParams()] * count, uniform)
    want = torch.softmax(logits_V.double(), 0) * count
    chi = ((torch.bincount(torch.tensor(got), minlength=41) - want) ** 2 / want).sum()
    assert 10 < chi < 90


@pytest.mark.parametrize("key", [lambda i: (i, 0), lambda i: (0, i), lambda i: (i, i), lambda i: (-i, 7)])
def test_keyed_uniforms_are_uniform(key):
    values = sorted(keyed_uniform(*key(i)) for i in range(4000))
    assert values[0] >= 0.0
    assert values[-1] < 1.0
    assert len(set(values)) == 4000
    assert max(abs(value - i / 4000) for i, value in enumerate(values)) < 0.035  # Kolmogorov-Smirnov, 1 in 10,000


def _any_sequence(rng, number):
    sampling = SamplingParams(
        temperature=rng.choice([0.0, 1e-9, 0.7, 1.3]), top_p=rng.choice([1.0, 0.9, 0.3]), top_k=rng.choice([0, 3, 50]),
        min_p=rng.choice([0.0, 0.1]), seed=rng.randrange(1 << 60), logprobs=rng.choice([None, 0, 3]),
        presence_penalty=rng.choice([0.0, 1.0]), repetition_penalty=rng.choice([1.0, 1.3]),
        logit_bias=rng.choice([(), ((3, 2), (7, -100))]),
    )  # fmt: skip
    prompt, output = (tuple(rng.randrange(VOCAB) for _ in range(n)) for n in (5, 9))
    return Sequence(GenerationRequest(str(number), prompt, sampling, output))


def test_no_neighbour_changes_a_row():
    rng = random.Random(4)
    seqs = [_any_sequence(rng, i) for i in range(40)]
    logits_BV = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(3)) * 3
    before = logits_BV.clone()
    together = Sampler().sample(logits_BV, seqs)
    assert torch.equal(logits_BV, before)  # the caller's logits stay as they were
    order = rng.sample(range(40), 40)
    shuffled = Sampler().sample(logits_BV[order], [seqs[i] for i in order])
    for row, i in enumerate(order):
        lone = Sampler().sample(logits_BV[i : i + 1], [seqs[i]])[0]
        assert together[i].token_id == shuffled[row].token_id == lone.token_id
        assert (lone.logprobs is None) == (seqs[i].sampling.logprobs is None)
        if lone.logprobs is not None:
            assert len(lone.logprobs.top) == seqs[i].sampling.logprobs


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-4, 1.0])
def test_impossible_tokens_are_never_drawn(temperature):
    logits = torch.full((1, 6), -torch.inf)
    logits[0, 4] = -3.0e4
    params = SamplingParams(temperature=temperature, logprobs=5)
    drawn = Sampler().sample(logits, [Sequence(GenerationRequest("a", (1,), params))])[0]
    assert drawn.token_id == 4
    assert drawn.logprobs is not None
    assert drawn.logprobs.top == ((4, 0.0),)


def test_low_precision_logits_are_drawn_in_fp32():
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(5))
    seq = Sequence(GenerationRequest("a", (1,), SamplingParams(seed=3, logprobs=1)))
    for dtype in (torch.bfloat16, torch.float16):
        low = logits.to(dtype)
        assert Sampler().sample(low, [seq]) == Sampler().sample(low.float(), [seq])
