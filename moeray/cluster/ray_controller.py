"""The Ray actor around the controller, and its lease.

This module imports nothing heavy: whoever starts a controller, or asks one, imports it too.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import ray

from moeray.actors.spec import model_fingerprint
from moeray.cluster.lease import Lease
from moeray.cluster.ray_cluster import RayCluster
from moeray.cluster.ray_metrics import RayMetrics
from moeray.config import Config
from moeray.errors import MoerayError
from moeray.logs import change_logging, setup_logging
from moeray.recorder import Reading

if TYPE_CHECKING:
    from moeray.actors.controller import Controller

log = logging.getLogger(__name__)

LEASE_S = 60.0
FAREWELL_S = 10.0


class ControllerProcess:
    """The Ray actor around the controller. It lives while somebody renews its lease, and takes every actor with it.

    The lease lets a crashed ingress or job leave nothing behind, and a restarted one find everything still running.
    """

    def __init__(self, config: Config, since: float = 0.0) -> None:
        self._config, self._since = config, since
        cluster = RayCluster(config.serve.name)
        self._controller = controller = _make(config, cluster, since)
        setup_logging(
            config, actor="controller", kind="controller", node=cluster.node_id, epoch=lambda: controller.epoch
        )
        self._lease = Lease(LEASE_S)
        self._ended = threading.Event()
        self._stopping = threading.Lock()
        self._ray_metrics: RayMetrics | None = None
        if config.metrics.ray:
            resumed = bool(ray.get_runtime_context().was_current_actor_reconstructed)
            self._ray_metrics = RayMetrics(self._controller.series, resumed)
        self._starter = threading.Thread(target=self._start, name="controller-start", daemon=True)
        self._starter.start()
        threading.Thread(target=self._watch, name="controller-lease", daemon=True).start()

    def _start(self) -> None:
        try:
            self._controller.start()
        except Exception:
            log.exception("the system did not start")
            return
        if self._controller.config != self._config:  # the controller before this one had taken a newer one
            self._config = self._controller.config
            change_logging(self._config)

    def _watch(self) -> None:
        expired = False
        while not self._ended.wait(self._lease.look_s):
            expired = expired or self._lease.expired()  # a stop that was begun is gone on with, whoever renews
            if expired:
                log.warning("nobody has renewed the lease for %g s; stopping", LEASE_S)
                try:
                    self.stop()
                except Exception:  # such as of a Ray whose head is away
                    log.exception("the system could not be stopped; it is tried again")
            elif self._controller.left_running and self._lease.was_renewed:
                log.error("the system that runs was not taken over; another controller tries again")
                logging.shutdown()
                os._exit(1)  # what is left in this process is of no use: Ray starts another one
        time.sleep(FAREWELL_S)  # whoever asked for the stop ends this actor, unless they died meanwhile
        ray.kill(ray.get_runtime_context().current_actor)  # and not started again

    def config(self) -> Config:
        """The config that the system runs with."""
        return self._config

    def renew(self, config: Config, since: float = 0.0, reading: Reading | None = None) -> dict[str, Any]:
        """Keep the system alive for another lease; its state. `reading`: what the caller has counted.

        `config` is the caller's, laid down at `since`: a system that runs takes one that is newer than its own, or
        refuses it with a ConfigError; 0 is never newer. One that failed to start gives way to another config (status
        "gone"), one that lives with another model does not: MoerayError.
        """
        state = self._controller.state()
        if config != self._config and state["status"] == "failed" and (since == 0.0 or since > self._since):
            return {"status": "gone", "detail": state["detail"], "info": None}
        served = model_fingerprint(self._config)
        if model_fingerprint(config) == served:  # also of an endpoint whose config is refused: it serves on as before
            self._lease.renew()
            if reading is not None:
                self._controller.hear(reading)
        if self._controller.configure(config, since):
            change_logging(config)
            self._config, self._since = config, since
        if model_fingerprint(config) != served:
            raise MoerayError(
                f"a system named {config.serve.name!r} already serves {self._config.model} in this Ray cluster; "
                "stop it, or choose another serve.name"
            )
        return state

    def call(self, method: str, *args: Any) -> Any:
        return self._controller.call(method, *args)

    def stop(self) -> None:
        """End every actor; whoever asks while that is under way waits for it too."""
        with self._stopping:
            if self._ray_metrics is not None:
                self._ray_metrics.close()
            self._controller.stop()
            self._ended.set()


def _make(config: Config, cluster: RayCluster, since: float) -> Controller:
    from moeray.actors.controller import Controller

    return Controller(config, cluster, since)
