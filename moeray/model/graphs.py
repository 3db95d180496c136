"""Repeating a computation on a GPU: what lies between the calls that leave the GPU becomes a CUDA graph each.

In a step these calls are the layers' dispatches (`recording.perform`): a step of L MoE layers is L + 1 graphs with
dispatches in between. Its inputs are tensors that are written before it is repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from moeray.model.recording import Node, Recording, UnrepeatableError, heard_by


class Graph(Protocol):
    """Takes up what is computed between `begin` and `end`, and computes it (anew) when it is replayed."""

    def begin(self) -> None: ...
    def end(self) -> None: ...
    def replay(self) -> None: ...


class CudaGraph:
    """A torch.cuda.CUDAGraph on the current stream. Graphs of one `pool` lend each other memory."""

    def __init__(self, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def begin(self) -> None:
        self._graph.capture_begin(self._pool, capture_error_mode="thread_local")  # other threads may go on

    def end(self) -> None:
        self._graph.capture_end()

    def replay(self) -> None:
        self._graph.replay()


def capturing(device: torch.device) -> Callable[[Callable[[], Tensor]], Recording]:
    """What records functions on this GPU, to be repeated one at a time by one thread: `recording.record` of a GPU."""
    pool = torch.cuda.graph_pool_handle()

    def record_on_gpu(function: Callable[[], Tensor]) -> Recording:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        calling = torch.cuda.current_stream(device)
        stream.wait_stream(calling)
        with torch.cuda.stream(stream):  # the default stream cannot be captured
            function()  # what is compiled or loaded for these very inputs cannot be while it is captured
            recording = capture(function, lambda: CudaGraph(pool))
        calling.wait_stream(stream)
        return recording

    return record_on_gpu


@torch.inference_mode()
def capture(function: Callable[[], Tensor], new: Callable[[], Graph]) -> Recording:
    """Run the function, each part of it between two performed calls as a `new` graph.

    Raises UnrepeatableError for what no graph takes up, and what the performed calls raise.
    """
    capturer = _Capturer(new)
    with heard_by(capturer):
        try:
            capturer.open()
            result = function()
            capturer.close()
        except RuntimeError as error:
            if not capturer.is_open:
                raise
            raise UnrepeatableError(f"a CUDA graph does not take it up: {error}") from error
        finally:
            capturer.give_up()
    return Recording(capturer.nodes, result)


class _Capturer:
    """`is_open`: a graph is taking up what is computed."""

    def __init__(self, new: Callable[[], Graph]) -> None:
        self._new = new
        self._graph: Graph | None = None
        self.nodes: list[Node] = []

    @property
    def is_open(self) -> bool:
        return self._graph is not None

    def perform(self, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """The call reads what the graph before it computes, so that is computed now. Its arguments live on with it."""
        self.close()
        call(*args)
        self.nodes.append(partial(call, *args))
        self.open()

    def open(self) -> None:
        self._graph = self._new()
        self._graph.begin()

    def close(self) -> None:
        assert self._graph is not None
        self._graph.end()
        graph, self._graph = self._graph, None
        graph.replay()
        self.nodes.append(graph.replay)

    def give_up(self) -> None:
        """End what is being taken up, which is lost."""
        if self._graph is not None:
            with suppress(RuntimeError):  # of a capture that has failed already
                self._graph.end()
            self._graph = None
