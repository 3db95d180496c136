"""Whose system a batch uses: the one that runs under the name, or one of its own, which a run that was killed may have
left behind.

A system of its own has a name that follows from where the job runs and what it writes. So other jobs do not see it, and
the same job finds it again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import ray

from moeray.cluster.ray import ask, find_controller, running_config, stop_controller
from moeray.config import Config
from moeray.errors import MoerayError, SystemAbsentError


def check_model(asked: Config, served: Config) -> None:
    """Raises MoerayError where the running system serves another model than the one that is asked for."""
    names = {served.model, served.serve.model_name, Path(served.model).name}
    if asked.model and asked.model not in names and not _same_folder(asked.model, served.model):
        raise MoerayError(
            f"the system {served.serve.name!r} that runs in this Ray cluster serves {served.model}, not {asked.model}; "
            "leave --model out to use it, or give another --serve-name for a system of the job's own"
        )


def _same_folder(one: str, other: str) -> bool:
    return Path(one).is_dir() and Path(one).resolve() == Path(other).resolve()


def own_name(name: str, output: Path) -> str:
    """The name of the system of the job that writes `output` on this node."""
    place = f"{ray.get_runtime_context().get_node_id()}\0{output.resolve()}"
    return f"{name}-batch-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


def take_or_clear(config: Config) -> bool:
    """True where a system runs under the name with just this config. One with another, or that failed, is stopped."""
    try:
        controller = find_controller(config.serve.name)
    except SystemAbsentError:
        return False
    alive = ask(controller, "state")["status"] in ("loading", "ready")
    if alive and running_config(controller) == config:
        return True
    stop_controller(controller)
    return False
