"""Folders and the model: these checks do what the actors will do, in the same places."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from moeray.actors.folders import remove_runtime_dir, runtime_dir
from moeray.cli.checks.finding import Finding, fail, failed_by, ok, skipped, warn
from moeray.errors import MoerayError
from moeray.machine import machine_dir
from moeray.wire.unix_dial import check_path

_NODE, _SYSTEM = "doctor000000", "doctor00"
_LONGEST_NAME = "experts-1000.sock"
_GOOD_BYTES, _LEAST_BYTES = 10 << 30, 1 << 30
NO_TOKENIZER = (
    "put tokenizer.json and tokenizer_config.json there: without them the endpoint answers every request with an "
    "error, and only `moeray generate --prompt-ids` works"
)


def runtime_folder() -> Finding:
    """A socket in the private folder: made, and removed."""
    name = "runtime folder"
    mend = "set MOERAY_RUNTIME_DIR to a short path of a folder that this user may write, on a local disk"
    try:
        folder = runtime_dir(_NODE, _SYSTEM)
        path = folder / _LONGEST_NAME
        check_path(str(path))
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(path))
        path.unlink()
    except MoerayError as error:
        return failed_by(name, error)
    except OSError as error:
        return fail(name, f"{machine_dir()}: {error.strerror}", mend)
    remove_runtime_dir(_NODE, _SYSTEM)
    return ok(name, f"{machine_dir()}, private")


def cache_folder(path: Path, free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free) -> Finding:
    """`free`: bytes left where a path is."""
    name, mend = "cache folder", "set MOERAY_CACHE_DIR (or cache_dir) to a folder that this user may write"
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        return fail(name, f"{path}: {error.strerror}", mend)
    left = free(path)
    what = f"{path}, {left / (1 << 30):.1f} GiB free"
    if left < _LEAST_BYTES:
        return fail(name, what, "free some, or set MOERAY_CACHE_DIR to a larger disk")
    if left < _GOOD_BYTES:
        return warn(name, what, "converted and downloaded weights may not fit: set MOERAY_CACHE_DIR to a larger disk")
    return ok(name, what)


def model(name: str, revision: str | None) -> Finding:
    """A local folder's files are opened, without a weight being read; of a hub id only the description is fetched."""
    if not name:
        return skipped("model", "none was named")
    from moeray.model.loading import open_model
    from moeray.model.source import resolve
    from moeray.serve.prompt import has_tokenizer

    try:
        if not Path(name).expanduser().is_dir():
            source = resolve(name, revision, node="this machine")
            return ok("model", f"{name} can be fetched from the hub, revision {source.revision}")
        files = open_model(name, revision, node="this machine")
    except MoerayError as error:
        return failed_by("model", error)
    experts = sum(files.expert_counts().values())
    kind = files.checkpoint.config.model_type
    if not has_tokenizer(Path(name).expanduser()):
        return warn("model", f"{name}: {kind}, but no tokenizer", NO_TOKENIZER)
    return ok("model", f"{name}: {kind}, {experts} experts in {len(files.expert_counts())} layers")
