"""The endpoint: `create_app` joins the OpenAI routes to a backend."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from moeray.config import Config
from moeray.recorder import Recorder
from moeray.serve.auth import require_key
from moeray.serve.backend import Backend, ModelInfo
from moeray.serve.body import read_json
from moeray.serve.chat import chat_events, plain_chat
from moeray.serve.completions import completion_events, plain_completion
from moeray.serve.console.assets import page_routes
from moeray.serve.console.state import ConsoleState
from moeray.serve.context import RequestContext
from moeray.serve.counting import RequestCounts
from moeray.serve.errors import (
    LOADING_RETRY_S,
    ApiError,
    failed_error,
    install_handlers,
    loading_error,
)
from moeray.serve.generate import Generation
from moeray.serve.job import Job, chat_job, completion_job
from moeray.serve.prompt import EncoderCache
from moeray.serve.responses import ModelCard, ModelList
from moeray.serve.schemas import parse_chat, parse_completion
from moeray.serve.streaming import EventStream, while_connected
from moeray.serve.tokens import Vocabulary

log = logging.getLogger("moeray.serve")

GENERATING = (("/v1/completions", "POST"), ("/v1/chat/completions", "POST"))

_Plain = Callable[[Job, Generation, Vocabulary], Coroutine[Any, Any, bytes]]
_Events = Callable[[Job, Generation, Vocabulary], AsyncGenerator[bytes, None]]


def create_app(backend: Backend, config: Config, recorder: Recorder | None = None) -> FastAPI:
    """The ASGI app over `backend`, which may still be loading: until it is ready every /v1 call is answered by 503.

    `recorder` counts its HTTP requests, for a backend that tells the controller of them.
    `app.state.endpoint.warm_up()` loads the tokenizer ahead of the first request.
    """
    app = FastAPI(title="moeray", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    endpoint = Endpoint(backend, config)
    app.state.endpoint = endpoint
    app.include_router(page_routes())
    app.include_router(_open_routes(endpoint))
    app.include_router(_key_routes(endpoint, config))
    install_handlers(app)
    app.add_middleware(RequestContext)
    app.add_middleware(RequestCounts, recorder or Recorder(), GENERATING)
    return app


def _open_routes(endpoint: Endpoint) -> APIRouter:
    routes = APIRouter()
    routes.add_api_route("/health", endpoint.health, methods=["GET", "HEAD"])
    routes.add_api_route("/metrics", endpoint.metrics, methods=["GET"])
    return routes


def _key_routes(endpoint: Endpoint, config: Config) -> APIRouter:
    routes = APIRouter(dependencies=[Depends(require_key(config.serve.api_key))])
    routes.add_api_route("/status", endpoint.status, methods=["GET"])
    routes.add_api_route("/console/state", endpoint.console_state, methods=["GET"])
    routes.add_api_route("/v1/models", endpoint.models, methods=["GET"])
    routes.add_api_route("/v1/models/{model_id:path}", endpoint.model, methods=["GET"])
    routes.add_api_route("/v1/completions", endpoint.completions, methods=["POST"])
    routes.add_api_route("/v1/chat/completions", endpoint.chat_completions, methods=["POST"])
    return routes


class Endpoint:
    """The routes' handlers."""

    def __init__(self, backend: Backend, config: Config) -> None:
        self._backend = backend
        self._config = config
        self._encoders = EncoderCache(config.chat_template)
        self._console = ConsoleState(backend)

    async def warm_up(self) -> None:
        """Load the tokenizer of a ready backend now. Raises CheckpointError, ConfigError or ApiError."""
        await self._encoders.get(self._ready_model())

    async def health(self) -> Response:
        """200 when ready, 503 while loading or when failed."""
        state = self._backend.state
        if state.status == "ready":
            return JSONResponse({"status": "ok"})
        headers = {"Retry-After": str(LOADING_RETRY_S)} if state.status == "loading" else None
        return JSONResponse({"status": state.status, "detail": state.detail}, 503, headers)

    async def metrics(self, request: Request) -> Response:
        """OpenMetrics where the Accept header asks for it, else Prometheus' plain text."""
        text, content_type = await self._backend.metrics(request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": content_type})

    async def status(self) -> Response:
        return JSONResponse(await self._backend.status())

    async def console_state(self) -> Response:
        state = await self._console.read()
        return Response(state, headers={"Cache-Control": "no-store"}, media_type="application/json")

    async def models(self) -> Response:
        listing = ModelList(object="list", data=[_card(self._ready_model())])
        return Response(listing.encode(), media_type="application/json")

    async def model(self, model_id: str) -> Response:
        return Response(_card(self._served(model_id)).encode(), media_type="application/json")

    async def completions(self, request: Request) -> Response:
        model = self._ready_model()
        asked = parse_completion(await self._body(request))
        self._served(asked.model)
        encoder = await self._encoders.get(model)
        job = await completion_job(asked, model, encoder, int(time.time()))
        return await self._answer(request, job, encoder.vocabulary, plain_completion, completion_events)

    async def chat_completions(self, request: Request) -> Response:
        model = self._ready_model()
        asked = parse_chat(await self._body(request))
        self._served(asked.model)
        encoder = await self._encoders.get(model)
        job = await chat_job(asked, model, encoder, int(time.time()))
        return await self._answer(request, job, encoder.vocabulary, plain_chat, chat_events)

    async def _body(self, request: Request) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self._config.serve.request_timeout_s):
                return await read_json(request, self._config.serve.max_body_bytes)
        except TimeoutError as error:
            raise ApiError(408, "the body did not arrive in time; send it faster", code="body_timeout") from error

    async def _answer(
        self, request: Request, job: Job, vocabulary: Vocabulary, plain: _Plain, events: _Events
    ) -> Response:
        log.info("request %s is %s with %d sequences", request.state.request_id, job.id, len(job.choices))
        generation = Generation(self._backend, job, vocabulary)
        timeout_s = self._config.serve.request_timeout_s
        if job.stream:
            return EventStream(events(job, generation, vocabulary), timeout_s)
        answer = await while_connected(request.receive, plain(job, generation, vocabulary), timeout_s)
        return Response(answer, media_type="application/json")

    def _ready_model(self) -> ModelInfo:
        """The model. Raises ApiError 503 while there is none."""
        state, model = self._backend.state, self._backend.model
        if state.status == "failed":
            raise failed_error(state.detail)
        if state.status == "loading" or model is None:
            raise loading_error(state.detail)
        return model

    def _served(self, name: str) -> ModelInfo:
        """The model, if `name` is its name. Raises ApiError 404 otherwise."""
        model = self._ready_model()
        if name != model.name:
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist; this server has {model.name!r}",
                param="model",
                code="model_not_found",
            )
        return model


def _card(model: ModelInfo) -> ModelCard:
    return ModelCard(
        id=model.name, object="model", created=model.created, owned_by="moeray", max_model_len=model.max_context
    )
