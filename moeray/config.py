"""The config tree: frozen dataclasses, validated once. An unknown key is an error that names the nearest key.

Sources, later wins: defaults, `MOERAY_*` environment variables for secrets and the log level, a YAML file,
command-line flags.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from moeray.errors import ConfigError
from moeray.settings.control import ControlConfig
from moeray.settings.engine import EngineConfig
from moeray.settings.experts import ExpertGroupConfig, ExpertsConfig
from moeray.settings.metrics import MetricsConfig
from moeray.settings.router import ROUTER, RouterConfig
from moeray.settings.serve import ServeConfig
from moeray.settings.wire import WireConfig
from moeray.tree import build, merged, require, to_tree

DType = Literal["auto", "float32", "float16", "bfloat16"]

ENVIRONMENT = {
    "wire.token": "MOERAY_CLUSTER_TOKEN",
    "serve.api_key": "MOERAY_API_KEY",
    "log_level": "MOERAY_LOG_LEVEL",
}
"""Key -> the variable that gives its value where neither a file nor a flag does."""
SECRETS = ("wire.token", "serve.api_key")


@dataclass(frozen=True)
class Config:
    """The whole tree. `model` is a local folder or a hub id.

    `log_format`, `log_level` and `log_requests` (a line for each request that ends) hold for every process of the
    system; MOERAY_LOG_LEVEL is the level where none is given.
    """

    model: str = ""
    revision: str | None = None
    dtype: DType = "auto"
    chat_template: str | None = None
    cache_dir: str | None = None
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_requests: bool = True
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    wire: WireConfig = field(default_factory=WireConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        known = {group.name: group.actors_span for group in self.experts.resolved()} | {ROUTER: self.router.actors_span}
        for entry in self.control.schedule:
            require(
                entry.group in known,
                "control.schedule.group",
                f"no group is named {entry.group!r}; there are {', '.join(known)}",
            )
            _, most = known[entry.group]
            require(
                entry.actors <= most,
                "control.schedule.actors",
                f"asks for {entry.actors} of {entry.group}, of which there are {most} at most; "
                "lower it or raise max_actors",
            )

    @property
    def served_model_name(self) -> str:
        """What the endpoint and the metrics call the model."""
        return self.serve.model_name or Path(self.model).name

    @property
    def most_sequences(self) -> int:
        """As many as all routers take at once, computed and queued, when there are as many routers as there may be."""
        return self.router.actors_span[1] * (self.engine.max_running + self.engine.max_waiting)

    @property
    def cache_folder(self) -> Path:
        """`cache_dir`, else `MOERAY_CACHE_DIR`, else `$XDG_CACHE_HOME/moeray`, else `~/.cache/moeray`."""
        if explicit := self.cache_dir or os.environ.get("MOERAY_CACHE_DIR"):
            return Path(explicit)
        return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moeray"


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a YAML file, then lay `overrides` (dotted keys, such as `engine.block_size`) over it. A model in a local
    folder is named by its whole path: the same words mean another folder elsewhere.

    Raises ConfigError, with the key, for an unknown key, a value of the wrong type or out of range.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = _read_yaml(Path(path))
    for dotted, value in (overrides or {}).items():
        _set(tree, dotted.split("."), value)
    for dotted, variable in ENVIRONMENT.items():
        if variable in os.environ:
            value = os.environ[variable].strip()  # what was read from a file often ends with a line break
            _set_default(tree, dotted.split("."), value.lower() if dotted == "log_level" else value)
    config = config_from(_with_path(tree))
    if config.experts.groups:
        _check_short_form(tree["experts"])
    return config


def _with_path(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The model's folder by its whole path, as far as it is known to be one; whoever opens it finds what is wrong."""
    model = tree.get("model")
    if not isinstance(model, str) or not model:
        return tree
    try:
        path = Path(model).expanduser()
        known = model.startswith(("/", "~", "./", "../")) or path.is_dir()
    except (OSError, RuntimeError, ValueError):  # no such user, a name that is too long, a folder that is closed
        return tree
    return {**tree, "model": os.path.abspath(path)} if known else tree


def _check_short_form(experts: Mapping[str, Any]) -> None:
    """Raises ConfigError for a key of the one group beside a list of groups: it would do nothing."""
    for key in sorted(experts.keys() & {each.name for each in fields(ExpertGroupConfig)}):
        raise ConfigError(
            f"config key experts.{key}: describes the one group where none is listed; give it to each of experts.groups"
        )


def config_from(tree: Mapping[str, Any]) -> Config:
    """Build a Config from nested plain data (what YAML or JSON gives). Raises ConfigError."""
    return build(Config, tree)


def overlay(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with nested plain data laid over it: mappings are merged, anything else (lists too) takes the place of
    what was there. Raises ConfigError."""
    return config_from(merged(to_tree(config), _with_path(changes)))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path}: the top level must be a mapping of keys")
    return tree


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    if (section := _section(tree, keys[:-1])) is not None:
        section[keys[-1]] = value


def _set_default(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    """Where nothing stands under the key, or no value behind it."""
    if (section := _section(tree, keys[:-1])) is not None and section.get(keys[-1]) is None:
        section[keys[-1]] = value


def _section(tree: dict[str, Any], keys: list[str]) -> dict[str, Any] | None:
    """The mapping under these keys, made where there is none, or nothing stands under a key; None where something else
    does, which is told with its key when the config is built."""
    for key in keys:
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            return None
    return tree
