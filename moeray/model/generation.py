"""How a model's authors would have it generate."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moeray.errors import CheckpointError, RequestError
from moeray.types import SamplingParams

log = logging.getLogger(__name__)

_SAMPLING = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}


def generation_defaults(metadata_dir: Path) -> dict[str, Any]:
    """What the model's authors advise (generation_config.json), {} where the file is absent; how to sample only as far
    as it can be done. Raises CheckpointError."""
    path = metadata_dir / "generation_config.json"
    try:
        defaults = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise CheckpointError(f"file {path} is not valid JSON ({error}); mend or remove it") from error
    if not isinstance(defaults, dict):
        raise CheckpointError(f"file {path} must hold a JSON object; mend or remove it")
    return {name: value for name, value in defaults.items() if name not in _SAMPLING} | dict(_sampling(defaults, path))


def _sampling(defaults: Mapping[str, Any], path: Path) -> Iterator[tuple[str, int | float]]:
    for name in _SAMPLING & defaults.keys():
        value = defaults[name]
        if value is None:
            continue
        if name == "top_k" and isinstance(value, float) and value.is_integer():
            value = int(value)
        try:
            if isinstance(value, bool) or not isinstance(value, int if name == "top_k" else int | float):
                raise RequestError(f"{name} must be a number, got {value!r}")
            given: dict[str, Any] = {name: max(0, value) if name == "top_k" else value}  # below 0 is off, too
            SamplingParams(**given)
        except RequestError as error:
            log.warning("file %s is not followed in this: %s", path, error)
        else:
            yield name, value
