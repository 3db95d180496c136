"""The model that a controller serves, opened."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from moeray.actors.adoption import Found
from moeray.actors.hosting import call
from moeray.actors.planner import ModelShape
from moeray.actors.readiness import Readiness
from moeray.config import Config
from moeray.errors import MoerayError
from moeray.model.loading import eos_token_ids, open_model

log = logging.getLogger(__name__)

OPEN_RETRY_S = 5.0


@dataclass(frozen=True)
class Model:
    """What the system serves: the commit of a hub's model, the tokens that end a sequence, and the experts."""

    revision: str | None
    eos_token_ids: tuple[int, ...]
    shape: ModelShape


def open_in_time(config: Config, found: Found | None, stopped: threading.Event, readiness: Readiness) -> Model:
    """Again and again where a system waits to be taken over, until `stopped`; `readiness` says how it goes.

    Raises CheckpointError, UnsupportedModelError.
    """
    readiness.phase = "opening the model"
    while True:
        try:
            return _open(config, found)
        except MoerayError as error:
            if found is None:
                raise
            log.error("the running system is not taken over yet: %s", error)
            readiness.phase = f"opening the model, which failed: {error}"
        for handle, _ in found.actors:
            call(handle, "describe")  # so that it knows of a controller
        if stopped.wait(OPEN_RETRY_S):
            raise MoerayError("the controller was stopped while it took a system over")


def _open(config: Config, found: Found | None) -> Model:
    """Raises CheckpointError, UnsupportedModelError."""
    files = open_model(config.model, found.revision if found else config.revision, node="of the controller")
    sizes = files.expert_bytes(config.experts.quantization)
    shape = ModelShape(files.expert_counts(), sizes, files.weights.trunk_bytes())
    return Model(files.checkpoint.source.revision, eos_token_ids(files), shape)
