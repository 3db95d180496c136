"""The endpoint: `create_app` joins the OpenAI routes to a backend."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from moeray.config import Config
from moeray.recorder import Recorder
from moeray.serve.auth import require_key
from moeray.serve.backend import ModelInfo, ObservedBackend
from moeray.serve.body import read_json
from moeray.serve.calls import CHAT_COMPLETIONS, COMPLETIONS, Calls
from moeray.serve.console.assets import page_routes
from moeray.serve.console.state import ConsoleState
from moeray.serve.context import RequestContext
from moeray.serve.counting import RequestCounts
from moeray.serve.errors import LOADING_RETRY_S, ApiError, install_handlers
from moeray.serve.origins import AllowedOrigins
from moeray.serve.responses import ModelCard, ModelList
from moeray.serve.streaming import EventStream, while_connected

log = logging.getLogger("moeray.serve")

GENERATING = ((COMPLETIONS, "POST"), (CHAT_COMPLETIONS, "POST"))


def create_app(
    backend: ObservedBackend, config: Config, recorder: Recorder | None = None, *, answer_request_id: bool = True
) -> FastAPI:
    """The ASGI app over `backend`, which may still be loading: until it is ready every /v1 call is answered by 503.

    `recorder` counts its HTTP requests, for a backend that tells the controller of them.
    `app.state.endpoint.warm_up()` loads the tokenizer ahead of the first request; its `configure` takes a newer config.
    `answer_request_id`: False where a proxy in front sends each request's id back.
    """
    app = FastAPI(title="moeray", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    endpoint = Endpoint(backend, config)
    app.state.endpoint = endpoint
    app.include_router(page_routes())
    app.include_router(_open_routes(endpoint))
    app.include_router(_key_routes(endpoint))
    install_handlers(app)
    app.add_middleware(RequestContext, answer=answer_request_id)
    app.add_middleware(AllowedOrigins, current=lambda: endpoint.allowed_origins)
    app.add_middleware(RequestCounts, recorder or Recorder(), GENERATING)
    return app


def _open_routes(endpoint: Endpoint) -> APIRouter:
    routes = APIRouter()
    routes.add_api_route("/health", endpoint.health, methods=["GET", "HEAD"])
    routes.add_api_route("/metrics", endpoint.metrics, methods=["GET"])
    return routes


def _key_routes(endpoint: Endpoint) -> APIRouter:
    routes = APIRouter(dependencies=[Depends(require_key(lambda: endpoint.api_key))])
    routes.add_api_route("/status", endpoint.status, methods=["GET"])
    routes.add_api_route("/console/state", endpoint.console_state, methods=["GET"])
    routes.add_api_route("/v1/models", endpoint.models, methods=["GET"])
    routes.add_api_route("/v1/models/{model_id:path}", endpoint.model, methods=["GET"])
    routes.add_api_route(COMPLETIONS, endpoint.completions, methods=["POST"])
    routes.add_api_route(CHAT_COMPLETIONS, endpoint.chat_completions, methods=["POST"])
    return routes


class Endpoint:
    """The routes' handlers."""

    def __init__(self, backend: ObservedBackend, config: Config) -> None:
        self._backend = backend
        self._config = config
        self._calls = Calls(backend, config.chat_template, config.serve.stream_interval)
        self._console = ConsoleState(backend)

    def configure(self, config: Config) -> None:
        """Hold a newer config for the requests that come from now on."""
        if config.chat_template != self._config.chat_template:
            self._calls = Calls(self._backend, config.chat_template)
        self._calls.stream_interval = config.serve.stream_interval
        self._config = config

    @property
    def allowed_origins(self) -> tuple[str, ...]:
        return self._config.serve.allowed_origins

    @property
    def api_key(self) -> str | None:
        return self._config.serve.api_key

    async def warm_up(self) -> None:
        """Load the tokenizer of a ready backend now. Raises CheckpointError, ConfigError or ApiError."""
        await self._calls.warm_up()

    async def health(self) -> Response:
        """200 when ready, 503 while loading, without a router or when failed; of these the last alone is for good."""
        state = self._backend.state
        if state.status == "ready":
            return JSONResponse({"status": "ok"})
        headers = {"Retry-After": str(LOADING_RETRY_S)} if state.status != "failed" else None
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
        listing = ModelList(object="list", data=[_card(self._calls.model())])
        return Response(listing.encode(), media_type="application/json")

    async def model(self, model_id: str) -> Response:
        return Response(_card(self._calls.served(model_id)).encode(), media_type="application/json")

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, COMPLETIONS)

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, CHAT_COMPLETIONS)

    async def _body(self, request: Request) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self._config.serve.request_timeout_s):
                return await read_json(request, self._config.serve.max_body_bytes)
        except TimeoutError as error:
            raise ApiError(408, "the body did not arrive in time; send it faster", code="body_timeout") from error

    async def _answer(self, request: Request, path: str) -> Response:
        self._calls.model()  # before the body is read
        call = await self._calls.prepare(path, await self._body(request))
        log.debug("this is %s with %d sequences", call.job.id, len(call.job.choices))
        timeout_s = self._config.serve.request_timeout_s
        if call.job.stream:
            return EventStream(call.events(), timeout_s)
        answer = await while_connected(request.receive, call.plain(), timeout_s)
        return Response(answer, media_type="application/json")


def _card(model: ModelInfo) -> ModelCard:
    return ModelCard(
        id=model.name, object="model", created=model.created, owned_by="moeray", max_model_len=model.max_context
    )
