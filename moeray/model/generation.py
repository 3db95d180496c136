"""How a model's authors would have it generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moeray.errors import CheckpointError


def generation_defaults(metadata_dir: Path) -> dict[str, Any]:
    """What the model's authors advise (generation_config.json), {} where the file is absent. Raises CheckpointError."""
    path = metadata_dir / "generation_config.json"
    try:
        defaults = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise CheckpointError(f"file {path} is not valid JSON ({error}); mend or remove it") from error
    if not isinstance(defaults, dict):
        raise CheckpointError(f"file {path} must hold a JSON object; mend or remove it")
    return defaults
