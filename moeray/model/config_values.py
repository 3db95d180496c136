"""What config.json must say for a model to be built at all: values out of range are refused by their key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from moeray.errors import CheckpointError

_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts_per_tok")
_COUNTS = (
    *_NEEDED, "num_key_value_heads", "vocab_size", "intermediate_size", "moe_intermediate_size",
    "max_position_embeddings",
)  # fmt: skip
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_FIELD = re.compile(r"[Ff]ield '(\w+)'")
_MEND = "use the config.json that belongs to the checkpoint"


def check_values(raw: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError for a number, an activation or a theta that no model has. Other types than numbers are
    left to transformers."""
    for key in (*_COUNTS, *_EXPERTS):
        value = raw.get(key, 1)
        if (type(value) is int and value < 1) or (value is None and key in _NEEDED):
            raise _refusal(path, key, value, "must be 1 or more")
    window = raw.get("sliding_window")
    if type(window) is int and window < 0:
        raise _refusal(path, "sliding_window", window, "must be 0 or more, or null")
    act = raw.get("hidden_act")
    if isinstance(act, str) and act not in ACT2FN:
        raise _refusal(path, "hidden_act", act, "must be an activation that transformers has")
    for key, theta in _thetas(raw):
        if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0:
            raise _refusal(path, key, theta, "must be a number above 0")


def _thetas(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if "rope_theta" in raw:
        yield "rope_theta", raw["rope_theta"]
    ropes = raw.get("rope_parameters")
    for name, rope in {"": ropes, **ropes}.items() if isinstance(ropes, dict) else ():
        if isinstance(rope, dict) and "rope_theta" in rope:
            yield ".".join(filter(None, ("rope_parameters", name, "rope_theta"))), rope["rope_theta"]


def check_experts(config: PreTrainedConfig, path: Path) -> None:
    """Raises CheckpointError where a token has more experts than there are."""
    values = vars(config)  # whose attributes may refuse to be read where layers differ
    top_k = values.get("num_experts_per_tok")
    for key in _EXPERTS:
        count = values.get(key)
        if type(count) is int and type(top_k) is int and top_k > count:
            raise _refusal(path, "num_experts_per_tok", top_k, f"must be at most {key}, which is {count}")


def refusal_of(error: Exception, raw: Mapping[str, Any], path: Path) -> CheckpointError | None:
    """For transformers' complaint about a value's type; None for any other."""
    found = _FIELD.search(str(error))
    if found is None or found[1] not in raw:
        return None
    wanted = re.search(rf"[Ff]ield '{found[1]}' expected (\w+)", str(error))
    why = f"must be of type {wanted[1]}" if wanted else "must be of another type"
    return _refusal(path, found[1], raw[found[1]], why)


def _refusal(path: Path, key: str, value: Any, why: str) -> CheckpointError:
    return CheckpointError(f"file {path}: {key} is {repr(value)[:80]} and {why}; {_MEND}")
