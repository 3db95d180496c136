"""What an actor is started with. Plain data: it travels to the actor's node."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

from moeray.config import Config
from moeray.types import Address
from moeray.wire.identity import Identity


@dataclass(frozen=True)
class DatedConfig:
    """A config and when it was laid down, in unix seconds: of several, the newest holds. 0: by nobody who may change a
    system that runs."""

    config: Config
    since: float = 0.0

    def public(self) -> DatedConfig:
        """As actors get it: the token travels beside it."""
        return replace(self, config=replace(self.config, wire=replace(self.config.wire, token=None)))


@dataclass(frozen=True)
class ActorSpec:
    """Common to expert actors and routers. `token` is the cluster's; `system` names this start of moeray.

    `since`: when the config was laid down, see `DatedConfig`. `background`: nobody waits for this actor, so its start
    is to leave the processor to those that serve.
    """

    actor_id: str
    group: str
    device: str
    threads: int
    config: Config
    token: bytes = field(repr=False)
    system: str
    background: bool = False
    since: float = 0.0

    def identity(self, node_id: str) -> Identity:
        return Identity(self.actor_id, node_id, model_fingerprint(self.config), self.token)


@dataclass(frozen=True)
class ActorReport:
    """What a started actor says of the place it landed on."""

    actor_id: str
    node_id: str
    pid: int
    device: str
    free_bytes: int


@dataclass(frozen=True)
class SystemInfo:
    """What an ingress needs to serve: where the routers listen that take requests, and the model's own facts."""

    model: str
    revision: str | None
    token: bytes = field(repr=False)
    system: str
    routers: tuple[Address, ...]
    max_context: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


def model_fingerprint(config: Config) -> str:
    """What both ends of a channel must agree on before weights are compared: model, revision and dtype."""
    text = "\0".join((config.model, config.revision or "", config.dtype))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
