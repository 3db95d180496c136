"""The controller: starts the actors, places the experts, publishes the placement, and knows what the system does."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field, replace
from typing import Any

from moeray.actors.hosting import ActorHandle, Cluster
from moeray.actors.spec import ActorReport, ActorSpec
from moeray.config import Config, ExpertGroupConfig
from moeray.control.eplb import place
from moeray.control.placement import Host, Placement
from moeray.errors import MoerayError
from moeray.metrics import Recorder, Snapshot, exposition, merge
from moeray.model.loading import ModelFiles, eos_token_ids, open_model
from moeray.types import Address, ExpertId

log = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0
STATUS_TIMEOUT_S = 5.0
BASE_BYTES = 512 << 20
"""What an actor's process needs beside its weights."""


@dataclass(frozen=True)
class SystemInfo:
    """What an ingress needs to serve: where the routers listen, and the model's own facts."""

    model: str
    revision: str | None
    token: bytes = field(repr=False)
    system: str
    routers: tuple[Address, ...]
    max_context: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class _Member:
    handle: ActorHandle
    report: ActorReport
    address: Address
    group: ExpertGroupConfig | None


class Controller:
    """Owns the set of actors and the placement. `start` runs once, in a thread of its caller's; the rest may be called
    from any thread meanwhile.

    Started by whoever owns the system; `stop` ends every actor it started.
    """

    def __init__(self, config: Config, cluster: Cluster) -> None:
        self._cluster = cluster
        token = config.wire.token.encode() if config.wire.token else secrets.token_bytes(32)
        self._config = replace(config, wire=replace(config.wire, token=None))
        self._token = token
        self._system = secrets.token_hex(4)
        self._lock = threading.Lock()
        self._started: list[tuple[ActorHandle, ExpertGroupConfig | None]] = []
        self._experts: dict[str, _Member] = {}
        self._routers: dict[str, _Member] = {}
        self._placement = Placement()
        self._info: SystemInfo | None = None
        self._phase = "starting"
        self._error: str | None = None
        self._rates = _Rates()
        self._stopped = False

    # -- start ----------------------------------------------------------------------------------------------------

    def start(self) -> SystemInfo:
        """Bring the whole system up. Raises the one MoerayError that stopped it; `state` keeps its text too."""
        try:
            info = self._start()
        except MoerayError as error:
            self._error = str(error)
            self.stop()
            raise
        self._info = info
        self._phase = "ready"
        return info

    def _start(self) -> SystemInfo:
        config = self._config
        self._cluster.check(config.experts.resolved(), config.router)
        self._phase = "opening the model"
        self._launch()  # processes come up while the model is opened here
        files = open_model(config.model, config.revision, node="of the controller")
        self._phase = "starting actors"
        self._await_actors()
        placement = self._place(files)
        self._phase = "loading weights"
        facts = self._load(placement, files.checkpoint.source.revision)
        self._phase = "publishing the placement"
        self._publish(placement)
        return SystemInfo(
            config.model,
            files.checkpoint.source.revision,
            self._token,
            self._system,
            tuple(member.address for member in self._routers.values()),
            min(fact["max_context"] for fact in facts),
            facts[0]["vocab_size"],
            eos_token_ids(files),
        )

    def _launch(self) -> None:
        for group in self._config.experts.resolved():
            for i in range(group.actors):
                spec = self._spec(f"{group.name}-{i}", group.name, group.device, group.threads)
                self._started.append((self._cluster.start_expert(spec, group), group))
        router = self._config.router
        for i in range(router.actors):
            spec = self._spec(f"router-{i}", "router", router.device, router.threads)
            self._started.append((self._cluster.start_router(spec, router), None))

    def _await_actors(self) -> None:
        futures = [handle.call("start") for handle, _ in self._started]
        for (handle, kind), (report, address) in zip(self._started, _results(futures, "start"), strict=True):
            members = self._routers if kind is None else self._experts
            with self._lock:
                members[handle.actor_id] = _Member(handle, report, address, kind)

    def _spec(self, actor_id: str, group: str, device: str, threads: int) -> ActorSpec:
        return ActorSpec(actor_id, group, device, threads, self._config, self._token, self._system)

    def _place(self, files: ModelFiles) -> Placement:
        trunks = {member.report.node_id: files.weights.trunk_bytes() for member in self._routers.values()}
        hosts = hosts_of([(m.report, m.group) for m in self._experts.values() if m.group], trunks)
        return place(
            {},
            hosts,
            experts=files.expert_counts(),
            expert_bytes=files.expert_bytes(),
            replicas=self._config.experts.replicas,
        )

    def _load(self, placement: Placement, revision: str | None) -> list[dict[str, Any]]:
        loads = [
            member.handle.call("host", [tuple(expert) for expert in placement.hosted_by(actor)], revision)
            for actor, member in self._experts.items()
        ]
        trunks = [member.handle.call("load_trunk", revision) for member in self._routers.values()]
        self._watch_loading([*loads, *trunks])
        _results(loads, "load its experts")
        return _results(trunks, "load the trunk")

    def _watch_loading(self, futures: Sequence[Future[Any]]) -> None:
        """Keep the phase up to date with the experts loaded, until every actor is done or one has failed."""
        until = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until:
            done, left = wait(futures, timeout=0.5, return_when=FIRST_EXCEPTION)
            if not left or any(future.exception() for future in done):
                return
            rows = [row["loading"] for row in _gather(self._expert_members(), "status").values() if row]
            self._phase = f"loading experts {sum(row[0] for row in rows)}/{sum(row[1] for row in rows)}"

    def _publish(self, placement: Placement) -> None:
        with self._lock:
            self._placement = placement
        addresses = {actor: member.address for actor, member in self._experts.items()}
        tree = placement.to_tree()
        _results([m.handle.call("publish", tree, addresses) for m in self._routers.values()], "take the placement")

    # -- what it is doing -----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """`status` ("loading", "ready" or "failed"), `detail` in a line, and `info` (SystemInfo) once ready."""
        if self._error is not None:
            return {"status": "failed", "detail": self._error, "info": None}
        if self._info is None:
            return {"status": "loading", "detail": self._phase, "info": None}
        return {"status": "ready", "detail": "ready", "info": self._info}

    def status(self) -> dict[str, Any]:
        """The running system as plain data: its actors with what each says of itself."""
        members = self._members()
        rows = _gather(members, "status")
        actors = [rows[actor] or _silent(member) for actor, member in members.items()]
        for row in actors:
            row["rows_per_s"] = self._rates.rate(row["actor"], row.get("rows_total"))
        return {
            "model": self._config.model,
            "status": self.state()["status"],
            "detail": self.state()["detail"],
            "epoch": self._placement.epoch,
            "actors": actors,
        }

    def load(self) -> list[tuple[int, int, int]]:
        """(layer, expert, rows served so far), over all replicas; experts with none included."""
        totals = dict.fromkeys(self._placement.replicas, 0)
        for rows in _gather(self._expert_members(), "load").values():
            for layer, expert, count in rows or ():
                totals[ExpertId(layer, expert)] = totals.get(ExpertId(layer, expert), 0) + count
        return [(*expert, count) for expert, count in sorted(totals.items())]

    def metrics(self) -> bytes:
        """Every actor's registry and the controller's own, in Prometheus' text format."""
        snapshots: list[Snapshot] = [s for s in _gather(self._members(), "metrics").values() if s is not None]
        own = Recorder()
        own.set("moeray_placement_epoch", self._placement.epoch)
        for (kind, state), count in Counter((row["kind"], row["state"]) for row in self.status()["actors"]).items():
            own.set("moeray_actors", count, kind=kind, state=state)
        for layer, expert, rows in self.load():
            own.add("moeray_expert_load_rows_total", rows, layer=layer, expert=expert)
        return exposition(merge([*snapshots, own.snapshot()]))

    def _members(self) -> dict[str, _Member]:
        with self._lock:
            return {**self._routers, **self._experts}

    def _expert_members(self) -> dict[str, _Member]:
        with self._lock:
            return dict(self._experts)

    # -- stop -----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End every actor: routers first, so that no row is sent to an actor that is going. Idempotent."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
        routers_first = sorted(self._started, key=lambda item: item[1] is not None)
        for handle, _ in routers_first:
            try:
                handle.call("stop").result(timeout=30.0)
            except (MoerayError, FutureTimeoutError) as error:
                log.warning("actor %s did not stop in good order: %s", handle.actor_id, error)
            handle.kill()
        self._cluster.close()


def hosts_of(actors: Sequence[tuple[ActorReport, ExpertGroupConfig]], reserved: Mapping[str, int]) -> list[Host]:
    """What each expert actor can hold: its part of its device's free memory.

    Actors of one node share its CPU memory (less `reserved[node]`, the trunk there, and the processes' own need); a
    GPU's free bytes were read by each of its actors and are shared likewise.
    """
    sharing: dict[tuple[str, str], int] = {}
    for report, _ in actors:
        key = (report.node_id, report.device)
        sharing[key] = sharing.get(key, 0) + 1
    hosts = []
    for report, group in actors:
        mates = sharing[report.node_id, report.device]
        taken = reserved.get(report.node_id, 0) + mates * BASE_BYTES if report.device == "cpu" else 0
        capacity = max(0, int(0.9 * (report.free_bytes - taken) / mates))
        if group.memory_gib is not None:
            capacity = min(capacity, int(group.memory_gib * 2**30))
        hosts.append(Host(report.actor_id, capacity, group.share / group.actors))
    return hosts


def _results(futures: Sequence[Future[Any]], what: str) -> list[Any]:
    """Every result; the first error goes up. One deadline for all of them."""
    until = time.monotonic() + START_TIMEOUT_S
    try:
        return [future.result(timeout=max(0.0, until - time.monotonic())) for future in futures]
    except FutureTimeoutError:
        raise MoerayError(
            f"an actor did not {what} within {START_TIMEOUT_S:g} s; `ray status` shows whether the cluster has room"
        ) from None


def _gather(members: Mapping[str, _Member], method: str) -> dict[str, Any]:
    """Ask every actor at once; None for those that do not answer in time or are gone."""
    futures = {actor: member.handle.call(method) for actor, member in members.items()}
    until = time.monotonic() + STATUS_TIMEOUT_S
    answers: dict[str, Any] = {}
    for actor, future in futures.items():
        try:
            answers[actor] = future.result(timeout=max(0.0, until - time.monotonic()))
        except (MoerayError, FutureTimeoutError) as error:
            log.warning("actor %s did not answer %s: %s", actor, method, error)
            answers[actor] = None
    return answers


def _silent(member: _Member) -> dict[str, Any]:
    kind = "router" if member.group is None else "expert"
    report = member.report
    return {
        "actor": report.actor_id, "kind": kind, "group": member.group.name if member.group else "router",
        "node": report.node_id, "pid": report.pid, "device": report.device, "state": "silent", "experts": 0, "queue": 0,
    }  # fmt: skip


class _Rates:
    """Per second, from two readings of a counter."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def rate(self, key: str, total: float | None) -> float:
        if total is None:
            return 0.0
        now = self._clock()
        with self._lock:
            before, count = self._last.get(key, (now, total))
            self._last[key] = (now, total)
        return (total - count) / (now - before) if now > before else 0.0
