"""This machine: cores, GPUs, memory, descriptors and ports."""

from __future__ import annotations

from collections.abc import Sequence

from moeray.cli.checks.finding import Finding, fail, ok, skipped, warn

_LEAST_FILES, _GOOD_FILES = 1024, 4096
_OBJECT_STORE_BYTES = 200 << 20
"""Less than this, and Ray puts its object store on the disk."""


def cpu(cores: int, quota: float | None, computing: int) -> Finding:
    """`cores` that this process may use, `quota` of a cgroup in cores; `computing`: threads of the config's experts."""
    limit = f", of which a cgroup gives {quota:g}" if quota is not None and quota < cores else ""
    what = f"{cores} cores{limit}"
    usable = min(cores, quota or cores)
    if limit and usable < 0.75 * cores:
        mend = f"routers start {cores} threads unless told otherwise: set router.threads: {max(1, int(usable))}"
        return warn("cpu", what, mend)
    if usable < 2:
        return warn("cpu", what, "a router and its experts want at least 2 cores")
    if computing > cores:
        mend = "lower experts.threads or actors, or spread them over more machines"
        return warn("cpu", f"{what}, and the config's experts compute with {computing} threads", mend)
    return ok("cpu", what)


def gpus(present: int, seen: int, build: str | None, wanted: bool) -> Finding:
    """`present` on this machine, `seen` by torch, whose `build` is for that CUDA version (None: for CPUs); `wanted`:
    the config asks for `cuda`."""
    if seen:
        return ok("gpus", f"torch sees {seen} of {max(present, seen)}, CUDA {build}")
    if present and build is None:
        what = f"{present} are here, but this torch is a build for CPUs"
        return fail("gpus", what, "install torch's build for the driver's CUDA version (nvidia-smi shows it)")
    if present:
        what = f"{present} are here, but torch (CUDA {build}) sees none"
        mend = "see CUDA_VISIBLE_DEVICES, and whether nvidia-smi runs and shows a driver for this CUDA version"
        return fail("gpus", what, mend)
    if wanted:
        return fail(
            "gpus", "none, and the config asks for device: cuda", "set device: auto, or use a machine with GPUs"
        )
    return ok("gpus", "none; everything runs on the CPU")


def shared_memory(error: str | None, needed: int, available: int) -> Finding:
    """`error`: why no ring between two actors can be made, if so; `needed` bytes for the config's channels at most."""
    if error is not None:
        mend = "allow memfd_create with sealing (Linux 3.17, seccomp profile), and raise the memory limit"
        return fail("shared memory", f"none can be had: {error}", mend)
    what = f"channels take up to {_size(needed)}, {_size(available)} of memory are free"
    if needed > available:
        return fail("shared memory", what, "lower wire.shared_memory_bytes or the number of actors")
    return ok("shared memory", what)


def object_store(free: int | None) -> Finding:
    """`free` bytes of /dev/shm, None where it is not there."""
    if free is None:
        return warn("/dev/shm", "not there; Ray's object store goes to the disk", "mount a tmpfs at /dev/shm")
    if free < _OBJECT_STORE_BYTES:
        mend = "docker run --shm-size=2g, or in Kubernetes an emptyDir of medium Memory at /dev/shm"
        return warn("/dev/shm", f"{_size(free)} free; Ray's object store goes to the disk", mend)
    return ok("/dev/shm", f"{_size(free)} free")


def open_files(soft: int, hard: int) -> Finding:
    """The limits of this process, which Ray's processes have too when they are started like it."""
    what = f"{soft} at once (hard limit {hard})"
    mend = "before `ray start` or `moeray serve`: ulimit -n 65536"
    if hard < _GOOD_FILES:
        mend = "raise the hard limit (/etc/security/limits.conf, LimitNOFILE, docker --ulimit nofile=65536)"
    if soft < _LEAST_FILES:
        return fail("open files", f"{what}; too few for Ray's processes and their channels", mend)
    if soft < _GOOD_FILES:
        return warn("open files", f"{what}; few for many clients", mend)
    return ok("open files", what)


def port(host: str, number: int, error: str | None, holder: str | None, ours: bool) -> Finding:
    """`error`: why the endpoint cannot listen there, None where it can; `holder`: who does, where that is known;
    `ours`: what listens there is a moeray endpoint."""
    where = f"{host}:{number}"
    if error is None:
        return ok("port", f"{where} is free")
    if ours:
        return ok("port", f"{where}: a moeray endpoint listens there")
    held = f", held by {holder}" if holder else ""
    return fail("port", f"{where}: {error}{held}", "end what holds it, or choose another with --port or --host")


def wire(host: str, error: str | None, remotes: Sequence[str]) -> Finding:
    """Whether actors can listen for those of other nodes."""
    if not remotes:
        return skipped("wire", "wire.remote is off: all actors on one node")
    if error is not None:
        return fail(
            "wire", f"cannot listen at wire.host {host}: {error}", "set wire.host to an address of this machine"
        )
    return ok("wire", f"can listen at {host}, for {' and '.join(remotes)}")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
