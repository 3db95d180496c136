"""Both ends of a gRPC channel's beginning: the dialling side, and the server that a listener owns."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from time import monotonic
from typing import Any

import grpc
import psutil

from moeray.errors import AuthenticationError, ChannelClosedError, ChannelTimeoutError, WireError
from moeray.settings.wire import WireConfig
from moeray.types import Address
from moeray.wire.base import UNAUTHENTICATED
from moeray.wire.frame import Frame, Op, VersionMismatchError, decode, encode
from moeray.wire.grpc_stream import (
    FRAME_KEY,
    GREET,
    SERVICE,
    STREAM,
    GrpcChannel,
    describe,
    options,
    read_pem,
    stop_quietly,
)
from moeray.wire.guests import MAX_UNAUTHENTICATED, Guests
from moeray.wire.handshake import Acceptor, Connector, reason_of, refusal
from moeray.wire.identity import Identity

_log = logging.getLogger(__name__)


def _pack(frame: Frame) -> bytes:
    return b"".join(encode(frame, UNAUTHENTICATED))


def _frame_in(metadata: Any) -> Frame:
    for key, value in metadata or ():
        if key == FRAME_KEY:
            return decode(value, UNAUTHENTICATED)
    raise AuthenticationError("the peer's call carries no greeting; is another program speaking on this port?")


def connect_grpc(address: Address, identity: Identity, wire: WireConfig, timeout: float) -> GrpcChannel:
    """A proven channel to the actor that listens at `address.grpc`.

    Raises AuthenticationError, ChannelClosedError where nobody listens, ChannelTimeoutError.
    """
    assert address.grpc is not None
    deadline = monotonic() + timeout
    connection = _dial(address.grpc, wire)
    try:
        connector = Connector(identity, address.actor_id)
        proof = connector.prove(_greet(connection, connector, deadline))
        return _open(connection, _pack(proof), GrpcChannel(address.actor_id, wire), deadline)
    except BaseException:
        connection.close()
        raise


def _dial(target: str, wire: WireConfig) -> Any:
    if wire.tls_cert is None:
        return grpc.insecure_channel(target, options(wire, server=False))
    cert, key = read_pem(wire.tls_cert, "tls_cert"), read_pem(wire.tls_key, "tls_key")
    authority = read_pem(wire.tls_ca, "tls_ca")
    # Without an authority of its own a cluster shares one certificate, which vouches for itself.
    credentials = grpc.ssl_channel_credentials(authority or cert, key, cert)
    return grpc.secure_channel(target, credentials, options(wire, server=False))


def _greet(connection: Any, connector: Connector, deadline: float) -> Frame:
    greet = connection.stream_stream(f"/{SERVICE}/{GREET}")
    metadata = ((FRAME_KEY, _pack(connector.hello())),)
    call = greet(iter(()), metadata=metadata, timeout=max(deadline - monotonic(), 1e-3))
    peer = connector.expected
    try:
        for _ in call:
            raise AuthenticationError(f"{peer} answered HELLO with data; is another program on its port?")
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise ChannelTimeoutError(f"{peer} did not answer HELLO in time; is it stopped?") from error
        raise ChannelClosedError(f"{peer} does not answer ({describe(error)}); it is gone or not started") from error
    try:
        return _frame_in(call.initial_metadata())
    except VersionMismatchError as error:
        raise AuthenticationError(str(error)) from error


def _open(connection: Any, proof: bytes, channel: GrpcChannel, deadline: float) -> GrpcChannel:
    stream = connection.stream_stream(f"/{SERVICE}/{STREAM}")
    call = stream(channel.outgoing(), metadata=((FRAME_KEY, proof),))
    reader = threading.Thread(target=channel.pump, args=(call,), name=f"wire-grpc-read-{channel.peer}", daemon=True)
    reader.start()

    def finish() -> None:
        if not channel.ended():
            stop_quietly(call.cancel)
        reader.join()
        connection.close()

    channel.on_close(finish)
    try:
        # The server's first message says that the proof was taken.
        if decode(channel.next_message(deadline - monotonic()), UNAUTHENTICATED).op is not Op.WELCOME:
            raise WireError(f"{channel.peer} did not confirm the channel; run one release of moeray everywhere")
    except BaseException:
        stop_quietly(call.cancel)
        channel.close()
        raise
    return channel


class GrpcServer:
    """Accepts channels at `wire.host` and hands them to `guests`."""

    def __init__(self, identity: Identity, wire: WireConfig, guests: Guests) -> None:
        self._identity = identity
        self._wire = wire
        self._guests = guests
        self._lock = threading.Lock()
        # Who was greeted and has not proven itself yet, by our nonce: each is good for one try, for a while.
        self._greeted: dict[bytes, tuple[Acceptor, float]] = {}
        self._pool = ThreadPoolExecutor(wire.max_channels + 8, thread_name_prefix=f"wire-grpc-{identity.actor_id}")
        self._server: Any = None

    def start(self) -> str:
        """Listen; returns `host:port` as others reach it. Raises WireError where the host is not this machine's."""
        self._server = grpc.server(
            self._pool,
            options=options(self._wire, server=True),
            maximum_concurrent_rpcs=self._wire.max_channels + 8,
        )
        handlers = {
            GREET: grpc.stream_stream_rpc_method_handler(self._greet),
            STREAM: grpc.stream_stream_rpc_method_handler(self._stream),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            port = self._bind(f"{_bracketed(self._wire.host)}:0")
        except RuntimeError as error:
            self._pool.shutdown()
            raise WireError(f"cannot listen at wire.host {self._wire.host}; name an address of this machine") from error
        self._server.start()
        return f"{_bracketed(_reachable(self._wire.host))}:{port}"

    def _bind(self, target: str) -> int:
        wire = self._wire
        if wire.tls_cert is None:
            return int(self._server.add_insecure_port(target))
        pair = (read_pem(wire.tls_key, "tls_key"), read_pem(wire.tls_cert, "tls_cert"))
        authority = read_pem(wire.tls_ca, "tls_ca")
        credentials = grpc.ssl_server_credentials([pair], authority, authority is not None)
        return int(self._server.add_secure_port(target, credentials))

    def _greet(self, messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        context.send_initial_metadata(((FRAME_KEY, _pack(self._answer(context))),))
        return iter(())

    def _answer(self, context: Any) -> Frame:
        acceptor = Acceptor(self._identity)
        try:
            welcome = acceptor.welcome(_frame_in(context.invocation_metadata()))
        except WireError as error:
            _log.warning("refused a peer at %s: %s", context.peer(), error)
            return refusal(reason_of(error))
        if self._guests.full() or not self._remember(acceptor):
            return refusal("full")
        return welcome

    def _remember(self, acceptor: Acceptor) -> bool:
        now = monotonic()
        with self._lock:
            for nonce in [nonce for nonce, (_, until) in self._greeted.items() if until < now]:
                del self._greeted[nonce]
            if len(self._greeted) >= MAX_UNAUTHENTICATED:
                return False
            self._greeted[acceptor.nonce] = (acceptor, now + self._wire.handshake_timeout_s)
            return True

    def _check(self, context: Any) -> str:
        proof = _frame_in(context.invocation_metadata())
        nonce = proof.meta.get("nonce")
        with self._lock:
            acceptor, until = self._greeted.pop(nonce if type(nonce) is bytes else b"", (None, 0.0))
        if acceptor is None or until < monotonic():
            raise AuthenticationError("a peer sent a PROOF without a greeting, or too late")
        return acceptor.check(proof)

    def _stream(self, messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        try:
            peer = self._check(context)
        except WireError as error:
            _log.warning("refused a peer at %s: %s", context.peer(), error)
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no proof of the cluster token")
        channel = GrpcChannel(peer, self._wire)
        gone = threading.Event()

        def finish() -> None:
            if not gone.wait(1.0):
                stop_quietly(context.cancel)

        channel.on_close(finish)
        name = f"wire-grpc-{peer}-{secrets.token_hex(2)}"
        if not self._guests.spawn(f"{name}-read", lambda: channel.pump(messages)):
            context.abort(grpc.StatusCode.UNAVAILABLE, "the listener closes")
        try:
            yield _pack(Frame(Op.WELCOME))
            self._guests.spawn(name, lambda: self._guests.serve(channel))
            yield from channel.outgoing()
        finally:
            gone.set()

    def close(self, deadline: float) -> list[str]:
        """End all calls and join gRPC's threads; the name of what still runs at the deadline."""
        stopped = self._server.stop(None)
        if not stopped.wait(max(0.0, deadline - monotonic())):
            return ["the gRPC server"]
        self._pool.shutdown()
        return []


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _reachable(host: str) -> str:
    """The address that others dial: `host`, or for a wildcard the one that this machine's route outside has, and where
    there is no such route, the only one that it has."""
    if host not in ("0.0.0.0", "::", "[::]"):
        return host
    family = socket.AF_INET if host == "0.0.0.0" else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1" if family == socket.AF_INET else "2001:db8::1", 9))  # sends nothing
        except OSError:
            return only_address(host, _addresses(family))
        return str(probe.getsockname()[0])


def _addresses(family: socket.AddressFamily) -> list[str]:
    """Of this machine's interfaces that are up."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = psutil.net_if_addrs().items()
    return [entry.address for name, entries in found if name in up for entry in entries if entry.family == family]


def only_address(host: str, addresses: Sequence[str]) -> str:
    """The address by which others reach a machine without a route outside; without any network that is the loopback's,
    since all others are on it, too. Raises WireError where several may be meant."""
    known = [ip_address(address.partition("%")[0]) for address in addresses]
    outside = [str(ip) for ip in known if not ip.is_loopback and not ip.is_link_local]
    if len(outside) > 1:
        which = f"no default route tells by which of {', '.join(outside)} others reach this machine"
        raise WireError(f"wire.host {host}: {which}; set wire.host to that one")
    if not known:
        raise WireError(f"wire.host {host}: this machine has no such address; set wire.host to one that it has")
    return outside[0] if outside else str(known[0])
