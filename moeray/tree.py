"""Plain data (what YAML or JSON gives) and the frozen dataclasses that it stands for."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from moeray.errors import ConfigError

_T = TypeVar("_T")


def build(cls: type[_T], tree: Any, where: str = "") -> _T:
    """`cls` from nested plain data. `where` is the key it stands under, with a dot behind. Raises ConfigError."""
    if not isinstance(tree, Mapping):
        raise ConfigError(
            f"config key {where.removesuffix('.') or 'top level'}: expected a mapping, got {type(tree).__name__}"
        )
    hints = get_type_hints(cls)
    for key in tree:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)
            raise ConfigError(f"unknown config key {where}{key}; the nearest known key is {where}{near[0]}")
    return cls(**{key: _convert(hints[key], value, f"{where}{key}") for key, value in tree.items()})


def require(ok: bool, key: str, mend: str) -> None:
    """Raises ConfigError, with the key and what it must be, unless `ok`."""
    if not ok:
        raise ConfigError(f"config key {key}: {mend}")


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        return build(hint, {} if value is None else value, f"{key}.")  # all that stood under the key is commented out
    if origin is Literal:
        if isinstance(value, bool):  # YAML takes on and off, without quotes, for true and false
            value = "on" if value else "off"
        if value not in args:
            raise ConfigError(f"config key {key}: must be one of {', '.join(map(str, args))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"config key {key}: expected a list, got {value!r}")
        return tuple(_convert(args[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"config key {key}: expected a mapping, got {value!r}")
        return {str(k): _convert(args[1], v, f"{key}.{k}") for k, v in value.items()}
    if origin is Union or type(hint).__name__ == "UnionType":
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, key)
    return _scalar(hint, value, key)


def _scalar(hint: Any, value: Any, key: str) -> Any:
    if isinstance(value, str) and hint in (int, float, bool):
        with suppress(yaml.YAMLError):  # `serve run app:build key=value` passes every value as a string
            value = yaml.safe_load(value)
    if isinstance(value, str) and hint is float:
        with suppress(ValueError):  # YAML takes 5e-1, without a dot, for a string
            value = float(value)
    accepted = (int, float) if hint is float else (hint,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"config key {key}: expected {hint.__name__}, got {value!r}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"config key {key}: must be a finite number, got {value!r}")
    return float(value) if hint is float else value


def to_tree(config: Any) -> Any:
    """The plain-data form of a config (the inverse of `config_from`), secrets included."""
    if is_dataclass(config):
        return {f.name: to_tree(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, tuple):
        return [to_tree(item) for item in config]
    return config


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with `changes` over it: mappings are merged, anything else takes the place of what was there. A mapping
    stays where its key has nothing under it."""
    result = dict(tree)
    for key, value in changes.items():
        below = result.get(key)
        if isinstance(below, dict) and (value is None or isinstance(value, Mapping)):
            value = merged(below, value or {})
        result[key] = value
    return result
