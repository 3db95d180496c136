"""Text and chat messages to prompt tokens, by the model's own tokenizer and chat template."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from moeray.errors import CheckpointError, ConfigError, RequestError, in_a_line, one_line
from moeray.serve.backend import ModelInfo
from moeray.serve.tokens import Vocabulary

# transformers imports its parts when they are asked for, and in a circle: of two threads that ask at once one can
# find a module that is not whole yet, and gets an ImportError.
_IMPORTING = threading.Lock()

_INLINE_CHARACTERS = 8192  # about a millisecond of tokenizing; longer text goes to a thread

# A template is code: on messages or variables that it did not expect it raises its own errors or any of Python's.
_TEMPLATE_FAULTS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    NameError,
    RecursionError,
    TypeError,
    ValueError,
)


class PromptEncoder:
    """Tokenizes prompts. Safe to call from several threads at once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocabulary = Vocabulary(tokenizer)

    async def encode_prompts(self, prompts: Sequence[str | Sequence[int]]) -> list[tuple[int, ...]]:
        """Token ids of each prompt; text gets the special tokens that the tokenizer puts around a prompt."""
        if sum(map(len, prompts)) <= _INLINE_CHARACTERS:
            return self._prompts(prompts)
        return await asyncio.to_thread(self._prompts, prompts)

    async def encode_chat(self, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any]) -> tuple[int, ...]:
        """Token ids of the rendered chat, up to where the assistant's answer begins.

        Raises RequestError where there is no chat template or the template refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise RequestError(
                "this model has no chat template; use /v1/completions, or start the server with chat_template set",
                param="messages",
                code="no_chat_template",
            )
        if sum(len(text) for message in messages for text in message.values()) <= _INLINE_CHARACTERS:
            return self._chat(messages, variables)
        return await asyncio.to_thread(self._chat, messages, variables)

    def knows(self, variable: str) -> bool:
        """Whether the chat template reads a variable of this name."""
        return variable in str(self._tokenizer.chat_template)

    def _prompts(self, prompts: Sequence[str | Sequence[int]]) -> list[tuple[int, ...]]:
        return [
            tuple(self._tokenizer(prompt, verbose=False)["input_ids"] if isinstance(prompt, str) else prompt)
            for prompt in prompts
        ]

    def _chat(self, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any]) -> tuple[int, ...]:
        conversation = [self._known_role(message) for message in messages]
        try:
            ids = self._tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=True, return_dict=False, **variables
            )
        except _TEMPLATE_FAULTS as error:
            raise RequestError(
                f"the chat template refused the messages: {one_line(error)[:500]}",
                param="messages",
                code="chat_template_error",
            ) from error
        return tuple(ids)

    def _known_role(self, message: Mapping[str, str]) -> dict[str, str]:
        """`developer` is OpenAI's later name for `system`; most templates know only the older one."""
        role = message["role"]
        if role == "developer" and not self.knows("developer"):
            role = "system"
        return {**message, "role": role}


def import_tokenizers() -> Any:
    """transformers' AutoTokenizer. The first call takes seconds (torch, too), for which nobody should wait once a model
    is there, and a process that serves nothing never pays them. Safe to call from several threads at once.
    """
    with _IMPORTING:
        from transformers import AutoTokenizer

        return AutoTokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether there are files of one."""
    return any(path for pattern in ("tokenizer*", "vocab*", "*.model", "merges.txt") for path in folder.glob(pattern))


def load_tokenizer(folder: Path) -> Any:
    """Raises CheckpointError."""
    try:
        return import_tokenizers().from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever transformers and tokenizers raise for files that they cannot read
        reason = in_a_line(error) if has_tokenizer(folder) else "there are no files of one"
        raise CheckpointError(
            f"no usable tokenizer in {folder}: {reason}; put tokenizer.json and tokenizer_config.json there"
        ) from error


def load_encoder(model: ModelInfo, chat_template: str | None) -> PromptEncoder:
    """Load the tokenizer from `model.metadata_dir`; takes seconds. Raises CheckpointError or ConfigError.

    `chat_template`, a file or the template itself, replaces the model's own.
    """
    tokenizer = load_tokenizer(Path(model.metadata_dir))
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    if (fast := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        # Set once here, so that no later call changes the shared tokenizer while another thread reads it.
        fast.no_truncation()
        fast.no_padding()
    return PromptEncoder(tokenizer)


def read_template(source: str) -> str:
    """A chat template given as a file's path or as the text itself. Raises ConfigError."""
    text = source if "{{" in source or "{%" in source else _read_text(source)
    with _IMPORTING:
        from transformers.utils.chat_template_utils import render_jinja_template
    try:
        render_jinja_template([[]], chat_template=text)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"config key chat_template: {source[:80]!r} is no Jinja template: {error.message} (line {error.lineno}); "
            "correct it"
        ) from error
    except _TEMPLATE_FAULTS:
        return text  # it wants messages
    return text


def _read_text(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"config key chat_template: {source!r} is no Jinja template and cannot be read as a file ({reason}); "
            "check the path"
        ) from error


class EncoderCache:
    """Loads the encoder once, in a thread, when the first request needs it or `get` is called to warm it up."""

    def __init__(self, chat_template: str | None) -> None:
        self._chat_template = chat_template
        self._lock = asyncio.Lock()
        self._loaded: tuple[ModelInfo, PromptEncoder] | None = None

    async def get(self, model: ModelInfo) -> PromptEncoder:
        """The encoder of `model`. Raises what `load_encoder` raises."""
        async with self._lock:
            if self._loaded is None or self._loaded[0] is not model:
                self._loaded = model, await asyncio.to_thread(load_encoder, model, self._chat_template)
            return self._loaded[1]
