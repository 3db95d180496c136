"""Where a checkpoint's files come from: a local folder or the Hugging Face hub, one file at a time."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import (
    hf_hub_download,
    parse_safetensors_file_metadata,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from moeray.errors import CheckpointError, one_line

log = logging.getLogger(__name__)

# the base of the hub client's errors is its HTTP library's, which differs between versions of the client
_TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_HUB_ERRORS = (OSError, _TRANSPORT_ERROR, EntryNotFoundError, HFValidationError)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_METADATA = (
    "config.json",
    "generation_config.json",
    "*.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
)


@dataclass(frozen=True)
class Source:
    """A model's files as one node sees them. `folder` is set for a local one, else `model` is a hub id.

    `revision`: on the hub, the commit that every file is taken from.
    """

    model: str
    node: str
    folder: Path | None
    revision: str | None = None

    def path_of(self, filename: str) -> Path:
        """The file's path on this node, fetched from the hub when it is not there yet. Raises CheckpointError.

        Safe to call from many processes at once: the download is locked and resumes where an earlier one stopped.
        """
        if self.folder is not None:
            path = self.folder / filename
            if not path.is_file():
                raise CheckpointError(
                    f"file {path} is not there on node {self.node}; copy it there, mount the folder at the same path, "
                    "or give a hub id as the model"
                )
            return path
        try:
            return Path(hf_hub_download(self.model, filename, revision=self.revision))
        except _HUB_ERRORS as error:
            raise _hub_error(self.model, filename, self.node, error) from error

    def at_hand(self, filename: str) -> Path | None:
        """The file's path if this node has it already; never downloads."""
        if self.folder is not None:
            path = self.folder / filename
            return path if path.is_file() else None
        cached = try_to_load_from_cache(self.model, filename, revision=self.revision)
        return Path(cached) if isinstance(cached, str) else None

    def dtypes(self, filename: str) -> dict[str, str]:
        """The dtype of each tensor of a weight file of the hub, as its header names it: the header alone is fetched.
        Empty where it cannot be had so."""
        if self.folder is not None:
            return {}
        try:
            header = parse_safetensors_file_metadata(self.model, filename, revision=self.revision)
        except (*_HUB_ERRORS, SafetensorsParsingError) as error:
            log.info("the header of file %s of model %s could not be fetched alone: %s", filename, self.model, error)
            return {}
        return {name: str(tensor.dtype) for name, tensor in header.tensors.items()}

    def metadata_dir(self) -> Path:
        """A folder with the config, tokenizer, chat template and index, without weights. Raises CheckpointError."""
        if self.folder is not None:
            self.path_of("config.json")
            return self.folder
        try:
            return Path(snapshot_download(self.model, revision=self.revision, allow_patterns=list(_METADATA)))
        except _HUB_ERRORS as error:
            raise _hub_error(self.model, "config.json", self.node, error) from error


def resolve(model: str, revision: str | None, *, node: str) -> Source:
    """Find `model`: a folder of this node, else a hub id, whose metadata is fetched and whose commit is pinned.

    `node` names this node in errors. Raises CheckpointError.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        source = Source(model, node, folder.resolve())
        source.path_of("config.json")
        return source
    if folder.is_file():
        raise CheckpointError(f"model {model} is a file; give the folder that holds config.json and *.safetensors")
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"model folder {model} is not there on node {node}; copy or mount it at this path, or give a hub id"
        )
    source = Source(model, node, None, revision)
    config = source.metadata_dir() / "config.json"
    if not config.is_file():
        raise CheckpointError(f"file config.json is not in hub model {model}; give a model in transformers' format")
    # a hub cache keeps each commit in a folder of its name
    return replace(source, revision=config.parent.name)


def _hub_error(model: str, filename: str, node: str, error: Exception) -> CheckpointError:
    if isinstance(error, GatedRepoError):
        mend = "it is gated: accept its terms on the hub and set HF_TOKEN on every node"
    elif isinstance(error, RepositoryNotFoundError):
        mend = "there is no such folder on this node and no such public hub id; check the name, or set HF_TOKEN"
    elif isinstance(error, RevisionNotFoundError):
        mend = "the hub has no such revision; check the revision"
    elif isinstance(error, HfHubHTTPError) and isinstance(error, EntryNotFoundError):
        mend = "the hub's repository has no such file; give another revision or model"
    else:
        mend = (
            f"there is no such folder on this node, and the hub could not be reached ({one_line(error)[:200]}); check "
            "the path, or the network"
        )
    return CheckpointError(f"file {filename} of model {model} could not be fetched on node {node}: {mend}")
