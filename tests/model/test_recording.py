"""What is recorded gives, when it is repeated, the bits of the function over its new inputs."""

import pytest
import torch
from torch.nn import functional as F

from moeray.model.recording import Memory, UnrepeatableError, perform, record, unrecorded

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
IDS = torch.tensor([3, 1, 4, 1, 5, 2])


def views_and_joins(x):
    first, second = x.split([3, 5], -1)
    return torch.cat([second, first], -1).view(2, 3, 8).transpose(0, 1).reshape(6, 8) * 2


def attention(x):
    return F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])[0, 0]


def grouped_gate(x):
    scores = torch.softmax(x, dim=-1, dtype=torch.float32)
    chosen = torch.zeros_like(scores).scatter_(1, scores.topk(2, sorted=False).indices, 1.0)
    masked = scores.masked_fill(~chosen.bool(), 0.0)
    masked /= masked.sum(-1, keepdim=True) + 1e-20
    return masked.to(torch.bfloat16).float()


def looked_up(x):
    order = x[:, 0].argsort()
    out = x[order] + F.embedding(IDS, WEIGHT)
    out[1:3] = 0.5
    return out.clamp(min=torch.tensor(0.1))


def many_temporaries(x):
    for _ in range(20):
        x = F.silu(F.linear(x, WEIGHT)) * (1 + x.pow(2).mean(-1, keepdim=True)).rsqrt()
    return x


def counted(x):
    places = torch.arange(len(x)).unsqueeze(-1)
    return torch.where(places % 2 == 0, x, -x) + torch.full((1, 8), 2.0)


@pytest.mark.parametrize("function", [views_and_joins, attention, grouped_gate, looked_up, many_temporaries, counted])
def test_the_same_bits_over_other_inputs(function):
    given = torch.empty_like(X)
    given.copy_(X)
    recording = record(lambda: function(given), Memory())
    with torch.inference_mode():
        assert torch.equal(recording.result, function(X))
        for factor in (-1.0, 3.0, 1.0):
            given.copy_(factor * X)
            assert torch.equal(recording.repeat(), function(factor * X))


def test_memory_is_used_again_within_a_recording_and_by_the_next():
    memory = Memory()
    recordings = [record(lambda n=n: many_temporaries(X[:n]), memory) for n in (6, 6, 2)]
    assert memory.nbytes <= 8 * X.nbytes  # some 100 results of this size
    with torch.inference_mode():
        for recording, n in [(recordings[0], 6), (recordings[2], 2), (recordings[1], 6), (recordings[0], 6)]:
            assert torch.equal(recording.repeat(), many_temporaries(X[:n]))


def test_what_a_function_keeps_is_not_overwritten():
    kept = []

    def function():
        kept.append(X + 1)
        return kept[0][:2] * 2

    memory = Memory()
    record(function, memory)
    record(lambda: many_temporaries(X), memory)
    assert torch.equal(kept[0], X + 1)


def test_what_torch_does_not_see_is_called_again_with_the_same_memory():
    heard = []

    def double(x, out):
        heard.append(float(x.sum()))
        out.copy_(x + x)  # not recorded beside the call itself

    def function():
        out = torch.empty_like(given)
        perform(double, given, out)
        return out + 1

    given = X.clone()
    recording = record(function, Memory())
    given.copy_(X * 2)
    assert torch.equal(recording.repeat(), X * 4 + 1)
    assert heard == [float(X.sum()), float((X * 2).sum())]


def test_a_call_is_only_a_call_where_nothing_is_recorded():
    heard = []
    perform(heard.append, 1)
    assert heard == [1]


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda: X * float(X[0, 0].item()), "_local_scalar_dense"),
        (lambda: X[X > 0], "index"),
        (lambda: X + X.nonzero().shape[0], "nonzero"),
        (lambda: X + torch.rand(8), "rand"),
        (lambda: X if torch.equal(X, X) else -X, "equal"),
    ],
)
def test_what_depends_on_more_than_shapes_is_refused(function, named):
    with pytest.raises(UnrepeatableError, match=named):
        record(function, Memory())


def test_a_value_may_decide_where_it_is_always_the_same():
    def function():
        with unrecorded():
            positive = bool((WEIGHT.abs() >= 0).all())
        return X + 1 if positive else X

    assert torch.equal(record(function, Memory()).repeat(), X + 1)
