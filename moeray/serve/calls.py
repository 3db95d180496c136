"""An OpenAI call from its body to its answer, whichever way the body came: HTTP and batch files share this."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from moeray.errors import CheckpointError
from moeray.serve.backend import Backend, ModelInfo
from moeray.serve.chat import chat_events, plain_chat
from moeray.serve.completions import completion_events, plain_completion
from moeray.serve.errors import ApiError, failed_error, loading_error
from moeray.serve.generate import Generation
from moeray.serve.job import Job, chat_job, completion_job
from moeray.serve.prompt import EncoderCache, PromptEncoder
from moeray.serve.schemas import GenerationFields, parse_chat, parse_completion
from moeray.serve.tokens import Vocabulary

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Api:
    """What one path of the API does: read a body, make a job of it, write the answer whole or as events."""

    parse: Callable[[Mapping[str, Any]], GenerationFields]
    job: Callable[..., Coroutine[Any, Any, Job]]
    plain: Callable[[Job, Generation, Vocabulary], Coroutine[Any, Any, bytes]]
    events: Callable[[Job, Generation, Vocabulary], AsyncGenerator[bytes, None]]


COMPLETIONS = "/v1/completions"
CHAT_COMPLETIONS = "/v1/chat/completions"
APIS: Mapping[str, Api] = {
    COMPLETIONS: Api(parse_completion, completion_job, plain_completion, completion_events),
    CHAT_COMPLETIONS: Api(parse_chat, chat_job, plain_chat, chat_events),
}


@dataclass(frozen=True, slots=True)
class Call:
    """One call on its way; either `plain` or `events`, once."""

    api: Api
    job: Job
    generation: Generation
    vocabulary: Vocabulary

    async def plain(self) -> bytes:
        """The whole answer as JSON."""
        return await self.api.plain(self.job, self.generation, self.vocabulary)

    def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as stream chunks, each JSON."""
        return self.api.events(self.job, self.generation, self.vocabulary)


class Calls:
    """Prepares calls for the model behind `backend`. `stream_interval`: tokens in an event of a stream."""

    def __init__(self, backend: Backend, chat_template: str | None, stream_interval: int = 1) -> None:
        self._backend = backend
        self.stream_interval = stream_interval
        self._encoders = EncoderCache(chat_template)

    async def warm_up(self) -> None:
        """Load the tokenizer of a ready backend now. Raises CheckpointError, ConfigError or ApiError."""
        await self._encoders.get(self.model())

    async def prepare(self, path: str, body: Mapping[str, Any]) -> Call:
        """Read, check and tokenize the body of a call to `path`, a key of APIS.

        Raises RequestError where the body cannot be served as asked, ApiError for another model, none yet, or one
        without a tokenizer.
        """
        api = APIS[path]
        asked = api.parse(body)
        model = self.served(asked.model)
        encoder = await self._encoder(model)
        job = await api.job(asked, model, encoder, int(time.time()))
        interval = self.stream_interval if job.stream else sys.maxsize  # nobody waits for the parts of a whole answer
        return Call(api, job, Generation(self._backend, job, encoder.vocabulary, interval), encoder.vocabulary)

    async def _encoder(self, model: ModelInfo) -> PromptEncoder:
        try:
            return await self._encoders.get(model)
        except CheckpointError as error:  # names a folder of the server's, which is its operator's affair
            log.error("%s", error)
            raise ApiError(
                503,
                "the served model has no usable tokenizer, so it takes no requests; the server's log says what is "
                "missing",
                code="no_tokenizer",
            ) from error

    def model(self) -> ModelInfo:
        """The model. Raises ApiError 503 while there is none."""
        state, model = self._backend.state, self._backend.model
        if state.status == "failed":
            raise failed_error(state.detail)
        if state.status == "loading" or model is None:
            raise loading_error(state.detail)
        return model

    def served(self, name: str) -> ModelInfo:
        """The model, if `name` is its name. Raises ApiError 404 otherwise."""
        model = self.model()
        if name != model.name:
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist; this server has {model.name!r}",
                param="model",
                code="model_not_found",
            )
        return model
