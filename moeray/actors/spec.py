"""What an actor is started with. Plain data: it travels to the actor's node."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from moeray.config import Config
from moeray.errors import ConfigError
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


def machine_dir() -> Path:
    """This user's folder for what all actors of the machine share."""
    base = Path(os.environ.get("MOERAY_RUNTIME_DIR") or os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    return base / f"moeray-{os.getuid()}"


def runtime_dir(node_id: str, system: str) -> Path:
    """The private folder (0700) for one node's sockets. Nodes that share a machine get different ones."""
    folder = machine_dir() / f"{node_id[:12]}-{system[:8]}"
    for path in (machine_dir(), folder):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
        if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise ConfigError(
                f"folder {path} must be private to this user (mode 0700); mend it or set MOERAY_RUNTIME_DIR"
            )
    return folder


def remove_runtime_dir(node_id: str, system: str) -> None:
    """Remove the folder once the last actor of the node has closed its socket."""
    with suppress(OSError):  # another actor's socket is still there, or it was faster
        runtime_dir(node_id, system).rmdir()
