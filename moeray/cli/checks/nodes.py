"""What each node of a Ray cluster says of itself.

Asked for by a child process, since Ray has no deadline of its own and ends a process that loses its cluster:
`python -m moeray.cli.checks.nodes ADDRESS DESCRIPTOR` writes one JSON object.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import runpy
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NODE_S = 30.0
"""For a process on a node to start and answer."""
_PACKAGES = ("moeray", "ray", "torch", "transformers")


def facts() -> dict[str, Any]:
    """Of the machine and interpreter that this runs on."""
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "code": code_digest(),
        **{name: version_of(name) for name in _PACKAGES},
        "cuda_build": cuda_build(),
        "gpus": count_gpus(),
        "time": time.time(),
    }


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def code_digest() -> str:
    """Tells two states of moeray's sources apart where the version is the same."""
    import moeray

    root = Path(moeray.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def cuda_build() -> str | None:
    """The CUDA version that torch was built for, without the seconds that importing it takes."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version = runpy.run_path(str(Path(spec.origin).with_name("version.py")))["cuda"]
    return None if version is None else str(version)


def count_gpus() -> int:
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


# -- the child ----------------------------------------------------------------------------------------------------


def main() -> None:
    from moeray.cli.session import connect
    from moeray.errors import MoerayError, one_line

    address, output = sys.argv[1] or None, int(sys.argv[2])
    try:
        connect(address)
        told = _survey()
    except (MoerayError, RuntimeError, OSError, ValueError) as error:
        absent = address is None and not os.environ.get("RAY_ADDRESS") and isinstance(error, MoerayError)
        told = {"absent" if absent else "error": one_line(error)}
    os.write(output, json.dumps(told).encode())
    os._exit(0)  # Ray's own end can hang


def _survey() -> dict[str, Any]:
    """Every node's facts, or why it has none, and how far its clock is from ours at least (seconds)."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    ask = ray.remote(num_cpus=0, max_retries=0)(facts)
    here = {node["NodeID"]: NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in alive}
    begun = time.time()
    answers = {name: ask.options(scheduling_strategy=where).remote() for name, where in here.items()}
    until, rows = time.monotonic() + NODE_S, []
    for node in alive:
        row = {
            "node": node["NodeID"], "address": node["NodeManagerAddress"],
            "ray_gpus": node["Resources"].get("GPU", 0.0), "cpus": node["Resources"].get("CPU", 0.0),
        }  # fmt: skip
        try:
            said = ray.get(answers[node["NodeID"]], timeout=max(0.1, until - time.monotonic()))
            rows.append(row | said | {"skew_s": max(0.0, begun - said["time"], said["time"] - time.time())})
        except RayError as error:
            lines = str(error).strip().splitlines()
            rows.append(row | {"error": lines[-1] if lines else type(error).__name__})
    return {"address": ray.get_runtime_context().gcs_address, "nodes": rows}


if __name__ == "__main__":
    main()
