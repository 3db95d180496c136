"""A checkpoint: its config, its index, and its tensors as read-only views that every process of the node shares."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from moeray.errors import CheckpointError, UnsupportedModelError, in_a_line
from moeray.model.config_values import check_experts, check_values, refusal_of
from moeray.model.safetensors_file import DTYPES, SafetensorsFile, TensorInfo
from moeray.model.source import Source, resolve

__all__ = ["Checkpoint", "Quantization", "Scheme", "Source", "TensorInfo", "resolve"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OTHER_FORMS = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf")


class Scheme(StrEnum):
    """How a checkpoint's quantised weights are stored."""

    NONE = "none"
    FP8_BLOCK = "fp8"
    MXFP4 = "mxfp4"


@dataclass(frozen=True, slots=True)
class Quantization:
    """`block`: rows and columns of an FP8 block; None for the other schemes."""

    scheme: Scheme = Scheme.NONE
    block: tuple[int, int] | None = None


class Checkpoint:
    """Thread-safe. Opens a weight file when one of its tensors is first asked for, and no sooner.

    `config` never carries a `quantization_config`: it is split off into `quantization`. A `dtype` that it does not name
    is that of the weights, for which the header of a file of theirs is read at once.
    """

    def __init__(
        self,
        source: Source,
        config: PreTrainedConfig,
        quantization: Quantization,
        files: dict[str, str],
        fingerprint: str,
    ) -> None:
        self.source = source
        self.config = config
        self.quantization = quantization
        self.fingerprint = fingerprint
        self._files = files
        self._open: dict[str, SafetensorsFile] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, source: Source) -> Checkpoint:
        """Read config and index. Raises CheckpointError, UnsupportedModelError."""
        folder = source.metadata_dir()
        raw_config = _read_json(source.path_of("config.json"))
        quantization = _quantization(raw_config)
        config = _read_config(folder, raw_config)
        index = folder / INDEX
        whole = source.folder is not None and (folder / SINGLE).is_file()  # which transformers looks for first
        if index.is_file() and not whole:
            files = _read_index(index)
            opened: dict[str, SafetensorsFile] = {}
        else:
            only = SafetensorsFile.open(_single_file(source))
            files = dict.fromkeys(only.tensors, SINGLE)
            opened = {SINGLE: only}
        sizes = None if index.is_file() and not whole else files
        checkpoint = cls(source, config, quantization, files, _fingerprint(source, folder, sizes))
        checkpoint._open = opened
        if config.dtype is None:
            config.dtype = checkpoint._dtype_of_weights()
        return checkpoint

    def _dtype_of_weights(self) -> torch.dtype | None:
        """That of the first tensor, by name, which is of one to compute in."""
        headers: dict[str, dict[str, str]] = {}
        for key in sorted(self._files):
            name = self._files[key]
            known = self.peek(key)
            if known is None and name not in headers:
                headers[name] = self.source.dtypes(name)
            found = known.dtype if known is not None else DTYPES.get(headers[name].get(key, ""))
            dtype = found or self.info(key).dtype
            if dtype in _DTYPES:
                return dtype
        return None

    def keys(self) -> Iterable[str]:
        """Names of all tensors, as the index or the only file lists them."""
        return self._files.keys()

    @property
    def index_name(self) -> str:
        """The file that lists the tensors, for error messages."""
        return SINGLE if SINGLE in self._files.values() else INDEX

    def file_of(self, key: str) -> str:
        """Name of the file that holds the tensor. Raises CheckpointError."""
        if key not in self._files:
            raise CheckpointError(
                f"tensor {key} is not in {self.index_name} of model {self.source.model}; fetch the checkpoint again"
            )
        return self._files[key]

    def info(self, key: str) -> TensorInfo:
        """What the header of the tensor's file says of it, fetching that file. Raises CheckpointError."""
        return self._file(self.file_of(key)).info(key)

    def peek(self, key: str) -> TensorInfo | None:
        """`info`, or None when this node does not have the tensor's file (it is not fetched)."""
        name = self.file_of(key)
        if name not in self._open and self.source.at_hand(name) is None:
            return None
        return self.info(key)

    def tensor(self, key: str) -> Tensor:
        """A zero-copy CPU view of the file's memory map; never write to it. Raises CheckpointError."""
        return self._file(self.file_of(key)).tensor(key)

    def slice(self, key: str, expert: int) -> Tensor:
        """Row `expert` of a fused tensor, as a view. Raises CheckpointError."""
        shape = self.info(key).shape
        if not shape or not 0 <= expert < shape[0]:
            raise CheckpointError(
                f"tensor {key} of shape {list(shape)} in file {self.file_of(key)} has no row for expert {expert}; "
                "the checkpoint does not fit its config.json"
            )
        return self.tensor(key)[expert]

    def _file(self, name: str) -> SafetensorsFile:
        with self._lock:
            opened = self._open.get(name)
        if opened is not None:
            return opened
        path = self.source.path_of(name)  # outside the lock: this may download for minutes
        with self._lock:
            if name not in self._open:
                self._open[name] = SafetensorsFile.open(path)
            return self._open[name]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"file {path} is not readable JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"file {path} must hold a JSON object; fetch it again")
    return value


def _read_config(folder: Path, raw: dict[str, Any]) -> PreTrainedConfig:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"file {folder / 'config.json'} has no model_type; give a model in transformers' format")
    if "auto_map" in raw and model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"model type {model_type!r} of {folder / 'config.json'} is code of the checkpoint's own (auto_map), which "
            "moeray never runs; give a model of a family that transformers has, or, if this one computes what such a "
            "family does, set model_type to that"
        )
    check_values(raw, folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises for values that it did not expect
        if refused := refusal_of(error, raw, folder / "config.json"):
            raise refused from error
        raise UnsupportedModelError(
            f"model type {model_type!r} of {folder / 'config.json'} is not one that this transformers reads: "
            f"{in_a_line(error)}"
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    check_experts(config, folder / "config.json")
    return config


def _quantization(raw: dict[str, Any]) -> Quantization:
    found = raw.get("quantization_config")
    if not found:
        return Quantization()
    if not isinstance(found, dict):
        raise CheckpointError(f"quantization_config of config.json must be a JSON object, got {found!r}")
    method = found.get("quant_method")
    if method == Scheme.MXFP4:
        return Quantization(Scheme.MXFP4)
    if method != Scheme.FP8_BLOCK:
        raise UnsupportedModelError(
            f"quant_method {method!r} of config.json is not supported; use a bf16, fp16, fp32, FP8 block or MXFP4 "
            "checkpoint of the model"
        )
    block = found.get("weight_block_size", (128, 128))
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise UnsupportedModelError(
            f"weight_block_size {block!r} of config.json is not supported; only FP8 with two-dimensional blocks is"
        )
    return Quantization(Scheme.FP8_BLOCK, (block[0], block[1]))


def _read_index(path: Path) -> dict[str, str]:
    files = _read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"file {path} has no weight_map; fetch it again")
    for key, name in files.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"file {path}: tensor {key} lies in {name!r}, which is not a safetensors file beside the index; "
                "convert the checkpoint to safetensors"
            )
    return files


def _single_file(source: Source) -> Path:
    """The only weight file. Raises CheckpointError, which names what a local folder holds in its place."""
    if source.folder is not None and not (source.folder / SINGLE).is_file():
        files = sorted(path for path in source.folder.iterdir() if path.is_file())
        if parts := [path.name for path in files if path.suffix == ".safetensors"]:
            raise CheckpointError(
                f"folder {source.folder} holds {parts[0]} but neither {SINGLE} nor {INDEX}; fetch what is missing, or "
                "convert it to transformers' format"
            )
        if others := [path.name for path in files if path.suffix in _OTHER_FORMS]:
            raise CheckpointError(
                f"folder {source.folder} holds {others[0]} but no safetensors; moeray reads no other form and never "
                "unpickles weights: convert it to safetensors (load it with transformers and call save_pretrained)"
            )
    return source.path_of(SINGLE)


def _fingerprint(source: Source, folder: Path, files: dict[str, str] | None) -> str:
    """The same on every node that sees the same checkpoint, without fetching weights that the node does not need.
    `files`: those whose sizes count; None where the index does."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    if source.folder is None:
        digest.update(f"\n{source.revision}".encode())
    if files is None:
        digest.update((folder / INDEX).read_bytes())
    else:
        for name in sorted(set(files.values())):
            digest.update(f"\n{name} {source.path_of(name).stat().st_size}".encode())
    return digest.hexdigest()


def dtype_of(config: PreTrainedConfig) -> torch.dtype:
    """The weights' dtype by the config; bfloat16 where it has none."""
    found = getattr(config, "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16
