"""The sampler against plain definitions."""

from __future__ import annotations

import math

import pytest
import torch

from moeray.engine.sampler import Sampler
from moeray.engine.sequence import Sequence
from moeray.errors import MoerayError
from moeray.types import GenerationRequest, SamplingParams


def draw(logits, count=4000, **sampling):
    """Frequencies of tokens over `count` seeds."""
    seqs = [Sequence(GenerationRequest(str(i), (1, 2), SamplingParams(seed=i, **sampling)), ()) for i in range(count)]
    tokens = Sampler().sample(logits.expand(count, -1).clone(), seqs)
    return torch.bincount(torch.tensor([t.token_id for t in tokens]), minlength=len(logits)) / count


def expected(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    p = torch.softmax(logits.double() / temperature, 0)
    keep = torch.ones_like(p, dtype=torch.bool)
    order = p.argsort(descending=True)
    if top_k:
        keep[order[top_k:]] = False
        p = torch.where(keep, p, 0) / p[keep].sum()
    if top_p < 1:
        before = p[order].cumsum(0) - p[order]
        keep[order[before >= top_p]] = False
        p = torch.where(keep, p, 0) / p[keep].sum()
    if min_p:
        keep &= p >= min_p * p.max()
    return torch.where(keep, p, 0) / p[keep].sum()


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.8, "min_p": 0.1}],
)
def test_draws_follow_the_distribution(options):
    logits = torch.tensor([1.0, 2.0, 0.5, -1.0, 3.0, 2.5, 0.0, 1.5])
    want = expected(logits, **options)
    got = draw(logits, **options)
    assert torch.equal(got > 0, (want > 0) & (got > 0))
    assert not (got[want == 0] > 0).any()
    assert (got - want).abs().max() < 0.035  # 4 standard deviations of 4000 draws


def test_a_draw_depends_on_seed_and_position_alone():
    logits = torch.randn(3, 50)
    seqs = [Sequence(GenerationRequest(str(i), (1,) * 5, SamplingParams(seed=9)), ()) for i in range(3)]
    together = [t.token_id for t in Sampler().sample(logits.clone(), seqs)]
    single = [Sampler().sample(logits[i : i + 1].clone(), [seqs[i]])[0].token_id for i in range(3)]
    assert together == single


def test_greedy_bias_and_penalties():
    def one(**sampling):
        request = GenerationRequest("x", (0, 1), SamplingParams(temperature=0, max_tokens=9, **sampling), (2, 2))
        return Sampler().sample(torch.tensor([[1.0, 1.5, 2.0, 1.8, 1.7]]), [Sequence(request, ())])[0].token_id

    assert one() == 2
    assert one(logit_bias=((4, 1.0),)) == 4
    assert one(presence_penalty=0.5) == 3
    assert one(frequency_penalty=0.15) == 3
    assert one(repetition_penalty=1.5) == 3


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1.0])
@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e-40, 1e-38, 10.0])
def test_no_penalty_makes_a_row_that_nothing_can_be_drawn_from(temperature, penalty):
    sampling = SamplingParams(temperature=temperature, repetition_penalty=penalty, max_tokens=9)
    seqs = [Sequence(GenerationRequest("x", (0, 1), sampling), ()) for _ in range(2)]
    logits = torch.tensor([[3.0, 1.5, -2.0, -math.inf], [-3.0, 0.0, -2.0, -math.inf]])
    assert all(0 <= token.token_id < 3 for token in Sampler().sample(logits, seqs))


@pytest.mark.parametrize(
    ("output", "min_tokens", "options", "expected"),
    [
        (1, 2, {}, 2),  # too short for the model's end, the likeliest, and the request's, the next
        (2, 2, {}, 0),
        (1, 0, {}, 0),
        (1, 2, {"stop_token_ids": ()}, 1),
        (1, 2, {"ignore_eos": True}, 2),
        (1, 2, {"logit_bias": ((0, 50.0),)}, 2),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 0.01])
def test_nothing_ends_a_sequence_before_its_least_number_of_tokens(temperature, output, min_tokens, options, expected):
    logits = torch.tensor([[9.0, 7.0, 5.0, 3.0]] * 2)
    fields = {"max_tokens": 9, "min_tokens": min_tokens, "temperature": temperature, "stop_token_ids": (1,)} | options
    seqs = [
        Sequence(GenerationRequest("x", (0, 0, 0), SamplingParams(**fields), (3,) * output), (0,)),
        Sequence(GenerationRequest("beside it", (0,), SamplingParams(temperature=temperature)), (0,)),
    ]
    assert [token.token_id for token in Sampler().sample(logits, seqs)] == [expected, 0]
    assert logits.tolist() == [[9.0, 7.0, 5.0, 3.0]] * 2


def test_logprobs_are_of_the_raw_distribution():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    sampling = SamplingParams(temperature=0, logprobs=2, logit_bias=((0, 9.0),))
    token = Sampler().sample(logits.clone(), [Sequence(GenerationRequest("x", (0,), sampling), ())])[0]
    raw = torch.log_softmax(logits[0], 0)
    assert token.token_id == 0
    assert token.logprobs.logprob == pytest.approx(float(raw[0]), abs=1e-5)
    assert [t for t, _ in token.logprobs.top] == [1, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_name_the_request(bad):
    seqs = [Sequence(GenerationRequest(name, (0,), SamplingParams(temperature=0)), ()) for name in ("fine", "sick")]
    with pytest.raises(MoerayError, match="of request sick are"):
        Sampler().sample(torch.tensor([[0.0, 1.0], [bad, 0.0]]), seqs)
