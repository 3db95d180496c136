"""A Ray node that is about to go: Ray starts nothing there any more, and whatever runs there leaves."""

from __future__ import annotations

import time

import ray
from ray._private.state import state as global_state
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated import autoscaler_pb2

from moeray.errors import ConfigError, MoerayError

_PAUSE_S = 0.5


def this_node() -> str:
    """The Ray node of this machine, or of this pod."""
    return str(ray.get_runtime_context().get_node_id())


def find_node(prefix: str) -> str:
    """The living node whose id begins so. Raises ConfigError where there is none, or more than one."""
    living = [str(node["NodeID"]) for node in ray.nodes() if node["Alive"]]
    found = [node for node in living if node.startswith(prefix)]
    if len(found) != 1:
        raise ConfigError(f"{len(found)} living nodes begin with {prefix!r}; the nodes are {', '.join(sorted(living))}")
    return found[0]


def leave_node(node_id: str, within_s: float) -> None:
    """Tell Ray that the node will be gone in `within_s` seconds. Serve moves its replicas, moeray its actors.

    Raises MoerayError where Ray refuses.
    """
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    by_ms = int((time.time() + within_s) * 1000)
    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, why = gcs.drain_node(node_id, reason, "moeray drain", by_ms)
    if not accepted:
        raise MoerayError(f"Ray does not let node {node_id} go: {why}")


def wait_empty(node_id: str, within_s: float) -> bool:
    """Until nothing on the node holds a resource of Ray's, or the node is gone; False after `within_s` seconds."""
    until = time.monotonic() + within_s
    while _in_use(node_id):
        if time.monotonic() >= until:
            return False
        time.sleep(_PAUSE_S)
    return True


def _in_use(node_id: str) -> bool:
    free = global_state.available_resources_per_node().get(node_id)
    total = global_state.total_resources_per_node().get(node_id)
    if free is None or total is None:
        return False
    return any(free.get(name, 0.0) < amount - 1e-6 for name, amount in total.items() if name != "object_store_memory")
