"""End a process abruptly, on whatever node it runs: what the chaos tool does to actors."""

from __future__ import annotations

import os
import signal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moeray.errors import MoerayError

ANSWER_S = 30.0


def _kill(pid: int, number: int) -> None:
    os.kill(pid, number)


def kill_process(node_id: str, pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process of ours. Raises MoerayError where it is gone already or its node does not answer."""
    try:
        if node_id == ray.get_runtime_context().get_node_id():
            _kill(pid, number)
            return
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        task = ray.remote(_kill).options(num_cpus=0, scheduling_strategy=there, max_retries=0)
        ray.get(task.remote(pid, number), timeout=ANSWER_S)
    except ProcessLookupError as error:
        raise MoerayError(f"process {pid} is gone already") from error
    except ray.exceptions.RayError as error:
        raise MoerayError(f"node {node_id[:8]} did not end process {pid}: {str(error)[:200]}") from error
