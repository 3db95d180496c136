"""The config tree: frozen dataclasses, validated once. An unknown key is an error that names the nearest key.

Sources, later wins: defaults, `MOERAY_*` environment variables for secrets and the log level, a YAML file,
command-line flags.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml
from cronsim import CronSim, CronSimError

from moeray.errors import ConfigError
from moeray.tree import build, merged, to_tree

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "float16", "bfloat16"]
Kernel = Literal["auto", "native", "torch"]
ExpertKernel = Literal["auto", "native", "triton", "torch"]
LinearKernel = Literal["auto", "native", "onednn", "torch"]
Quantization = Literal["none", "int8"]

ROUTER = "router"
"""The routers' name beside those of the expert groups."""

_SECONDS = ("report_s", "silence_s", "lease_s", "orphan_s", "interval_s", "window_s", "drain_s", "idle_s", "start_s")

ENVIRONMENT = {
    "wire.token": "MOERAY_CLUSTER_TOKEN",
    "serve.api_key": "MOERAY_API_KEY",
    "log_level": "MOERAY_LOG_LEVEL",
}
"""Key -> the variable that gives its value where neither a file nor a flag does."""
SECRETS = ("wire.token", "serve.api_key")


def _require(ok: bool, key: str, mend: str) -> None:
    if not ok:
        raise ConfigError(f"config key {key}: {mend}")


def _span(actors: int, low: int | None, high: int | None) -> tuple[int, int]:
    return actors if low is None else low, actors if high is None else high


def _check_span(group: ExpertGroupConfig | RouterConfig, key: str) -> None:
    low, high = group.actors_span
    _require(
        1 <= low <= group.actors <= high,
        f"{key}.actors",
        f"must lie between min_actors ({low}) and max_actors ({high}), got {group.actors}",
    )


def _check_cron(expression: str) -> None:
    _require(len(expression.split()) == 5, "control.schedule.cron", f"must have 5 fields, got {expression!r}")
    try:
        CronSim(expression, datetime(2000, 1, 1, tzinfo=UTC))
    except CronSimError as error:
        raise ConfigError(
            f"config key control.schedule.cron: {expression!r} is no cron expression ({error}); "
            "its fields are minute, hour, day of month, month, day of week"
        ) from error


@dataclass(frozen=True)
class ExpertGroupConfig:
    """One kind of expert actor.

    `actors`: how many of this kind; `share`: the part of the experts that the group hosts, relative to the other
    groups' shares (each expert lives in `experts.replicas` actors in all); `memory_gib` bounds the weights of one
    actor (None: what its device has free). `num_gpus` None means one GPU,
    or an equal part where there are more actors than GPUs; `num_cpus` None means half of `threads`, since routers and
    experts take turns on the cores.

    `actors` is the number at the start; the controller keeps it between `min_actors` and `max_actors` (None: `actors`
    itself, so that a group scales only where it is told how far). `price_per_hour` is what one actor costs, in any
    currency: the cheaper group grows first.
    """

    name: str = "experts"
    actors: int = 2
    device: Device = "auto"
    num_cpus: float | None = None
    num_gpus: float | None = None
    threads: int = 1
    share: float = 1.0
    memory_gib: float | None = None
    resources: dict[str, float] = field(default_factory=dict)
    min_actors: int | None = None
    max_actors: int | None = None
    price_per_hour: float = 1.0

    def __post_init__(self) -> None:
        _require(self.actors >= 1, "experts.groups.actors", f"must be at least 1, got {self.actors}")
        _check_span(self, "experts.groups")
        _require(self.price_per_hour >= 0, "experts.groups.price_per_hour", "must be 0 or more")
        _require(self.threads >= 1, "experts.groups.threads", f"must be at least 1, got {self.threads}")
        _require(self.share > 0, "experts.groups.share", f"must be above 0, got {self.share}")
        for key in ("num_cpus", "num_gpus", "memory_gib"):
            value = getattr(self, key)
            _require(value is None or value >= 0, f"experts.groups.{key}", f"must be 0 or more, got {value}")

    @property
    def actors_span(self) -> tuple[int, int]:
        """(fewest, most) actors of the group."""
        return _span(self.actors, self.min_actors, self.max_actors)


@dataclass(frozen=True)
class ExpertsConfig:
    """`groups` lists the kinds of expert actors; `replicas` is how many actors host each expert at the start.

    `actors`, `device`, `num_cpus`, `num_gpus`, `threads` and `memory_gib` describe the one group where `groups` is
    empty.

    `kernel`: what multiplies. `native` are moeray's own kernels for CPUs, `triton` those for GPUs; `auto` is the one
    for the actor's device, except in float32 and where it cannot compute a layer, which runs on `torch` then.
    `quantization: int8` keeps dense weights as int8 with a scale for each output, made in the cache folder: half the
    memory and its traffic, somewhat less exact.
    `pin_threads`: an actor on a CPU keeps its compute threads on cores that no other actor of the machine has, as long
    as there are as many; switch it off where other programs compute on the same cores.
    """

    actors: int = 2
    device: Device = "auto"
    num_cpus: float | None = None
    num_gpus: float | None = None
    threads: int = 1
    memory_gib: float | None = None
    min_actors: int | None = None
    max_actors: int | None = None
    replicas: int = 1
    kernel: ExpertKernel = "auto"
    quantization: Quantization = "none"
    pin_threads: bool = True
    groups: tuple[ExpertGroupConfig, ...] = ()

    def __post_init__(self) -> None:
        _require(self.replicas >= 1, "experts.replicas", f"must be at least 1, got {self.replicas}")
        actors = sum(g.actors for g in self.resolved())
        _require(
            self.replicas <= actors,
            "experts.replicas",
            f"asks for {self.replicas} replicas of each expert but there are {actors} actors; lower it or add actors",
        )
        names = [g.name for g in self.groups]
        _require(len(set(names)) == len(names), "experts.groups.name", f"names must differ, got {names}")

    def resolved(self) -> tuple[ExpertGroupConfig, ...]:
        """The groups, or the one that the short form describes."""
        return self.groups or (
            ExpertGroupConfig(
                "experts",
                self.actors,
                self.device,
                self.num_cpus,
                self.num_gpus,
                self.threads,
                memory_gib=self.memory_gib,
                min_actors=self.min_actors,
                max_actors=self.max_actors,
            ),
        )


@dataclass(frozen=True)
class RouterConfig:
    """The actors that hold the trunk and the KV cache."""

    actors: int = 1
    device: Device = "auto"
    num_cpus: float = 0.5
    num_gpus: float | None = None
    threads: int = 0
    resources: dict[str, float] = field(default_factory=dict)
    min_actors: int | None = None
    max_actors: int | None = None
    price_per_hour: float = 1.0

    def __post_init__(self) -> None:
        _require(self.actors >= 1, "router.actors", f"must be at least 1, got {self.actors}")
        _require(self.threads >= 0, "router.threads", "must be 0 (all cores of the node) or more")
        _check_span(self, "router")

    @property
    def actors_span(self) -> tuple[int, int]:
        """(fewest, most) routers."""
        return _span(self.actors, self.min_actors, self.max_actors)


@dataclass(frozen=True)
class EngineConfig:
    """Batching and the KV cache.

    `max_batch_tokens` is the token budget of a step (prefill chunks + one token per running sequence).
    `prefill_chunk` bounds the prefill tokens of one step while sequences are decoding.
    `kv_blocks` 0 means as many as `kv_cache_fraction` of the free memory at start holds, at most `kv_cache_bytes`.

    `attention`: what computes the attention of decoding sequences: `native`, moeray's kernel in C (fp32 and bf16 on the
    CPU), `torch`, or `auto`, the kernel where it can. `linear`: what computes the trunk's linear layers: `native`,
    `onednn` (packed weights, bf16 on the CPU), `torch`, or `auto`, which goes by dtype, device and CPU.
    """

    max_context: int = 0
    max_running: int = 64
    max_waiting: int = 1024
    max_batch_tokens: int = 2048
    prefill_chunk: int = 256
    block_size: int = 16
    kv_blocks: int = 0
    kv_cache_fraction: float = 0.2
    kv_cache_bytes: int = 4 << 30
    prefix_cache: bool = True
    attention: Kernel = "auto"
    linear: LinearKernel = "auto"

    def __post_init__(self) -> None:
        for key in ("max_running", "max_waiting", "max_batch_tokens", "prefill_chunk", "block_size"):
            _require(getattr(self, key) >= 1, f"engine.{key}", f"must be at least 1, got {getattr(self, key)}")
        _require(self.max_context >= 0, "engine.max_context", "must be 0 (the model's own) or more")
        _require(self.kv_blocks >= 0, "engine.kv_blocks", "must be 0 (chosen from free memory) or more")
        _require(0 < self.kv_cache_fraction <= 0.9, "engine.kv_cache_fraction", "must be above 0 and at most 0.9")
        _require(
            self.max_running <= self.max_batch_tokens,
            "engine.max_running",
            f"must be at most engine.max_batch_tokens ({self.max_batch_tokens}), since each running sequence "
            "decodes a token a step",
        )


@dataclass(frozen=True)
class WireConfig:
    """The data plane. `token` None: read MOERAY_CLUSTER_TOKEN, else one is made for each start.

    `send_timeout_s` bounds one send to a peer that does not read, `handshake_timeout_s` the wait for a peer's proof,
    and `max_channels` the channels that one listener serves at once (of each kind).
    """

    host: str = "127.0.0.1"
    grpc: bool = True
    max_header_bytes: int = 1 << 20
    max_payload_bytes: int = 1 << 30
    shared_memory_bytes: int = 8 << 20
    deadline_s: float = 60.0
    send_timeout_s: float = 10.0
    handshake_timeout_s: float = 5.0
    max_channels: int = 256
    token: str | None = field(default=None, repr=False)
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None

    def __post_init__(self) -> None:
        for key in ("deadline_s", "send_timeout_s", "handshake_timeout_s"):
            _require(getattr(self, key) > 0, f"wire.{key}", "must be above 0 seconds")
        _require(self.max_channels >= 1, "wire.max_channels", f"must be at least 1, got {self.max_channels}")
        _require(0 < self.max_payload_bytes < 1 << 32, "wire.max_payload_bytes", "must be above 0 and below 4 GiB")
        _require(0 < self.max_header_bytes < 1 << 32, "wire.max_header_bytes", "must be above 0 and below 4 GiB")
        _require((self.tls_cert is None) == (self.tls_key is None), "wire.tls_cert", "goes with wire.tls_key; set both")


@dataclass(frozen=True)
class ScheduleConfig:
    """A floor for a group while a time span lasts: `actors` at least, from each moment of `cron` (UTC) on for
    `duration_s` seconds. `group` is an expert group's name or `router`."""

    cron: str = ""
    group: str = "experts"
    actors: int = 1
    duration_s: float = 3600.0

    def __post_init__(self) -> None:
        _check_cron(self.cron)
        _require(self.actors >= 1, "control.schedule.actors", f"must be at least 1, got {self.actors}")
        _require(self.duration_s > 0, "control.schedule.duration_s", "must be above 0 seconds")


@dataclass(frozen=True)
class ControlConfig:
    """How the controller watches and decides.

    Watching: every actor reports each `report_s` seconds; one that is silent for `silence_s` is replaced, and a router
    that does not acknowledge a placement for `lease_s` too. An actor that hears of no controller for `orphan_s` stops.

    Deciding, every `interval_s`: each of `policies` (a shipped name, or a dotted path to one of your own) says how many
    actors and replicas it wants, and the largest wish wins. Growth is at once, by at most `max_growth` times; a shrink
    needs `shrink_votes` decisions in a row that want less. `target_utilisation` is the busy part of an actor that is
    aimed at, `slo_queue_wait_s` the p99 wait of rows at an actor, `idle_s` how long without load until the minimum;
    `slo_ttft_s` (to the first token) and `slo_tpot_s` (between tokens) are what the policy `latency` keeps to, by
    aiming at `slo_aim` of them (without them it has no opinion), and at more or less of them while more or fewer than
    `slo_attainment` of the requests keep to both.
    `replica_budget` bounds the replicas of hot experts beyond `experts.replicas`, as a part of all experts;
    `max_skew` is the max/mean load per actor of a layer above which experts are moved or replicated, and
    `migration_cost` what moving one expert costs, in units of the mean expert's load.
    `window_s` is the time constant of the load windows. `target_running` requests per router are aimed at.

    `warm_pool`: started, empty expert actors kept in reserve. `autoscale` false: only repair and manual commands.
    `audit_log`: a JSONL file of every decision (None: `audit/NAME.jsonl` in the cache folder). `drain_s` bounds the
    wait for what an actor that leaves still has in flight. `warm_start`: processes without a GPU are forks of a zygote
    on their node, which has imported everything; without it each imports for seconds (needed with `image_uri`).
    `start_s` gives a start up that takes longer, the wait for nodes and for weights from a hub included; with
    `check_room` one is refused at once where the cluster, as it is, has no room for the actors: switch that off where
    Ray's autoscaler adds nodes for them. `resources`: custom Ray resources of the node that the controller runs on.
    """

    report_s: float = 1.0
    silence_s: float = 3.0
    lease_s: float = 5.0
    orphan_s: float = 600.0
    interval_s: float = 2.0
    window_s: float = 10.0
    policies: tuple[str, ...] = ("target_utilisation", "latency", "hot_experts", "idle", "schedule", "queue_wait")
    target_utilisation: float = 0.6
    slo_queue_wait_s: float = 0.25
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    slo_aim: float = 0.7
    slo_attainment: float = 0.99
    shrink_votes: int = 15
    max_growth: float = 2.0
    idle_s: float = 300.0
    replica_budget: float = 0.25
    max_skew: float = 1.25
    migration_cost: float = 0.02
    target_running: int = 32
    warm_pool: int = 0
    autoscale: bool = True
    schedule: tuple[ScheduleConfig, ...] = ()
    audit_log: str | None = None
    drain_s: float = 30.0
    warm_start: bool = True
    start_s: float = 600.0
    check_room: bool = True
    resources: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in _SECONDS:
            _require(getattr(self, key) > 0, f"control.{key}", "must be above 0 seconds")
        for key in ("slo_ttft_s", "slo_tpot_s"):
            _require(getattr(self, key) is None or getattr(self, key) > 0, f"control.{key}", "must be above 0 seconds")
        _require(0 < self.slo_aim <= 1, "control.slo_aim", "must be above 0 and at most 1")
        _require(0 < self.slo_attainment < 1, "control.slo_attainment", "must be above 0 and below 1")
        _require(0 < self.target_utilisation <= 1, "control.target_utilisation", "must be above 0 and at most 1")
        _require(self.shrink_votes >= 1, "control.shrink_votes", f"must be at least 1, got {self.shrink_votes}")
        _require(self.max_growth > 1, "control.max_growth", f"must be above 1, got {self.max_growth}")
        _require(self.replica_budget >= 0, "control.replica_budget", "must be 0 or more")
        _require(self.max_skew > 1, "control.max_skew", f"must be above 1, got {self.max_skew}")
        _require(self.warm_pool >= 0, "control.warm_pool", "must be 0 or more")
        _require(self.target_running >= 1, "control.target_running", "must be at least 1")


@dataclass(frozen=True)
class ServeConfig:
    """The endpoint. `api_key` None: read MOERAY_API_KEY; without one the endpoint is open.

    `wait_for_system`: Serve counts a replica as started once the system is ready, so that a rolling update waits for
    it; without it a replica answers as soon as there is a controller, with 503 while the system loads.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = "moeray"
    model_name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    replicas: int = 1
    max_body_bytes: int = 4 << 20
    request_timeout_s: float = 600.0
    wait_for_system: bool = False

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, "serve.port", f"must be between 0 and 65535, got {self.port}")
        _require(self.max_body_bytes >= 1024, "serve.max_body_bytes", "must be at least 1024")


@dataclass(frozen=True)
class MetricsConfig:
    """`expert_load`: rows by (layer, expert); a model with more experts than `max_expert_series` has them by layer,
    under the expert `all`. `ray`: also repeat every series to Ray's metrics agents, as `ray_moeray_*`."""

    expert_load: bool = True
    max_expert_series: int = 20_000
    ray: bool = False

    def __post_init__(self) -> None:
        _require(self.max_expert_series >= 0, "metrics.max_expert_series", "must be 0 or more")


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
        known = [group.name for group in self.experts.resolved()] + [ROUTER]
        for entry in self.control.schedule:
            _require(
                entry.group in known,
                "control.schedule.group",
                f"no group is named {entry.group!r}; there are {', '.join(known)}",
            )

    @property
    def served_model_name(self) -> str:
        """What the endpoint and the metrics call the model."""
        return self.serve.model_name or Path(self.model).name


def default_cache_dir() -> Path:
    """`MOERAY_CACHE_DIR`, else `$XDG_CACHE_HOME/moeray`, else `~/.cache/moeray`."""
    if explicit := os.environ.get("MOERAY_CACHE_DIR"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moeray"


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a YAML file, then lay `overrides` (dotted keys, such as `engine.block_size`) over it.

    Raises ConfigError, with the key, for an unknown key, a value of the wrong type or out of range.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = _read_yaml(Path(path))
    for dotted, value in (overrides or {}).items():
        _set(tree, dotted.split("."), value)
    for dotted, variable in ENVIRONMENT.items():
        if variable in os.environ:
            value = os.environ[variable]
            _set_default(tree, dotted.split("."), value.lower() if dotted == "log_level" else value)
    return config_from(tree)


def config_from(tree: Mapping[str, Any]) -> Config:
    """Build a Config from nested plain data (what YAML or JSON gives). Raises ConfigError."""
    return build(Config, tree)


def overlay(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with nested plain data laid over it: mappings are merged, anything else (lists too) takes the place of
    what was there. Raises ConfigError."""
    return config_from(merged(to_tree(config), changes))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}; check the path") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path}: the top level must be a mapping of keys")
    return tree


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = value


def _set_default(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            return  # what stands there is told with its key when the config is built
    tree.setdefault(keys[-1], value)
