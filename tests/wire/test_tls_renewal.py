"""TLS files that are replaced while nodes speak: new connections go by the new ones, those that are there go on."""

from __future__ import annotations

import datetime
import logging
import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from moeray.errors import ChannelClosedError
from moeray.settings.wire import WireConfig
from moeray.wire.frame import Frame, Op
from moeray.wire.tls import CredentialFiles
from tests.wire.support import SMALL, Host

FILES = ("cert.pem", "key.pem", "ca.pem")


class Authority:
    """Signs certificates for this machine."""

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self._own = self._build(self._name, self._key, authority=True)

    def issue(self) -> dict[str, bytes]:
        """A new certificate and its key, with the authority's: the contents of FILES by name."""
        key = ec.generate_private_key(ec.SECP256R1())
        cert = self._build(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "node")]), key, authority=False)
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return dict(
            zip(FILES, (cert.public_bytes(Encoding.PEM), secret, self._own.public_bytes(Encoding.PEM)), strict=True)
        )

    def _build(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, authority: bool) -> x509.Certificate:
        now, hour = datetime.datetime.now(datetime.UTC), datetime.timedelta(hours=1)
        return (
            x509.CertificateBuilder(self._name, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - hour)
            .not_valid_after(now + hour)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )


def serial(files: dict[str, bytes]) -> str:
    return f"{x509.load_pem_x509_certificate(files['cert.pem']).serial_number:X}"


def in_place(folder: Path, files: dict[str, bytes]) -> None:
    """One file after the other."""
    for name, content in files.items():
        (folder / f"{name}.new").write_bytes(content)
        os.replace(folder / f"{name}.new", folder / name)


def as_kubernetes(folder: Path, files: dict[str, bytes]) -> None:
    """All at once: links through a link to a folder that is made anew."""
    fresh = folder / f"..{serial(files)}"
    fresh.mkdir()
    for name, content in files.items():
        (fresh / name).write_bytes(content)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(Path("..data", name))
    (folder / "..new").symlink_to(fresh.name)
    os.replace(folder / "..new", folder / "..data")


def wire_of(folder: Path) -> WireConfig:
    cert, key, authority = (str(folder / name) for name in FILES)
    return replace(SMALL, remote="auto", tls_cert=cert, tls_key=key, tls_ca=authority)


def presented(address: str, files: dict[str, bytes], folder: Path) -> str:
    """The serial number of the certificate that a client with these files is shown."""
    mine = folder / "client"
    mine.mkdir(exist_ok=True)
    in_place(mine, files)
    context = ssl.create_default_context(cafile=mine / "ca.pem")
    context.load_cert_chain(mine / "cert.pem", mine / "key.pem")
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        context.wrap_socket(plain, server_hostname=host) as end,
    ):
        return str(end.getpeercert()["serialNumber"]).lstrip("0")


Replace = Callable[[Path, dict[str, bytes]], None]


@pytest.mark.parametrize("swap", [in_place, as_kubernetes])
@pytest.mark.parametrize("another", [False, True], ids=["same authority", "another authority"])
def test_new_connections_go_by_the_new_files_and_old_ones_go_on(folder, tmp_path, swap, another):
    first = Authority("first")
    old, new = first.issue(), (Authority("second") if another else first).issue()
    swap(tmp_path, old)
    host = Host(folder, wire_of(tmp_path))
    try:
        near, far = host.pair("grpc")
        assert presented(host.address.grpc, old, tmp_path) == serial(old)
        swap(tmp_path, new)
        assert presented(host.address.grpc, new, tmp_path) == serial(new)
        for channel, peer in (host.pair("grpc"), (near, far)):
            channel.send(Frame(Op.PING, 3))
            assert peer.recv(5.0).id == 3
            peer.send(Frame(Op.PONG, 4))
            assert channel.recv(5.0).id == 4
        if another:
            with pytest.raises(ssl.SSLError):
                presented(host.address.grpc, old, tmp_path)
    finally:
        host.close()


def test_half_a_replacement_changes_nothing_until_it_is_whole(folder, tmp_path, caplog):
    authority = Authority("one")
    old, new = authority.issue(), authority.issue()
    in_place(tmp_path, old)
    host = Host(folder, wire_of(tmp_path))
    try:
        in_place(tmp_path, {"cert.pem": new["cert.pem"]})
        with caplog.at_level(logging.WARNING, "moeray.wire.tls"):
            for _ in range(2):
                assert presented(host.address.grpc, old, tmp_path) == serial(old)
                host.pair("grpc")
        (said,) = [record.getMessage() for record in caplog.records]
        assert "as they were before" in said
        assert "name files that go together" in said
        (tmp_path / "key.pem").unlink()
        assert presented(host.address.grpc, old, tmp_path) == serial(old)
        in_place(tmp_path, {"key.pem": new["key.pem"]})
        assert presented(host.address.grpc, old, tmp_path) == serial(new)
        host.pair("grpc")
    finally:
        host.close()


def test_nodes_of_two_authorities_do_not_speak_until_both_have_the_new_files(folder, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    for node in (there, here):
        node.mkdir()
    old, new = Authority("old").issue(), Authority("new").issue()
    in_place(there, old)
    in_place(here, old)
    host = Host(folder, wire_of(there))
    host.wire = wire_of(here)
    try:
        host.pair("grpc")
        in_place(there, new)
        with pytest.raises(ChannelClosedError, match="TLS handshake failed"):
            host.dial("grpc")
        in_place(here, new)
        host.pair("grpc")
    finally:
        host.close()


def test_files_that_stay_as_they_are_are_read_once(tmp_path):
    authority = Authority("one")
    in_place(tmp_path, authority.issue())
    files = CredentialFiles(*(str(tmp_path / name) for name in FILES))
    held = files.current()
    assert files.current() is held
    in_place(tmp_path, authority.issue())
    assert files.current() is not held
