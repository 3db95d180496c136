"""The channels between the actors."""

from __future__ import annotations

from dataclasses import dataclass, field

from moeray.tree import require


@dataclass(frozen=True)
class WireConfig:
    """The data plane. `token` None: read MOERAY_CLUSTER_TOKEN, else one is made for each start.

    `send_timeout_s` bounds one send to a peer that does not read, `handshake_timeout_s` the wait for a peer's proof,
    and `max_channels` the channels that one listener serves at once (of each kind).
    """

    host: str = "127.0.0.1"
    grpc: bool = True
    max_header_bytes: int = 1 << 20
    max_payload_bytes: int = 1 << 30
    shared_memory_bytes: int = 32 << 20
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
        require(0 < self.max_payload_bytes < 1 << 32, "wire.max_payload_bytes", "must be above 0 and below 4 GiB")
        require(0 < self.max_header_bytes < 1 << 32, "wire.max_header_bytes", "must be above 0 and below 4 GiB")
        require((self.tls_cert is None) == (self.tls_key is None), "wire.tls_cert", "goes with wire.tls_key; set both")
