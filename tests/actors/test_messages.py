from dataclasses import replace

import msgpack
import pytest

from moeray.actors.messages import (
    PROMPT_PART,
    error_from,
    error_tree,
    output_from,
    output_tree,
    request_from,
    request_tree,
    split,
)
from moeray.errors import MoerayError, QueueFullError, RequestError, RouterLostError, WireError
from moeray.types import FinishReason, GenerationRequest, SamplingParams, TokenLogprobs, TokenOutput
from moeray.wire.frame import Frame, Limits, Op, encode


def test_a_request_round_trip():
    sampling = SamplingParams(temperature=0.5, logit_bias=((3, -1.0),), stop_token_ids=(7,), logprobs=2, seed=1 << 62)
    request = GenerationRequest("r", (1, 2), sampling, (3,), attempt=2, prompt_scored=1)
    assert request_from(request_tree(request)) == request


def test_a_long_prompt_takes_four_bytes_a_token():
    request = GenerationRequest("r", tuple(range(70_000, 80_000)), output_ids=tuple(range(2**31 - 100, 2**31)))
    tree = request_tree(request)
    assert request_from(msgpack.unpackb(msgpack.packb(tree))) == request
    assert len(msgpack.packb(tree)) < 4 * 10_100 + 500


def test_a_token_id_of_no_vocabulary_is_named():
    with pytest.raises(RequestError, match="token id 2147483648"):
        request_tree(GenerationRequest("r", (1, 2**31)))


def test_an_output_round_trip():
    output = TokenOutput("r", 1, (5,), (TokenLogprobs(-0.5, ((5, -0.5), (6, -1.0))),), FinishReason.STOP, 16)
    assert output_from(output_tree(output)) == output
    scored = replace(output, prompt_logprobs=(TokenLogprobs(-0.25, ((9, -0.1),)), TokenLogprobs(-3.0)))
    assert output_from(output_tree(scored)) == scored
    failed = TokenOutput("r", 0, (), finish_reason=FinishReason.ERROR, error="why")
    assert output_from(output_tree(failed)) == failed


@pytest.mark.parametrize("count", [0, 1, PROMPT_PART, PROMPT_PART + 1, 3 * PROMPT_PART])
@pytest.mark.parametrize("token_ids", [(), (5,)])
def test_an_output_in_parts_says_the_same_in_order(count, token_ids):
    scores = tuple(TokenLogprobs(-float(i)) for i in range(count))
    output = TokenOutput("r", 1, token_ids, (), FinishReason.LENGTH, 16, prompt_logprobs=scores)
    *first, last = split(output)
    assert tuple(entry for part in (*first, last) for entry in part.prompt_logprobs) == scores
    assert all(len(part.prompt_logprobs) <= PROMPT_PART for part in (*first, last))
    assert replace(last, prompt_logprobs=scores) == output
    assert not any(part.token_ids or part.finish_reason for part in first)


def test_a_part_fits_the_smallest_header():
    top = tuple((2**31 - 1 - i, -1.0 / (3 + i)) for i in range(20))
    part = TokenOutput("r" * 60, 1, (), prompt_logprobs=(TokenLogprobs(-0.1, top),) * PROMPT_PART)
    assert encode(Frame(Op.STEP, meta={"outputs": [output_tree(part)]}), Limits(1 << 16, 1 << 16))


@pytest.mark.parametrize(
    "error",
    [
        QueueFullError("full", retry_after_s=2.0),
        RequestError("no", param="seed", code="x"),
        RouterLostError("draining"),
        MoerayError("bad"),
    ],
)
def test_an_error_round_trip(error):
    back = error_from(error_tree("r", 0, error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"prompt_ids": ["x"]}, WireError),
        ({"prompt_ids": b"abc"}, WireError),
        ({"output_ids": None}, WireError),
        ({"sampling": {}}, WireError),
        ({"attempt": None}, WireError),
        ({"sampling": {**request_tree(GenerationRequest("r", (1,)))["sampling"], "top_p": 7.0}}, RequestError),
        ({"sampling": {**request_tree(GenerationRequest("r", (1,)))["sampling"], "unknown": 7.0}}, WireError),
    ],
)
def test_what_is_no_request_is_named(change, kind):
    with pytest.raises(kind):
        request_from(request_tree(GenerationRequest("r", (1,))) | change)
