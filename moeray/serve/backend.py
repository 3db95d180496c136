"""What the HTTP side needs from the system behind it. The local and the Ray system both answer to this."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from moeray.types import GenerationRequest, TokenOutput


@dataclass(frozen=True, slots=True)
class BackendState:
    """`detail` is the progress while loading, what is missing while waiting, and the one-line error once failed.

    `waiting`: the system had come up, but nothing can be served at present; requests are taken, and wait for a router.
    `stopping`: the controller is ending it.
    """

    status: Literal["loading", "ready", "waiting", "stopping", "failed"]
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The served model. `created` is in unix seconds, `max_context` in tokens (prompt and output together).

    `metadata_dir` holds the tokenizer's files and the chat template. `sampling_defaults` is how the model's authors
    advise to sample, by the names of SamplingParams; `eos_token_ids` end a sequence unless the request ignores them.
    `max_sequences`: as many as all routers take at once, decoding and waiting; no request may have more choices.
    """

    name: str
    created: int
    max_context: int
    vocab_size: int
    metadata_dir: Path
    eos_token_ids: tuple[int, ...] = ()
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    max_sequences: int = 1024


class Backend(Protocol):
    """`state` and `model` are read on every request; `model` is set by the time that the state is ready."""

    @property
    def state(self) -> BackendState: ...

    @property
    def model(self) -> ModelInfo | None: ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput, None]:
        """The outputs of one request, in order; the last one has a finish reason.

        It is submitted at the first step, which raises QueueFullError or RequestError when it is not taken. Closing
        the generator aborts the sequence and frees its blocks.
        """
        ...

    def stopped(self, request_id: str) -> None:
        """The text has come to a stop string: when its outputs are closed now, the sequence counts as ended by STOP."""
        ...


class ObservedBackend(Backend, Protocol):
    """One that also tells of the system behind it."""

    async def status(self) -> dict[str, Any]:
        """The running system as JSON-able data: actors, experts, load."""
        ...

    async def console(self) -> dict[str, Any]:
        """What the live page shows of the running system, as JSON-able data."""
        ...

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        """(all series of the system, their content type), as the HTTP header `accept` asks. Raises NotReadyError."""
        ...
