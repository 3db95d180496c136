"""The endpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

from moeray.tree import require


@dataclass(frozen=True)
class ServeConfig:
    """The endpoint. `api_key` None: read MOERAY_API_KEY; without one the endpoint is open.

    `wait_for_system`: Serve counts a replica as started once the system is ready, so that a rolling update waits for
    it; without it a replica answers as soon as there is a controller, with 503 while the system loads. Requests that
    come while there is no replica at all are held back by Serve until there is one.
    `stream_interval`: tokens in one event of a stream. The first token comes at once in every case; more in an event
    cost the endpoint and the client less, and come less smoothly.
    `allowed_origins`: whose pages may ask the endpoint from a browser (CORS); `*` is everybody's.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = "moeray"
    model_name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    replicas: int = 1
    max_body_bytes: int = 4 << 20
    request_timeout_s: float = 600.0
    wait_for_system: bool = False
    stream_interval: int = 1
    allowed_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, "serve.port", f"must be between 0 and 65535, got {self.port}")
        require(self.replicas >= 1, "serve.replicas", f"must be at least 1, got {self.replicas}")
        require(
            self.api_key is None or self.api_key.strip() != "",
            "serve.api_key",
            "must not be empty: set MOERAY_API_KEY to a key, or unset it to leave the endpoint open",
        )
        require(
            self.api_key is None or self.api_key == self.api_key.strip(),
            "serve.api_key",
            "begins or ends with white space, which no request can carry: leave that out",
        )
        for origin in self.allowed_origins:
            require(
                origin == "*" or (origin.startswith(("http://", "https://")) and not origin.endswith("/")),
                "serve.allowed_origins",
                f"must be '*' or origins such as https://example.org, got {origin!r}",
            )
        require(self.request_timeout_s > 0, "serve.request_timeout_s", "must be above 0 seconds")
        require(self.stream_interval >= 1, "serve.stream_interval", "must be at least 1 token")
        require(self.max_body_bytes >= 1024, "serve.max_body_bytes", "must be at least 1024")
