"""Repeating a computation without the Python and the allocations around it, as CUDA graphs do for a GPU's kernels.

A function is run once while each operation on tensors is noted down with the memory that it reads and writes.
Repeating it is a walk over these operations: no modules, no views, no shapes to work out. Its inputs are tensors that
it read when it was recorded, and are written before it is repeated.

Memory is lent to each tensor that comes about while recording, and lent again as soon as the function has dropped that
tensor; the order of a repetition being the same, nothing is overwritten that is still to be read.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_aten = torch.ops.aten
_EMPTY = {
    _aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default,
    _aten.new_empty.default, _aten.new_empty_strided.default,
}  # fmt: skip
_COPIES = {_aten.clone.default, _aten._to_copy.default}
"""Their variants that write to given memory would allocate on the way."""
_ROUNDED = 64

Node = Callable[[], Any]
Record = Callable[[Callable[[], Tensor]], "Recording"]
"""Runs a function and notes what it does. Raises UnrepeatableError, and what it raises."""


class UnrepeatableError(Exception):
    """What was done cannot be repeated from its record: it depends on more than the memory that it reads."""


class Recording:
    """Operations to do again. `result` is the memory of the tensor that the function gave."""

    def __init__(self, nodes: list[Node], result: Tensor) -> None:
        self._nodes = nodes
        self.result = result

    @torch.inference_mode()
    def repeat(self) -> Tensor:
        """Do all of it again. The result is the same memory each time."""
        for node in self._nodes:
            node()
        return self.result


class Memory:
    """What recordings compute in. Those that share it are to be repeated one at a time, by one thread."""

    def __init__(self) -> None:
        self._buffers: dict[int, _Buffer] = {}

    @property
    def nbytes(self) -> int:
        """Of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def lend(self, like: Tensor) -> Tensor:
        """A tensor of this shape, these strides and this dtype, in memory that nothing else uses while it lives."""
        needed = like.itemsize * (1 + sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True)))
        free = [buffer for buffer in self._buffers.values() if buffer.nbytes >= needed and buffer.is_free()]
        if not free:
            free = [_Buffer(max(needed, 1))]
            self._buffers[free[0].address] = free[0]
        return min(free, key=lambda buffer: buffer.nbytes).lend(like)

    def owned(self, tensor: Tensor) -> Tensor:
        """The same memory, of which the lent tensor's life does not depend; any other tensor as it is."""
        buffer = self._buffers.get(tensor.untyped_storage().data_ptr())
        return tensor if buffer is None else buffer.owned(tensor)


class _Buffer:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = -(-nbytes // _ROUNDED) * _ROUNDED
        self._memory = np.empty(self.nbytes, np.uint8)
        self._own = torch.from_numpy(self._memory)
        self.address = self._own.data_ptr()
        self._lent: weakref.ref[np.ndarray[Any, Any]] | None = None

    def is_free(self) -> bool:
        return self._lent is None or self._lent() is None

    def lend(self, like: Tensor) -> Tensor:
        view = self._memory[:]  # it lives as long as the storage of a tensor and of all views of it
        self._lent = weakref.ref(view)
        return torch.from_numpy(view).view(like.dtype).as_strided(like.shape, like.stride())

    def owned(self, tensor: Tensor) -> Tensor:
        return self._own.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@torch.inference_mode()
def record(function: Callable[[], Tensor], memory: Memory) -> Recording:
    """Run the function, on the CPU, and note what it does. Raises UnrepeatableError, and what it raises."""
    recorder = _Recorder(memory)
    with recorder, heard_by(recorder):
        result = function()
    return Recording(recorder.nodes, memory.owned(result))


class Recorder(Protocol):
    """Hears of what torch does not see."""

    def perform(self, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Call it, and note it down."""


_recorder: ContextVar[Recorder | None] = ContextVar("moeray_recorder", default=None)


def perform(call: Callable[..., Any], *args: Any) -> None:
    """Call what torch does not see, such as a kernel in C, so that a recording repeats it.

    It is called with the same arguments then. Tensors that it reads or writes are given as such or by address.
    """
    recorder = _recorder.get()
    if recorder is None:
        call(*args)
    else:
        recorder.perform(call, args)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Within the block, nothing is recorded: a repetition takes for granted what comes of it."""
    with heard_by(None), _disable_current_modes():
        yield


@contextmanager
def heard_by(recorder: Recorder | None) -> Iterator[None]:
    """Within the block, this one hears what is performed."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, memory: Memory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: list[Node] = []
        self._memory = memory

    def perform(self, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        with unrecorded():
            call(*args)
        self.nodes.append(partial(call, *self._owned(args)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        _check(func, args)
        result = func(*args, **kwargs)
        if func in _EMPTY:
            return self._memory.lend(result)
        writes = func._schema.is_mutable and torch.Tag.inplace_view not in func.tags
        if writes:
            self.nodes.append(partial(func, *self._owned(args), **self._owned(kwargs)))
        if writes or _returns_views(result, [args, kwargs]):
            return result
        return self._computed(func, args, kwargs, result)

    def _computed(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        lent = _mapped(self._memory.lend, result)
        outs = [self._memory.owned(tensor) for tensor in _tensors(lent)]
        node = _written(func, self._owned(args), self._owned(kwargs), outs)
        node()
        if not all(map(_same_bits, outs, _tensors(result))):
            raise UnrepeatableError(f"{func} gives other numbers when it is done again")
        self.nodes.append(node)
        return lent

    def _owned(self, arguments: Any) -> Any:
        return _mapped(self._memory.owned, arguments)


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """An operation's arguments or results, each tensor changed."""
    match value:
        case Tensor():
            return function(value)
        case list() | tuple():
            return type(value)([_mapped(function, each) for each in value])
        case dict():
            return {key: _mapped(function, each) for key, each in value.items()}
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those among an operation's arguments or results."""
    match value:
        case Tensor():
            yield value
        case list() | tuple():
            for each in value:
                yield from _tensors(each)
        case dict():
            yield from _tensors(list(value.values()))


def _check(func: Any, args: Any) -> None:
    depends = torch.Tag.data_dependent_output in func.tags
    if torch.Tag.dynamic_output_shape in func.tags:  # indexing has it for masks, whose set bits make up the shape
        masks = func is not _aten.index.Tensor or any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1]))
        depends = depends or masks
    if depends:
        raise UnrepeatableError(f"what {func} gives is not told by the shapes of what it reads")


def _returns_views(result: Any, inputs: Any) -> bool:
    known = {tensor.untyped_storage().data_ptr() for tensor in _tensors(inputs)}
    return all(tensor.untyped_storage().data_ptr() in known for tensor in _tensors(result))


def _written(func: Any, args: Any, kwargs: Any, outs: list[Tensor]) -> Node:
    """The operation, its outputs written to `outs`."""
    if func in _COPIES:
        return partial(outs[0].copy_, args[0])
    variant = _out_variant(func)
    if variant is None:
        return partial(_copied, partial(func, *args, **kwargs), outs)
    call, names = variant
    return partial(call, *args, **kwargs, **dict(zip(names, outs, strict=True)))


def _copied(call: Node, outs: list[Tensor]) -> None:
    for out, result in zip(outs, _tensors(call()), strict=True):
        out.copy_(result)


@cache
def _out_variant(func: Any) -> tuple[Any, list[str]] | None:
    """The overload that takes the same arguments, and the names of those for its outputs."""
    for name in func.overloadpacket.overloads():
        overload = getattr(func.overloadpacket, name)
        arguments = overload._schema.arguments
        outs = [argument.name for argument in arguments if argument.is_out]
        if outs and _signature(a for a in arguments if not a.is_out) == _signature(func._schema.arguments):
            return overload, outs
    return None


def _signature(arguments: Any) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in arguments]


def _same_bits(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (ours, theirs)))
