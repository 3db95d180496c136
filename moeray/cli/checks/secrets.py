"""The cluster's token and the endpoint's key. No finding holds any part of either."""

from __future__ import annotations

from moeray.cli.checks.finding import Finding, fail, ok, warn

LEAST_TOKEN = 16
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def token(value: str | None) -> Finding:
    mend = "export MOERAY_CLUSTER_TOKEN=$(openssl rand -hex 32)"
    if value is None:
        return ok("cluster token", "none is set: one is made for each start")
    if value != value.strip():
        return fail("cluster token", "it begins or ends with white space, as of a file's last line", mend)
    if len(value) < LEAST_TOKEN:
        return fail("cluster token", f"{len(value)} characters can be guessed; {LEAST_TOKEN} are the least", mend)
    return ok("cluster token", f"{len(value)} characters")


def api_key(value: str | None, host: str) -> Finding:
    if value is not None and (not value.strip() or value != value.strip()):
        return fail("API key", "it is empty or has white space at an end", "set MOERAY_API_KEY anew, or unset it")
    if value is None and host not in _LOOPBACK:
        mend = "set MOERAY_API_KEY, or keep serve.host at 127.0.0.1 behind a proxy of yours"
        return warn("API key", f"none, and the endpoint listens at {host} for everybody", mend)
    return ok("API key", "set" if value is not None else "none; the endpoint is for this machine alone")
