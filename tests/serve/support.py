"""A real tokenizer, a real uvicorn server, and a backend that answers by rule instead of by a model."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moeray.config import Config
from moeray.exposition import exposition
from moeray.serve.backend import BackendState, ModelInfo
from moeray.serve.openai import create_app
from moeray.types import FinishReason, GenerationRequest, TokenLogprobs, TokenOutput

SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|developer|>"]
EOS_ID = 0
MAX_CONTEXT = 512
TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.index0 > 0 and m.role == messages[loop.index0 - 1].role %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if shout is defined %}{{ shout }}{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, stop here", "東京は日本の首都です"]


def save_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Byte-level BPE with few merges: emoji and most CJK characters span several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", extra_special_tokens=SPECIAL[1:], chat_template=template
    )
    fast.save_pretrained(folder)
    return folder


@dataclass
class EchoBackend:
    """Generates the prompt's ordinary tokens again, then eos. Thread-safe to look at, not to share between servers."""

    model: ModelInfo | None
    state: BackendState = field(default_factory=lambda: BackendState("ready"))
    tokens_per_step: int = 1
    cached_tokens: int = 0
    refuse: Exception | None = None
    break_after: int | None = None
    break_with: BaseException | None = None
    hold_after: int | None = None
    gather: int = 0
    requests: list[GenerationRequest] = field(default_factory=list)
    held: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    stop_strings: list[str] = field(default_factory=list)
    closed: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    open: int = 0
    looks: int = 0
    most_open: int = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput, None]:
        self.requests.append(request)
        if self.refuse is not None:
            raise self.refuse
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            async for output in self._outputs(request):
                yield output
        finally:
            self.open -= 1
            self.closed.release()

    def stopped(self, request_id: str) -> None:
        self.stop_strings.append(request_id)

    async def _outputs(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput, None]:
        while self.most_open < self.gather:
            await asyncio.sleep(0)  # until that many sequences run side by side
        for place in range(1, len(request.prompt_ids) if request.sampling.prompt_logprobs is not None else 0):
            score = prompt_score(request, place)
            yield TokenOutput(request.request_id, 0, (), prompt_logprobs=(score,))
        ids, reason = echo(request)
        for start in range(0, len(ids), self.tokens_per_step):
            if self.hold_after is not None and start >= self.hold_after:
                self.held.release()
                await asyncio.Event().wait()
            if self.break_after is not None and start >= self.break_after:
                if self.break_with is not None:
                    raise self.break_with
                yield TokenOutput(request.request_id, 0, (), (), FinishReason.ERROR, error="expert group 3 is gone")
                return
            part = ids[start : start + self.tokens_per_step]
            last = start + len(part) == len(ids)
            logprobs = tuple(_logprobs(i, request) for i in part) if request.sampling.logprobs is not None else ()
            yield TokenOutput(
                request.request_id, 0, part, logprobs, reason if last else None, cached_tokens=self.cached_tokens
            )
            await asyncio.sleep(0)

    async def status(self) -> dict[str, Any]:
        return {"epoch": 7, "actors": []}

    async def console(self) -> dict[str, Any]:
        self.looks += 1
        if self.refuse is not None:
            raise self.refuse
        return {"status": "ready", "detail": "ready", "epoch": 7}

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        return exposition({"moeray_placement_epoch": {(): 3.0}}, accept)


def echo(request: GenerationRequest) -> tuple[tuple[int, ...], FinishReason]:
    """The rule: every prompt token that is not special, then eos, cut at max_tokens."""
    ids = tuple(i for i in request.prompt_ids if i >= len(SPECIAL))
    params = request.sampling
    for place, token_id in enumerate(ids[: params.max_tokens]):
        if token_id in params.stop_token_ids:
            return ids[: place + 1], FinishReason.STOP
    if len(ids) >= params.max_tokens:
        return ids[: params.max_tokens], FinishReason.LENGTH
    return (*ids, EOS_ID), FinishReason.STOP


def prompt_score(request: GenerationRequest, place: int) -> TokenLogprobs:
    """The rule for the prompt's token at `place`: which says what both of them are."""
    token_id = request.prompt_ids[place]
    top = tuple((token_id + 1 + i, -1.0 / (2 + place + i)) for i in range(request.sampling.prompt_logprobs or 0))
    return TokenLogprobs(-1.0 * place, top)


def _logprobs(token_id: int, request: GenerationRequest) -> TokenLogprobs:
    top = tuple((token_id + i, -0.5 - i) for i in range(request.sampling.logprobs or 0))
    return TokenLogprobs(-0.5, top)


def model_info(folder: Path, **changes: Any) -> ModelInfo:
    fields = {
        "name": "org/echo",
        "created": 1_700_000_000,
        "max_context": MAX_CONTEXT,
        "vocab_size": 320,
        "metadata_dir": folder,
        "eos_token_ids": (EOS_ID,),
    }
    return ModelInfo(**(fields | changes))


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


@contextmanager
def serving(backend: EchoBackend, config: Config | None = None, http: str = "auto") -> Iterator[str]:
    """Serve `backend` on a free loopback port; yields the base URL without /v1."""
    app = create_app(backend, config or Config())
    listener = socket.create_server(("127.0.0.1", 0))
    server = _Server(uvicorn.Config(app, log_level="warning", http=http, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="uvicorn")
    thread.start()
    try:
        assert server.up.wait(30)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)
