"""Every config key as a flag: `engine.block_size` is `--engine-block-size`."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click

from moeray.config import ENVIRONMENT, SECRETS, Config, load_config
from moeray.errors import MoerayError

_F = TypeVar("_F", bound=Callable[..., Any])


class Finite(click.FloatRange):
    """A range without `nan`, which is outside of none, and without `inf`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def listed(kind: click.ParamType[Any]) -> Callable[[str], tuple[Any, ...]]:
    """Numbers with commas between, at least one."""

    def numbers(text: str) -> tuple[Any, ...]:  # its name is what help texts call the value
        return tuple(kind.convert(part.strip(), None, None) for part in text.split(","))

    return numbers


class _Seconds(Finite):
    """A span of time: `5`, or `5s`."""

    name = "number of seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str):
            value = value.removesuffix("s")
        return super().convert(value, param, ctx)


COUNT = click.IntRange(1)
SEED = click.IntRange(0)
PART = Finite(0, 1)
POSITIVE = Finite(0, min_open=True)
NOT_NEGATIVE = Finite(0)
SECONDS = _Seconds(0, min_open=True)
SECONDS_LEFT = _Seconds(0)

_SHORT = {"serve.api_key": "--api-key", "serve.port": "--port", "serve.host": "--host"}


def _keys(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, type hint, default) of every key that a flag can set; lists and mappings are left to YAML."""
    hints = get_type_hints(cls)
    for f in fields(cls):
        hint = hints[f.name]
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _keys(hint, f"{prefix}{f.name}.")
        elif get_origin(hint) not in (tuple, dict):
            yield f"{prefix}{f.name}", hint, f.default


def flag_of(key: str) -> str:
    return _SHORT.get(key, "--" + key.replace(".", "-").replace("_", "-"))


def _option(key: str, hint: Any, default: Any) -> Callable[[_F], _F]:
    args = tuple(a for a in get_args(hint) if a is not type(None)) if get_origin(hint) is not Literal else ()
    kind = args[0] if args else hint
    kwargs: dict[str, Any] = {"default": None, "help": _help(key, default)}
    flag = flag_of(key)
    if get_origin(kind) is Literal:
        kwargs["type"] = click.Choice(get_args(kind))
    elif kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    else:
        kwargs["type"] = kind
    return click.option(flag, _name(key), **kwargs)


def _help(key: str, default: Any) -> str:
    if key in SECRETS:
        return f"{key} [default: {ENVIRONMENT[key]}, which is better: lists of processes show flags]"
    return f"{key} [default: {ENVIRONMENT[key] + ', else ' if key in ENVIRONMENT else ''}{default}]"


def _name(key: str) -> str:
    return "config__" + key.replace(".", "__")


def config_options(command: _F) -> _F:
    """Add `--config FILE` and a flag for every config key but `model`."""
    for key, hint, default in reversed([row for row in _keys(Config) if row[0] != "model"]):
        command = _option(key, hint, default)(command)
    return click.option("--config", "config_file", type=click.Path(), help="YAML file with any of these keys.")(command)


def config_of(model: str, config_file: str | None, flags: dict[str, Any], **defaults: Any) -> Config:
    """The config that the flags describe; `defaults` (`__` for dots) rank below the file, and so does a model of "".

    Raises ConfigError.
    """
    overrides: dict[str, Any] = {"model": model} if model else {}
    for name, value in flags.items():
        if name.startswith("config__") and value is not None:
            overrides[name.removeprefix("config__").replace("__", ".")] = value
    if config_file is None:
        overrides = {key.replace("__", "."): value for key, value in defaults.items()} | overrides
    return load_config(config_file, overrides)


class UnfinishedError(MoerayError):
    """A command has done a part of what it was asked for; `done` is what it would have printed as JSON."""

    def __init__(self, message: str, done: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.done = done


def system_options(command: _F) -> _F:
    """The options of a command that talks to a running system: which one, where, and how to print.

    With `--output json` there is one object on stdout in any case: of an error it is `{"error": ...}`.
    """
    name = click.option("--name", default="moeray", show_default=True, help="The system's name (its serve.name).")
    address = click.option("--address", help="The Ray cluster's address [default: RAY_ADDRESS, else the local one].")
    output = click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
    return name(address(output(_with_errors(command))))


def _with_errors(command: _F) -> _F:
    @functools.wraps(command)
    def run(*args: Any, output: str, **given: Any) -> Any:
        try:
            return command(*args, output=output, **given)
        except MoerayError as error:
            if output == "json":
                done = error.done if isinstance(error, UnfinishedError) else {}
                click.echo(json.dumps({**done, "error": str(error)}))
            raise

    return run  # type: ignore[return-value]
