"""The listener: a private socket, its neighbours' sockets, TLS, and handlers that fail."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from moeray.errors import ChannelClosedError, ConfigError, WireError
from moeray.settings.wire import WireConfig
from moeray.wire import grpc_dial
from moeray.wire.channel import Listener, connect
from moeray.wire.frame import Frame, Op
from moeray.wire.grpc_loop import StreamLoop
from moeray.wire.own_address import only_address
from tests.threads import refuse_one
from tests.wire.support import SMALL, Host, dial, echo, identity

UNIX_ONLY = replace(SMALL, remote="off")

# Made for this test alone, for 127.0.0.1; it protects nothing.
OTHER_AUTHORITY = """-----BEGIN CERTIFICATE-----
MIIBfDCCASGgAwIBAgIUXDmFgJXTVybqF6HY7oAFjkjJC/wwCgYIKoZIzj0EAwIw
EjEQMA4GA1UEAwwHYW5vdGhlcjAgFw0yNjEyMDEwMTAyMzlaGA8yMTI2MTEwNzAx
MDIzOVowEjEQMA4GA1UEAwwHYW5vdGhlcjBZMBMGByqGSM49AgEGCCqGSM49AwEH
A0IABGaZnht34EnFkdBHeG2/cswbqF1JUBeLOsl4PF+z6pFOO4COLA15WcZGJuKj
efkuWCom4rebd3iiWCgubsvQvMWjUzBRMB0GA1UdDgQWBBRDiy+pREBmatV1XRDU
3zBiQde6mjAfBgNVHSMEGDAWgBRDiy+pREBmatV1XRDU3zBiQde6mjAPBgNVHRMB
Af8EBTADAQH/MAoGCCqGSM49BAMCA0kAMEYCIQCS/ltkHvRLiswcoiUHx73YNXAg
fS2LYLLrb9QQWIFV4QIhAOhGRREeOt9TjG8HmFdg9ZgtfAEUVT8jxkELmcqEQXHH
-----END CERTIFICATE-----
"""
CERT = """\
-----BEGIN CERTIFICATE-----
MIIBlDCCATqgAwIBAgIUdYoK8LUYuBGxUhv0JM7pknnQ88swCgYIKoZIzj0EAwIw
FjEUMBIGA1UEAwwLbW9lcmF5LXRlc3QwIBcNMjYxMTI0MDE0NDUyWhgPMjEyNjEw
MzEwMTQ0NTJaMBYxFDASBgNVBAMMC21vZXJheS10ZXN0MFkwEwYHKoZIzj0CAQYI
KoZIzj0DAQcDQgAEe5jhtJ+17LPzAdsba8MnxOcwy7JqYYlKb7+JFTxAFfn+3RZl
ZZTnu9NU1/UyacuLOCE+lAQFrbh2Ai+hpdLjR6NkMGIwHQYDVR0OBBYEFEdfTGIl
JR5MT+MXc5YjIFTalEe2MB8GA1UdIwQYMBaAFEdfTGIlJR5MT+MXc5YjIFTalEe2
MA8GA1UdEQQIMAaHBH8AAAEwDwYDVR0TAQH/BAUwAwEB/zAKBggqhkjOPQQDAgNI
ADBFAiB13pJKazIGTmUWOKVCc+AOKSTqFqiKCP3ea60ovrl0/AIhAK2DZfwVknAm
L1Uf9xSeXRxsnaErhjBUzuMgSKpOf2iM
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgOSeIxnLfTqQgN84/
/ifpDOXDd99/vsmScH/ARcBfaqShRANCAAR7mOG0n7Xss/MB2xtrwyfE5zDLsmph
iUpvv4kVPEAV+f7dFmVllOe701TX9TJpy4s4IT6UBAWtuHYCL6Gl0uNH
-----END PRIVATE KEY-----
"""


def listener(folder: Path, wire: WireConfig = UNIX_ONLY) -> Listener:
    return Listener(identity(), wire, echo, folder)


def test_the_socket_and_its_folder_are_private(folder):
    mine = listener(folder / "run")
    address = mine.start()
    assert stat.S_IMODE(os.stat(address.unix).st_mode) == 0o600
    assert stat.S_IMODE((folder / "run").stat().st_mode) == 0o700
    assert (address.tcp, address.grpc) == (None, None)
    mine.close(5.0)
    assert not Path(address.unix).exists()
    mine.close(5.0)


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_an_open_folder_is_refused(folder, mode):
    folder.chmod(mode)
    with pytest.raises(WireError, match="chmod 700"):
        listener(folder).start()
    folder.chmod(0o700)


def test_a_link_in_place_of_the_folder_is_refused(folder):
    (folder / "real").mkdir(mode=0o700)
    (folder / "link").symlink_to(folder / "real")
    with pytest.raises(WireError, match="not a folder"):
        listener(folder / "link").start()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(folder):
    (folder / "theirs").mkdir(mode=0o700)
    os.chown(folder / "theirs", 12345, 12345)
    with pytest.raises(WireError, match="belongs to user 12345"):
        listener(folder / "theirs").start()


def test_too_long_a_path_is_named(folder):
    with pytest.raises(WireError, match="limit is 107"):
        listener(folder / ("x" * 100)).start()


def test_the_socket_of_a_dead_process_is_replaced(folder):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "expert-0.sock"))
    mine = listener(folder)
    address = mine.start()
    connect(address, identity("router-0"), UNIX_ONLY, timeout=5.0).close()
    mine.close(5.0)


def test_a_live_neighbour_is_not_replaced(folder):
    first, second = listener(folder), listener(folder)
    address = first.start()
    with pytest.raises(WireError, match="another live actor"):
        second.start()
    second.close(1.0)
    connect(address, identity("router-0"), UNIX_ONLY, timeout=5.0).close()
    first.close(5.0)


def test_a_file_in_the_way_is_not_removed(folder):
    (folder / "expert-0.sock").write_text("mine")
    with pytest.raises(WireError, match="not a socket"):
        listener(folder).start()
    assert (folder / "expert-0.sock").read_text() == "mine"


def test_a_successors_socket_is_left_alone(folder):
    first = listener(folder)
    path = Path(first.start().unix)
    path.unlink()
    second = listener(folder)
    address = second.start()
    first.close(5.0)
    connect(address, identity("router-0"), UNIX_ONLY, timeout=5.0).close()
    second.close(5.0)


@pytest.mark.parametrize("removed", [".", "run", "run/expert-0.sock"])
def test_a_socket_that_somebody_removed_is_there_again(folder, removed):
    mine = listener(folder / "base" / "run")
    address = mine.start()
    first = connect(address, identity("router-0"), UNIX_ONLY, timeout=5.0)
    mine.renew()
    path = folder / "base" / removed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ChannelClosedError):
        connect(address, identity("router-1"), UNIX_ONLY, timeout=5.0)
    mine.renew()
    second = connect(address, identity("router-1"), UNIX_ONLY, timeout=5.0)
    assert stat.S_IMODE((folder / "base").stat().st_mode) == 0o700
    for channel in (first, second):
        channel.send(Frame(Op.PING, 3))
        assert channel.recv(5.0).id == 3
        channel.close()
    mine.close(5.0)
    mine.renew()
    assert not list((folder / "base" / "run").iterdir())


def test_a_folder_that_cannot_be_made_again_is_named(folder):
    mine = listener(folder / "run")
    mine.start()
    shutil.rmtree(folder / "run")
    (folder / "run").write_text("in the way")
    with pytest.raises(WireError, match="is not a folder"):
        mine.renew()
    mine.close(5.0)


def test_a_handler_that_fails_ends_only_its_channel(folder, kind, caplog):
    calls = threading.Semaphore(0)

    def handler(channel) -> None:
        if channel.recv(5.0).op is Op.ABORT:
            raise KeyError("a fault of the handler")
        calls.release()

    mine = Listener(identity(), SMALL, handler, folder)
    address = mine.start()
    bad, good = (dial(address, identity("router-0"), SMALL, kind) for _ in range(2))
    bad.send(Frame(Op.ABORT))
    with pytest.raises(ChannelClosedError):
        bad.recv(5.0)
    good.send(Frame(Op.PING))
    assert calls.acquire(timeout=5.0)
    assert "router-0 failed" in caplog.text
    for channel in (bad, good):
        channel.close()
    mine.close(10.0)


def test_a_peer_for_which_there_is_no_thread_is_turned_away_alone(folder, kind, monkeypatch):
    mine = Listener(identity(), SMALL, lambda channel: channel.recv(5.0), folder)
    address = mine.start()
    refuse_one(monkeypatch, lambda name: name.endswith("greeting"))
    with pytest.raises(WireError):
        dial(address, identity("router-0"), SMALL, kind, timeout=5.0)
    dial(address, identity("router-0"), SMALL, kind).close()
    mine.close(10.0)


def test_no_thread_for_grpc_is_no_channel_this_time(folder, monkeypatch):
    mine = Listener(identity(), SMALL, lambda channel: channel.recv(5.0), folder)
    address = mine.start()
    monkeypatch.setattr(grpc_dial, "STREAMS", StreamLoop())  # as in a process that has no stream yet
    refuse_one(monkeypatch, lambda name: name == "wire-grpc")
    with pytest.raises(WireError):
        dial(address, identity("router-0"), SMALL, "grpc")
    dial(address, identity("router-0"), SMALL, "grpc").close()
    mine.close(10.0)


def test_a_handler_runs_in_a_named_thread(folder, kind):
    names = []

    def handler(channel) -> None:
        names.append(threading.current_thread().name)
        channel.send(Frame(Op.PONG))

    mine = Listener(identity(), SMALL, handler, folder)
    channel = dial(mine.start(), identity("router-0"), SMALL, kind)
    assert channel.recv(5.0).op is Op.PONG
    assert names == [f"wire-{kind}-router-0"]
    channel.close()
    mine.close(10.0)


def test_a_handler_that_does_not_end_is_named(folder):
    entered, end = threading.Event(), threading.Event()

    def handler(channel) -> None:
        entered.set()
        end.wait()

    mine = Listener(identity(), UNIX_ONLY, handler, folder)
    channel = connect(mine.start(), identity("router-0"), UNIX_ONLY, timeout=5.0)
    assert entered.wait(5.0)
    with pytest.raises(WireError, match="wire-unix-router-0 did not end"):
        mine.close(0.1)
    end.set()
    channel.close()


def test_a_host_that_is_not_ours_is_named(folder):
    with pytest.raises(WireError, match=r"wire\.host 192\.0\.2\.7"):
        listener(folder, replace(SMALL, host="192.0.2.7")).start()
    assert not list(folder.iterdir())


@pytest.mark.parametrize("chosen", ["tcp", "grpc"])
def test_a_host_for_all_addresses_is_one_that_others_can_dial(folder, chosen):
    """On a machine without any network, too."""
    host = Host(folder, replace(SMALL, host="0.0.0.0"))
    try:
        assert not (getattr(host.address, chosen) or "").startswith("0.0.0.0")
        for end in host.pair(chosen):
            end.close()
    finally:
        host.close()


@pytest.mark.parametrize(
    ("addresses", "one"),
    [
        (["127.0.0.1"], "127.0.0.1"),
        (["127.0.0.1", "10.0.0.7"], "10.0.0.7"),
        (["::1", "fe80::1%eth0", "2001:db8::7"], "2001:db8::7"),
    ],
)
def test_the_address_of_a_machine_without_a_default_route(addresses, one):
    assert only_address("0.0.0.0", addresses) == one


@pytest.mark.parametrize(
    ("addresses", "words"), [(["127.0.0.1", "10.0.0.7", "172.17.0.1"], "10.0.0.7, 172.17.0.1"), ([], "no such address")]
)
def test_a_machine_without_a_default_route_that_may_have_any_address(addresses, words):
    with pytest.raises(WireError, match=rf"wire\.host 0\.0\.0\.0: .*{words}.*; set wire\.host"):
        only_address("0.0.0.0", addresses)


@pytest.fixture
def tls(folder) -> WireConfig:
    (folder / "cert.pem").write_text(CERT)
    (folder / "key.pem").write_text(KEY)
    return replace(SMALL, remote="auto", tls_cert=str(folder / "cert.pem"), tls_key=str(folder / "key.pem"))


@pytest.mark.parametrize("mutual", [False, True])
def test_tls(folder, tls, mutual):
    wire = replace(tls, tls_ca=tls.tls_cert) if mutual else tls
    host = Host(folder, wire)
    near, far = host.pair("grpc")
    near.send(Frame(Op.PING, 3))
    assert far.recv(5.0).id == 3
    assert host.address.tcp is None
    host.wire = SMALL
    with pytest.raises(ChannelClosedError):
        host.dial("grpc")  # in the clear
    near.close()
    host.close()


def test_a_certificate_of_another_authority_is_named(folder, tls):
    (folder / "other.pem").write_text(OTHER_AUTHORITY)
    host = Host(folder, tls)
    host.wire = replace(tls, tls_ca=str(folder / "other.pem"))
    with pytest.raises(ChannelClosedError, match=r"TLS handshake failed: CERTIFICATE_VERIFY_FAILED.*wire\.tls_cert"):
        host.dial("grpc")
    host.close()


def test_a_missing_tls_file_is_named(folder, tls):
    with pytest.raises(ConfigError, match="tls_key"):
        listener(folder, replace(tls, tls_key=str(folder / "no.pem"))).start()


def test_tls_files_that_are_none_are_named(folder, tls):
    (folder / "text.pem").write_text("no certificate")
    text = str(folder / "text.pem")
    with pytest.raises(ConfigError, match=r"tls_cert: .*text\.pem and .*key\.pem are no certificate and its key"):
        listener(folder, replace(tls, tls_cert=text)).start()
    with pytest.raises(ConfigError, match=r"tls_ca: .*text\.pem holds no certificate"):
        listener(folder, replace(tls, tls_ca=text)).start()
