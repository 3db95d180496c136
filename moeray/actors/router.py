"""A router actor: the trunk, the KV cache and the step loop; tokens leave on the ingresses' channels."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil

from moeray.actors.messages import error_tree, output_tree, request_from
from moeray.actors.outbox import Outbox
from moeray.actors.spec import ActorReport, ActorSpec, remove_runtime_dir, runtime_dir
from moeray.control.placement import Placement
from moeray.dispatch.dispatcher import Dispatcher
from moeray.dispatch.view import PlacementView
from moeray.engine.engine import Engine
from moeray.engine.trunk_runner import TrunkRunner
from moeray.errors import ChannelClosedError, MoerayError, WireError
from moeray.metrics import Recorder, Snapshot
from moeray.model.loading import eos_token_ids, open_model, pick_device
from moeray.model.trunk import Trunk
from moeray.types import Address, FinishReason, Lifecycle, TokenOutput
from moeray.wire.channel import Channel, Listener, connect
from moeray.wire.frame import Frame, Op

log = logging.getLogger(__name__)

Event = Callable[[], None]


class RouterActor:
    """Lifecycle: start (listening) → load_trunk (trunk in memory, step loop running) → stop.

    The step loop's thread owns the engine, the trunk and the dispatcher; every other thread leaves events in the inbox.
    """

    def __init__(self, spec: ActorSpec, node_id: str) -> None:
        self._spec = spec
        self._node_id = node_id
        self._device = pick_device(spec.device)
        self._state = Lifecycle.STARTING
        self._recorder = Recorder()
        self._view = PlacementView()
        self._identity = spec.identity(node_id)
        self._listener = Listener(self._identity, spec.config.wire, self._serve, runtime_dir(node_id, spec.system))
        self._inbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._owners: dict[str, tuple[Outbox, float]] = {}
        self._last_token: dict[str, float] = {}
        self._engine: Engine | None = None
        self._dispatcher: Dispatcher | None = None
        self._loop = threading.Thread(target=self._run, name=f"step-loop-{spec.actor_id}", daemon=True)

    def start(self) -> tuple[ActorReport, Address]:
        """Listen, and say where this actor is."""
        address = self._listener.start()
        free = int(psutil.virtual_memory().available)
        return ActorReport(self._spec.actor_id, self._node_id, os.getpid(), str(self._device), free), address

    def load_trunk(self, revision: str | None = None) -> dict[str, Any]:
        """Load the trunk, allocate the KV cache, start the step loop.

        `revision` pins the hub's commit. Raises CheckpointError, UnsupportedModelError.
        """
        config = self._spec.config
        files = open_model(config.model, revision or config.revision, node=self._node_id)
        trunk = Trunk.load(files.checkpoint, files.family, files.weights, files.dtype(config.dtype), self._device)
        self._dispatcher = Dispatcher(self._view, self._connect, self._recorder, deadline_s=config.wire.deadline_s)
        runner = TrunkRunner(trunk, config.engine, self._dispatcher, eos_token_ids(files))
        self._engine = Engine(config.engine, runner)
        self._state = self._state.advance(Lifecycle.READY)
        self._loop.start()
        return {"max_context": runner.max_context, "vocab_size": runner.vocab_size, "kv_blocks": runner.num_blocks}

    def _connect(self, address: Address) -> Channel:
        return connect(address, self._identity, self._spec.config.wire, timeout=5.0)

    def publish(self, placement: Mapping[str, Any], addresses: Mapping[str, Address]) -> int:
        """Take a placement (plain data) and where its actors listen; the epoch now held is the acknowledgement."""
        self._view.publish(Placement.from_tree(placement), addresses)
        return self._view.epoch

    # -- channels from ingresses ----------------------------------------------------------------------------------

    def _serve(self, channel: Channel) -> None:
        outbox = Outbox(channel)
        try:
            while True:
                self._take(channel.recv(), outbox)
        except ChannelClosedError:
            log.debug("channel from %s closed", channel.peer)
        except WireError as error:
            log.warning("channel from %s closed: %s", channel.peer, error)
        finally:
            self._inbox.put(lambda: self._abandon(outbox))
            outbox.close()

    def _take(self, frame: Frame, outbox: Outbox) -> None:
        if frame.op is Op.PING:
            outbox.put(Frame(Op.PONG, frame.id))
        elif frame.op is Op.SUBMIT:
            self._inbox.put(lambda: self._submit(frame, outbox))
        elif frame.op is Op.ABORT:
            self._inbox.put(lambda: self._abort(str(frame.meta.get("request_id"))))
        else:
            raise WireError(f"a router takes SUBMIT, ABORT and PING frames, not {frame.op.name}")

    # -- the step loop's thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._steps()
        except BaseException:
            log.exception("the step loop died; every channel is closed, so that no client waits for ever")
            self._state = Lifecycle.STOPPED
            self._listener.close(timeout=5.0)
            raise

    def _steps(self) -> None:
        assert self._engine is not None
        while True:
            if not self._drain_inbox(wait=not self._engine.has_work):
                return
            if self._engine.has_work:
                self._deliver(self._step())

    def _drain_inbox(self, wait: bool) -> bool:
        """Run the events that wait (or wait for one); False when told to stop."""
        while True:
            try:
                event = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if event is None:
                return False
            event()
            wait = False

    def _submit(self, frame: Frame, outbox: Outbox) -> None:
        assert self._engine is not None
        request_id = str(frame.meta.get("request_id"))
        try:
            self._engine.submit(request_from(frame.meta))
        except MoerayError as error:
            outbox.put(Frame(Op.ERROR, frame.id, meta=error_tree(request_id, error)))
            return
        self._owners[request_id] = (outbox, time.monotonic())
        outbox.put(Frame(Op.RESULT, frame.id, meta={"request_id": request_id}))

    def _abort(self, request_id: str) -> None:
        assert self._engine is not None
        if self._engine.abort(request_id):
            self._recorder.add("moeray_request_total", 1, reason=FinishReason.ABORT.value)
        self._forget(request_id)

    def _abandon(self, outbox: Outbox) -> None:
        for request_id in [key for key, (owner, _) in self._owners.items() if owner is outbox]:
            self._abort(request_id)

    def _forget(self, request_id: str) -> None:
        self._owners.pop(request_id, None)
        self._last_token.pop(request_id, None)

    def _step(self) -> list[TokenOutput]:
        assert self._engine is not None
        began = time.perf_counter()
        try:
            outputs = self._engine.step()
        except (MoerayError, RuntimeError) as error:
            log.exception("the step failed; its requests end with an error")
            return self._fail_all(str(error))
        self._recorder.observe("moeray_step_seconds", time.perf_counter() - began)
        return outputs

    def _fail_all(self, message: str) -> list[TokenOutput]:
        assert self._engine is not None
        failed = [key for key in self._owners if self._engine.abort(key)]
        return [TokenOutput(key, 0, (), finish_reason=FinishReason.ERROR, error=message) for key in failed]

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        """One STEP frame per ingress with all its requests' tokens."""
        now = time.monotonic()
        by_outbox: dict[Outbox, list[Any]] = {}
        for output in outputs:
            if output.request_id not in self._owners:
                continue
            outbox, arrived = self._owners[output.request_id]
            by_outbox.setdefault(outbox, []).append(output_tree(output))
            self._note(output, arrived, now)
            if output.finish_reason is not None:
                self._forget(output.request_id)
        for outbox, trees in by_outbox.items():
            outbox.put(Frame(Op.STEP, meta={"outputs": trees}))

    def _note(self, output: TokenOutput, arrived: float, now: float) -> None:
        if output.token_ids:
            self._recorder.add("moeray_generation_tokens_total", len(output.token_ids))
            before = self._last_token.get(output.request_id)
            if before is None:
                self._recorder.observe("moeray_time_to_first_token_seconds", now - arrived)
            else:
                self._recorder.observe("moeray_time_per_output_token_seconds", now - before)
            self._last_token[output.request_id] = now
        if output.finish_reason is not None:
            self._recorder.add("moeray_request_total", 1, reason=output.finish_reason.value)
            self._recorder.observe("moeray_e2e_request_latency_seconds", now - arrived)

    # -- control --------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Plain data for `moeray status`."""
        stats = self._engine.stats() if self._engine else None
        return {
            "actor": self._spec.actor_id,
            "kind": "router",
            "group": self._spec.group,
            "node": self._node_id,
            "pid": os.getpid(),
            "device": str(self._device),
            "state": self._state.value,
            "epoch": self._view.epoch,
            "running": stats.running if stats else 0,
            "queue": stats.waiting if stats else 0,
            "kv_cache_usage_ratio": stats.kv_cache_usage_ratio if stats else 0.0,
            "kv_blocks_used": stats.kv_blocks_used if stats else 0,
        }

    def metrics(self) -> Snapshot:
        if self._engine:
            stats, actor = self._engine.stats(), self._spec.actor_id
            self._recorder.set("moeray_num_requests_running", stats.running, actor=actor)
            self._recorder.set("moeray_num_requests_waiting", stats.waiting, actor=actor)
            self._recorder.set("moeray_kv_cache_usage_ratio", stats.kv_cache_usage_ratio, actor=actor)
            counters = {
                "moeray_prompt_tokens_total": stats.prompt_tokens,
                "moeray_prefix_cache_hit_tokens_total": stats.prefix_hit_tokens,
                "moeray_preemptions_total": stats.preemptions,
            }
            return self._recorder.snapshot() | {name: {(): float(value)} for name, value in counters.items()}
        return self._recorder.snapshot()

    def stop(self) -> None:
        """End the step loop and every channel. Idempotent."""
        if self._state is Lifecycle.STOPPED:
            return
        self._state = self._state.advance(Lifecycle.STOPPED)
        self._inbox.put(None)
        if self._loop.is_alive():
            self._loop.join(timeout=30.0)
        self._listener.close(timeout=5.0)
        remove_runtime_dir(self._node_id, self._spec.system)
        if self._dispatcher:
            self._dispatcher.close()
