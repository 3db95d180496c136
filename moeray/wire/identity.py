"""Who speaks on a channel. Imports nothing heavy: what only asks the controller needs no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from moeray.errors import AuthenticationError


@dataclass(frozen=True)
class Identity:
    """Who speaks: `fingerprint` names the model that it serves, `token` is the cluster's secret."""

    actor_id: str
    node_id: str
    fingerprint: str
    token: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not self.token:
            raise AuthenticationError("the cluster token is empty; set wire.token or MOERAY_CLUSTER_TOKEN")
