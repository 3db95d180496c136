"""How a model's authors would have it generate."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from moeray.errors import CheckpointError, RequestError
from moeray.types import SamplingParams

log = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def generation_config(metadata_dir: Path) -> dict[str, Any]:
    """The content of generation_config.json, {} where the file is absent. Raises CheckpointError."""
    path = metadata_dir / GENERATION_CONFIG
    try:
        config = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise CheckpointError(f"file {path} is not valid JSON ({error}); mend or remove it") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"file {path} must hold a JSON object; mend or remove it")
    return config


def sampling_defaults(metadata_dir: Path) -> dict[str, int | float]:
    """How its authors would have it sample, by the names of SamplingParams, as far as that can be done. Raises
    CheckpointError."""
    advice = generation_config(metadata_dir)
    defaults: dict[str, int | float] = {}
    for name in _SAMPLING:
        if (value := advice.get(name)) is None:
            continue
        try:
            defaults[name] = _checked(name, value)
        except RequestError as error:
            log.warning("file %s is not followed in this: %s", metadata_dir / GENERATION_CONFIG, error)
    return defaults


def _checked(name: str, value: Any) -> int | float:
    if name == "top_k" and isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int if name == "top_k" else int | float):
        raise RequestError(f"{name} must be a number, got {value!r}")
    given: dict[str, Any] = {name: max(0, value) if name == "top_k" else value}  # below 0 is off, too
    SamplingParams(**given)
    return value
