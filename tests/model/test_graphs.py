"""What lies between performed calls is taken up by graphs; the graphs of these tests are recordings on the CPU."""

import pytest
import torch
from torch.nn import functional as F

from moeray.model.graphs import capture
from moeray.model.recording import Memory, UnrepeatableError, _Recorder, perform

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))


class Recorded:
    """As a CUDA graph, it may not be touched while it is not open, and forgets what failed."""

    def __init__(self, memory, open_ones):
        self._recorder = _Recorder(memory)
        self._open_ones = open_ones

    def begin(self):
        assert not self._open_ones
        self._open_ones.append(self)
        self._recorder.__enter__()

    def end(self):
        self._open_ones.remove(self)
        self._recorder.__exit__(None, None, None)

    def replay(self):
        assert not self._open_ones
        for node in self._recorder.nodes:
            node()


@pytest.fixture
def open_ones():
    return []


@pytest.fixture
def new(open_ones):
    memory = Memory()
    return lambda: Recorded(memory, open_ones)


def layers(x, outside, count=3):
    """A step: what is computed here, with calls in between that this does not see."""
    for layer in range(count):
        x = F.silu(F.linear(x, WEIGHT))
        out = torch.empty_like(x)
        perform(outside, layer, x, out)
        x = x + out
    return x * 2


def test_repeated_it_gives_what_the_function_gives(new, open_ones):
    given, calls = X.clone(), []

    def outside(layer, x, out):
        assert not open_ones
        calls.append(layer)
        out.copy_((x * (layer + 1)).flip(-1))

    recording = capture(lambda: layers(given, outside), new)
    with torch.inference_mode():
        assert torch.equal(recording.result, layers(X, outside))
        for factor in (-1.0, 3.0, 1.0):
            given.copy_(factor * X)
            calls.clear()
            assert torch.equal(recording.repeat(), layers(factor * X, outside))
            assert calls == [0, 1, 2] * 2


def test_what_cannot_be_taken_up_ends_the_graph(new, open_ones):
    def function():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(UnrepeatableError, match="a CUDA graph does not take it up: operation not permitted"):
        capture(function, new)
    assert not open_ones


@pytest.mark.parametrize("error", [RuntimeError("of its own"), KeyError("another")])
def test_a_performed_call_that_fails_says_so_itself(error, new, open_ones):
    def outside(layer, x, out):
        raise error

    with pytest.raises(type(error), match=str(error.args[0])):
        capture(lambda: layers(X, outside), new)
    assert not open_ones
    perform(lambda: None)  # nobody listens any more


def test_what_fails_otherwise_ends_the_graph_too(new, open_ones):
    with pytest.raises(ZeroDivisionError):
        capture(lambda: X / (1 // 0), new)
    assert not open_ones
