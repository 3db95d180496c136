"""Other engines, run by a Python of their own in alternation with ours: `vllm=PYTHON`, `transformers=PYTHON`.

A peer is a script in this folder that loads the model once and then answers a line {"batch", "prompt", "output"} by a
line {"first_s", "total_s"}: see `Times`. It imports nothing of this project, so its environment needs only the peer.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moeray.bench.engine import Times
from moeray.errors import MoerayError

PEERS = ("transformers", "vllm")
_MARK = "PEER "
_FOLDER = Path(__file__).parent


class Peer:
    """A running peer; see `moeray.bench.engine.Contender`."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self._name = name
        self._process = process

    def run(self, batch: int, prompt: int, output: int) -> Times:
        """Raises MoerayError where the peer ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"batch": batch, "prompt": prompt, "output": output}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        return Times(**self.hear())

    def hear(self) -> dict[str, float]:
        """The next line that is meant for us; the peer's own prints are passed over."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_MARK):
                answer: dict[str, float] = json.loads(line.removeprefix(_MARK))
                return answer
        raise self._ended()

    def _ended(self) -> MoerayError:
        return MoerayError(f"the peer {self._name} ended; its own output above says why")


@contextmanager
def peer(name: str, python: str, model: str, threads: int) -> Iterator[Peer]:
    """Start a peer with `threads` threads, and end it afterwards. Raises MoerayError where it does not start."""
    if name not in PEERS:
        raise MoerayError(f"--against {name}: there is no such peer; there are {', '.join(PEERS)}")
    command = [python, "-P", str(_FOLDER / f"peer_{name}.py"), model]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    except OSError as error:
        raise MoerayError(f"--against {name}={python}: {error.strerror}; give the Python of its environment") from error
    try:
        running = Peer(name, process)
        running.hear()
        yield running
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
