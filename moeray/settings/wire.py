"""The channels between the actors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moeray.tree import require

Remote = Literal["auto", "tcp", "grpc", "both", "off"]
DeviceRows = Literal["auto", "on", "off"]

RING_FROM = 4 << 10
"""Smaller rings are none, and payloads of fewer bytes go through the socket."""


@dataclass(frozen=True)
class WireConfig:
    """The data plane. `token` None: read MOERAY_CLUSTER_TOKEN, else one is made for each start.

    `remote`: what actors of different nodes speak by: `tcp`, or `grpc`, for TLS and for networks that let nothing else
    through; `auto` is grpc where TLS is configured and else tcp. `both` listens for either and dials tcp first, to go
    over from one to the other; `off`: all actors are on one node.

    `device_rows`: rows between a router and an expert actor on GPUs of one node stay in their memory (CUDA IPC):
    `auto` where a self-check of the channel says that they can, else through the host's memory; `on`: an actor with a
    GPU to which they cannot is not spoken to; `off`. Each channel takes `shared_memory_bytes` of it, each way.

    `send_timeout_s` bounds one send to a peer that does not read, `handshake_timeout_s` the wait for a peer's proof,
    and `max_channels` the channels that one listener serves at once (of each kind).
    """

    host: str = "127.0.0.1"
    remote: Remote = "auto"
    max_header_bytes: int = 8 << 20
    max_payload_bytes: int = 1 << 30
    shared_memory_bytes: int = 32 << 20
    device_rows: DeviceRows = "auto"
    deadline_s: float = 60.0
    send_timeout_s: float = 10.0
    handshake_timeout_s: float = 5.0
    max_channels: int = 256
    token: str | None = field(default=None, repr=False)
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None

    def __post_init__(self) -> None:
        for key in ("deadline_s", "send_timeout_s", "handshake_timeout_s"):
            require(getattr(self, key) > 0, f"wire.{key}", "must be above 0 seconds")
        require(self.max_channels >= 1, "wire.max_channels", f"must be at least 1, got {self.max_channels}")
        for key in ("max_header_bytes", "max_payload_bytes"):
            require(1 << 16 <= getattr(self, key) < 1 << 32, f"wire.{key}", "must be at least 64 KiB and below 4 GiB")
        fits = 0 <= self.shared_memory_bytes < 1 << 40
        require(fits, "wire.shared_memory_bytes", "must be 0 (no shared memory) or more, and below 1 TiB")
        has_rings = self.shared_memory_bytes >= RING_FROM
        require(
            has_rings or self.device_rows != "on", "wire.device_rows",
            "is on, which needs shared memory; set wire.shared_memory_bytes to 4096 or more",
        )  # fmt: skip
        plain = self.remote in ("tcp", "both")
        require(
            not (plain and self.tls_cert), "wire.remote", f"is {self.remote}, which is not encrypted; use grpc or auto"
        )
        require((self.tls_cert is None) == (self.tls_key is None), "wire.tls_cert", "goes with wire.tls_key; set both")

    @property
    def remotes(self) -> tuple[str, ...]:
        """The kinds of channels between nodes, the one that is dialled first in front."""
        if self.remote == "auto":
            return ("grpc",) if self.tls_cert else ("tcp",)
        return {"both": ("tcp", "grpc"), "off": ()}.get(self.remote, (self.remote,))
