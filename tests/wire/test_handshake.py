"""Who is let in: proofs that cannot be replayed or reflected, and refusals that say why."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

import msgpack
import pytest

from moeray.buffers import aligned
from moeray.errors import AuthenticationError, ChannelClosedError, ChannelTimeoutError, ConfigError, WireError
from moeray.settings.wire import WireConfig
from moeray.types import Address
from moeray.wire.base import UNAUTHENTICATED
from moeray.wire.channel import connect
from moeray.wire.frame import PREFIX, WIRE_VERSION, Frame, Op, decode, encode
from moeray.wire.grpc_dial import dial_grpc
from moeray.wire.guests import MAX_UNAUTHENTICATED
from moeray.wire.handshake import Acceptor, Connector
from tests.wire.support import KINDS, SERVER, SMALL, Host, dial, eventually, identity

CLIENT = identity("router-0")


def greet() -> tuple[Connector, Acceptor, Frame]:
    connector, acceptor = Connector(CLIENT, SERVER), Acceptor(identity())
    return connector, acceptor, acceptor.welcome(connector.hello())


OTHER = WIRE_VERSION + 1


def of_version(version: int) -> bytes:
    """A message as another release of moeray would greet with."""
    header = msgpack.packb([version, "whatever it has"])
    return PREFIX.pack(len(header), 0) + header + bytes(aligned(8 + len(header)) - 8 - len(header))


def test_both_sides_prove_themselves():
    connector, acceptor, welcome = greet()
    assert acceptor.check(connector.prove(welcome)) == "router-0"


def test_a_replayed_proof_fails():
    connector, _, welcome = greet()
    proof = connector.prove(welcome)
    later = Acceptor(identity())
    later.welcome(connector.hello())
    with pytest.raises(AuthenticationError):
        later.check(proof)
    again = Connector(CLIENT, SERVER)
    with pytest.raises(AuthenticationError, match="token"):
        again.prove(welcome)


def test_a_reflected_proof_fails():
    _, acceptor, welcome = greet()
    with pytest.raises(AuthenticationError):
        acceptor.check(Frame(Op.PROOF, meta={"proof": welcome.meta["proof"], "nonce": welcome.meta["nonce"]}))


@pytest.mark.parametrize("meta", [{}, {"proof": 1}, {"proof": b"short"}, {"proof": bytes(32)}])
def test_a_poor_proof_fails(meta):
    _, acceptor, _ = greet()
    with pytest.raises(AuthenticationError):
        acceptor.check(Frame(Op.PROOF, meta=meta))
    with pytest.raises(AuthenticationError):
        Acceptor(identity()).check(Frame(Op.PROOF, meta=meta))


@pytest.mark.parametrize("meta", [{}, {"actor": 5}, {"actor": "a", "fingerprint": "model"}, {"actor": "a" * 600}])
def test_a_poor_greeting_fails(meta):
    with pytest.raises(AuthenticationError):
        Acceptor(identity()).welcome(Frame(Op.HELLO, meta=meta))
    with pytest.raises(AuthenticationError):
        Connector(CLIENT, SERVER).prove(Frame(Op.WELCOME, meta=meta))
    with pytest.raises(AuthenticationError):
        Connector(CLIENT, SERVER).prove(Frame(Op.RESULT, meta=meta))


def test_an_actor_at_anothers_address_is_refused():
    connector, acceptor = Connector(CLIENT, "expert-7"), Acceptor(identity())
    with pytest.raises(AuthenticationError, match="expert-0 answered at the address of expert-7"):
        connector.prove(acceptor.welcome(connector.hello()))


def test_an_empty_token_is_refused():
    with pytest.raises(AuthenticationError, match="MOERAY_CLUSTER_TOKEN"):
        identity(token=b"")


@pytest.mark.parametrize(("other", "named"), [({"token": b"x"}, "token"), ({"fingerprint": "x"}, "another model")])
def test_a_stranger_is_refused_and_others_are_served(host, kind, other, named):
    with pytest.raises(AuthenticationError, match=named):
        host.dial(kind, **other)
    near, far = host.pair(kind)
    near.send(Frame(Op.PING, 1))
    assert far.recv(5.0).id == 1
    assert host.channels.empty()
    near.close()


def test_the_secret_is_not_printed():
    assert "secret" not in repr(identity())


def test_a_listener_of_another_version_is_named(folder):
    path = str(folder / "old.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()

        def answer() -> None:
            sock, _ = listening.accept()
            with sock:
                sock.recv(4096)
                sock.sendall(of_version(OTHER))

        answering = threading.Thread(target=answer)
        answering.start()
        with pytest.raises(AuthenticationError, match=f"version {OTHER}"):
            connect(Address(SERVER, "here", path, None), CLIENT, SMALL, timeout=5.0)
        answering.join()


@contextmanager
def stranger(host: Host, kind: str) -> Iterator[socket.socket]:
    """A socket to the listener, of a peer that goes by no rules."""
    if kind != "grpc":
        with socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET) as sock:
            sock.connect(host.address.unix if kind == "unix" else ("127.0.0.1", int(host.address.tcp.split(":")[1])))
            sock.settimeout(5.0)
            yield sock
        return
    channel = dial_grpc(host.address, SMALL)
    with channel._connection.sock.dup() as sock:
        sock.settimeout(5.0)
        yield sock
    channel.close()


def test_a_connector_of_another_version_is_told_so(host, kind):
    with stranger(host, kind) as sock:
        sock.sendall(of_version(OTHER))
        assert decode(sock.recv(4096), UNAUTHENTICATED).meta == {"reason": "version"}
        assert sock.recv(1) == b""
    host.dial(kind).close()


def test_one_who_begins_with_something_else_is_told_so(host, kind):
    with stranger(host, kind) as sock:
        sock.sendall(b"".join(encode(Frame(Op.PROOF, meta={"nonce": bytes(32)}), UNAUTHENTICATED)))
        assert decode(sock.recv(4096), UNAUTHENTICATED).meta == {"reason": "greeting"}
        assert sock.recv(1) == b""
    assert host.channels.empty()
    host.dial(kind).close()


@pytest.mark.parametrize("data", [struct.pack("<II", 5000, 0), struct.pack("<II", 50, 64), b"GET / HTTP/1.1\r\n\r\n"])
def test_an_unproven_peer_gets_tiny_limits(host, kind, data):
    with stranger(host, kind) as sock:
        sock.sendall(data)
        with suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    assert host.channels.empty()
    host.dial(kind).close()


def test_what_an_unproven_peer_sends_on_is_not_kept(host, kind):
    """It is cut off, however much it has sent by then."""
    with stranger(host, kind) as sock, suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(of_version(OTHER))
        for _ in range(1000):
            sock.sendall(bytes(1 << 20))
        raise AssertionError("the listener took it all")
    host.dial(kind).close()


def test_silent_peers_are_dropped_and_bounded(folder, kind):
    host = Host(folder, WireConfig(handshake_timeout_s=0.5))
    with ExitStack() as stack:
        silent = [stack.enter_context(stranger(host, kind)) for _ in range(MAX_UNAUTHENTICATED + 8)]
        for sock in silent:  # the first are dropped at the deadline, those over the bound at once
            assert sock.recv(1) == b""
    near, _ = host.pair(kind)
    near.close()
    host.close()


def test_a_listener_that_closes_waits_for_no_silent_peer(folder, kind):
    host = Host(folder, WireConfig(handshake_timeout_s=60.0))
    with stranger(host, kind) as sock:
        assert eventually(lambda: any(thread.name == f"wire-{kind}-greeting" for thread in threading.enumerate()))
        host.close()
        assert sock.recv(1) == b""


def test_descriptors_from_an_unproven_peer_are_not_kept(host):
    before = len(os.listdir("/proc/self/fd"))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5.0)
        sock.connect(host.address.unix)
        socket.send_fds(sock, [of_version(OTHER)], [0, 0, 0])
        sock.recv(4096)
    assert eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_a_full_listener_says_so(folder, kind):
    host = Host(folder, WireConfig(max_channels=2))
    pairs = [host.pair(kind) for _ in range(2)]
    with pytest.raises(ChannelClosedError, match=r"wire\.max_channels"):
        host.dial(kind)
    pairs[0][0].close()
    host.close()
    for near, _ in pairs:
        near.close()


@pytest.mark.parametrize("chosen", KINDS)
def test_nobody_there_is_a_closed_channel(folder, chosen):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ChannelClosedError, match=SERVER):
            dial(Address(SERVER, "here", str(folder / "no.sock"), port, port), CLIENT, SMALL, chosen)


@pytest.mark.parametrize(
    ("node", "remote", "named"),
    [
        ("here", "auto", "unix socket"),
        ("there", "auto", r"\(tcp\); set wire\.remote alike"),
        ("there", "grpc", r"\(grpc\); set wire\.remote alike"),
        ("there", "off", r"wire\.remote is off"),
    ],
)
def test_a_missing_way_is_named(node, remote, named):
    with pytest.raises(WireError, match=named):
        connect(Address(SERVER, node, None), CLIENT, WireConfig(remote=remote), timeout=1.0)


def test_of_two_ways_tcp_is_dialled_first(host):
    me = identity("router-0", "there")
    channel = connect(host.address, me, host.wire, timeout=5.0)
    assert channel.kind == "tcp"
    channel.close()


def test_what_is_to_be_encrypted_goes_by_grpc():
    wire = WireConfig(tls_cert="cert.pem", tls_key="key.pem")
    assert wire.remotes == ("grpc",)
    for remote in ("tcp", "both"):
        with pytest.raises(ConfigError, match=r"wire\.remote.* not encrypted"):
            replace(wire, remote=remote)


@pytest.mark.parametrize("chosen", KINDS)
def test_a_listener_that_never_answers_is_a_timeout(folder, chosen):
    family = socket.AF_UNIX if chosen == "unix" else socket.AF_INET
    with socket.socket(family) as listening:
        listening.bind(str(folder / "mute.sock") if chosen == "unix" else ("127.0.0.1", 0))
        listening.listen()
        port = None if chosen == "unix" else f"127.0.0.1:{listening.getsockname()[1]}"
        address = Address(SERVER, "here", str(folder / "mute.sock"), port, port)
        with pytest.raises((ChannelTimeoutError, ChannelClosedError)):
            dial(address, CLIENT, SMALL, chosen, timeout=0.5)
