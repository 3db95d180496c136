"""Who may speak: three frames of challenge and response, without input or output of their own.

    connector                                   acceptor
    HELLO   fingerprint, actor, nonce     ->
                                          <-    WELCOME fingerprint, actor, nonce, proof    (or ERROR reason)
    PROOF   nonce (the acceptor's), proof ->

A proof is an HMAC-SHA256 by the cluster token over the prover's role and everything that both sides said, both nonces
included: it cannot be replayed in another handshake nor reflected to its maker. The version is in every frame's header.

Both greetings say whether their side has a device whose memory rows may lie in (`devices`). That is no part of the
proof: it only says what the two speak of next (`device_greeting.py`), after it.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack

from moeray.errors import AuthenticationError, ChannelClosedError, WireError
from moeray.wire.frame import WIRE_VERSION, Frame, Op, VersionMismatchError
from moeray.wire.identity import Identity

NONCE_BYTES = 32
CONNECTOR = "connector"
ACCEPTOR = "acceptor"

_TOKEN_MEND = "give both sides the same MOERAY_CLUSTER_TOKEN (wire.token)"


class OtherModelError(AuthenticationError):
    """The peer's model fingerprint is not this side's."""


def _proof(token: bytes, role: str, said: list[Any]) -> bytes:
    # msgpack writes each part with its length, so no two transcripts have the same bytes.
    transcript: bytes = msgpack.packb(["moeray wire", WIRE_VERSION, role, *said])
    return hmac.digest(token, transcript, "sha256")


def _devices(has: bool) -> dict[str, bool]:
    return {"devices": True} if has else {}


def _text(meta: Mapping[str, Any], key: str) -> str:
    value = meta.get(key)
    if type(value) is not str or len(value) > 512:
        raise AuthenticationError(f"the peer's greeting has no {key}; is another program speaking on this channel?")
    return value


def _bytes(meta: Mapping[str, Any], key: str) -> bytes:
    value = meta.get(key)
    if type(value) is not bytes or len(value) != NONCE_BYTES:
        raise AuthenticationError(f"the peer's greeting has no {key}; is another program speaking on this channel?")
    return value


@dataclass
class Connector:
    """The side that dials `expected`, an actor id. `peer_has_devices`: what its WELCOME has said."""

    identity: Identity
    expected: str
    nonce: bytes = field(default_factory=lambda: secrets.token_bytes(NONCE_BYTES))
    devices: bool = False
    peer_has_devices: bool = False

    def hello(self) -> Frame:
        """The first frame."""
        me = self.identity
        meta = {"actor": me.actor_id, "fingerprint": me.fingerprint, "nonce": self.nonce}
        return Frame(Op.HELLO, meta=meta | _devices(self.devices))

    def prove(self, reply: Frame) -> Frame:
        """The PROOF that answers a WELCOME. Raises AuthenticationError, ChannelClosedError for a full peer."""
        if reply.op is Op.ERROR:
            raise refused(self.expected, reply)
        if reply.op is not Op.WELCOME:
            raise AuthenticationError(f"{self.expected} answered HELLO with {reply.op.name}; {_TOKEN_MEND}")
        actor, fingerprint = _text(reply.meta, "actor"), _text(reply.meta, "fingerprint")
        nonce, proof = _bytes(reply.meta, "nonce"), _bytes(reply.meta, "proof")
        me = self.identity
        said = [me.actor_id, me.fingerprint, self.nonce, actor, fingerprint, nonce]
        if not hmac.compare_digest(proof, _proof(me.token, ACCEPTOR, said)):
            raise AuthenticationError(f"{self.expected} does not hold this cluster's token; {_TOKEN_MEND}")
        if actor != self.expected:
            raise AuthenticationError(f"{actor} answered at the address of {self.expected}; refresh the placement")
        if fingerprint != me.fingerprint:
            raise _other_model(self.expected)
        self.peer_has_devices = reply.meta.get("devices") is True
        return Frame(Op.PROOF, meta={"nonce": nonce, "proof": _proof(me.token, CONNECTOR, said)})


@dataclass
class Acceptor:
    """The side that listens. `peer` is the connector's actor id once `check` has returned it; `peer_has_devices`: what
    its HELLO has said."""

    identity: Identity
    nonce: bytes = field(default_factory=lambda: secrets.token_bytes(NONCE_BYTES))
    said: list[Any] = field(default_factory=list)
    devices: bool = False
    peer_has_devices: bool = False

    def welcome(self, hello: Frame) -> Frame:
        """The WELCOME that answers a HELLO. Raises AuthenticationError."""
        if hello.op is not Op.HELLO:
            raise AuthenticationError(f"the peer began with {hello.op.name} instead of HELLO")
        actor, fingerprint = _text(hello.meta, "actor"), _text(hello.meta, "fingerprint")
        if fingerprint != self.identity.fingerprint:
            raise _other_model(actor)
        me = self.identity
        self.said = [actor, fingerprint, _bytes(hello.meta, "nonce"), me.actor_id, me.fingerprint, self.nonce]
        meta = {
            "actor": me.actor_id,
            "fingerprint": me.fingerprint,
            "nonce": self.nonce,
            "proof": _proof(me.token, ACCEPTOR, self.said),
        }
        self.peer_has_devices = hello.meta.get("devices") is True
        return Frame(Op.WELCOME, meta=meta | _devices(self.devices))

    def check(self, proof: Frame) -> str:
        """The connector's actor id, if its PROOF holds. Raises AuthenticationError."""
        if proof.op is not Op.PROOF or not self.said:
            raise AuthenticationError(f"the peer sent {proof.op.name} instead of PROOF")
        if not hmac.compare_digest(_bytes(proof.meta, "proof"), _proof(self.identity.token, CONNECTOR, self.said)):
            raise AuthenticationError(f"the peer that calls itself {self.said[0]} has no proof of the token")
        return str(self.said[0])


def _other_model(actor: str) -> OtherModelError:
    return OtherModelError(f"{actor} serves another model or revision; start both sides from one checkpoint")


def refusal(reason: str) -> Frame:
    """What an acceptor answers to a greeting that it does not take: `version`, `model`, `full` or `greeting`."""
    return Frame(Op.ERROR, meta={"reason": reason})


def reason_of(error: WireError) -> str:
    """The `refusal` reason that names an acceptor's error."""
    if isinstance(error, VersionMismatchError):
        return "version"
    return "model" if isinstance(error, OtherModelError) else "greeting"


def refused(actor: str, reply: Frame) -> WireError:
    """The connecting side's error for a refusal. The text is ours: an unproven peer does not write our messages."""
    match reply.meta.get("reason"):
        case "model":
            return _other_model(actor)
        case "full":
            return ChannelClosedError(f"{actor} serves as many channels as it may; raise wire.max_channels there")
        case _:
            return AuthenticationError(
                f"{actor} did not take this side's greeting; run one release of moeray everywhere"
            )
