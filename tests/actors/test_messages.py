import msgpack
import pytest

from moeray.actors.messages import error_from, error_tree, output_from, output_tree, request_from, request_tree
from moeray.errors import MoerayError, QueueFullError, RequestError, RouterLostError, WireError
from moeray.types import FinishReason, GenerationRequest, SamplingParams, TokenLogprobs, TokenOutput


def test_a_request_round_trip():
    sampling = SamplingParams(temperature=0.5, logit_bias=((3, -1.0),), stop_token_ids=(7,), logprobs=2, seed=1 << 62)
    request = GenerationRequest("r", (1, 2), sampling, (3,), attempt=2)
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
    failed = TokenOutput("r", 0, (), finish_reason=FinishReason.ERROR, error="why")
    assert output_from(output_tree(failed)) == failed


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
