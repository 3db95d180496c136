"""By which address others reach this machine."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from ipaddress import ip_address

import psutil

from moeray.errors import WireError


def bracketed(host: str) -> str:
    """As it stands before a port."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def reachable(host: str) -> str:
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
