"""Whole systems in this process, for tests: the real controller, actors, channels and engine, without Ray."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeray.actors.controller import Controller
from moeray.actors.hosting import ActorHandle
from moeray.actors.spec import model_fingerprint
from moeray.cluster.local import NODE, LocalCluster
from moeray.config import Config, load_config
from moeray.types import GenerationRequest, SamplingParams, TokenOutput

_names = itertools.count()


def tiny_config(model: Path | str, **overrides: Any) -> Config:
    """Dots in keys are written as `__`."""
    small = {"model": str(model), "dtype": "float32", "engine__kv_blocks": 256, "wire__remote": "off"}
    return load_config(None, {key.replace("__", "."): value for key, value in (small | overrides).items()})


class LocalSystem:
    """A started system; `generate` runs requests through a client's channel, all at once."""

    def __init__(self, config: Config, cluster: LocalCluster | None = None) -> None:
        self.config = config
        self.cluster = cluster or LocalCluster()
        self.controller = Controller(config, self.cluster)

    def __enter__(self) -> LocalSystem:
        self.controller.start()
        self.info = self.controller.state()["info"]
        return self

    def take_over(self) -> None:
        """A new controller goes on from the one that was abandoned; until it knows of a router that serves."""
        self.controller = Controller(self.config, self.cluster)
        self.controller.start()
        end = time.monotonic() + 60.0
        while (info := self.controller.state()["info"]) is None:
            assert time.monotonic() < end, self.controller.status()  # a round trip, instead of spinning
            self.controller.status()
        self.info = info

    def handle(self, actor_id: str) -> ActorHandle:
        return next(handle for handle in self.cluster.find() if handle.actor_id == actor_id)

    def __exit__(self, *exc: object) -> None:
        self.controller.stop()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams]
    ) -> list[list[TokenOutput]]:
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        requests = [GenerationRequest(f"r{next(_names)}", tuple(p), s) for p, s in zip(prompts, each, strict=True)]
        return asyncio.run(self._all(requests))

    async def _all(self, requests: list[GenerationRequest]) -> list[list[TokenOutput]]:
        from moeray.actors.client import RouterClient
        from moeray.wire.identity import Identity

        identity = Identity(f"test-{next(_names)}", NODE, model_fingerprint(self.config), self.info.token)
        client = RouterClient(self.info.routers[0], identity, self.config.wire)

        async def one(request: GenerationRequest) -> list[TokenOutput]:
            return [output async for output in client.generate(request)]

        try:
            return await asyncio.gather(*(one(request) for request in requests))
        finally:
            await client.close()


def tokens_of(outputs: Sequence[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


GREEDY24 = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
