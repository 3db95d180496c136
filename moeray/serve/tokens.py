"""A tokenizer's vocabulary seen from the output side: ids to text, and single tokens to their bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moeray.serve.channels import Markers, find_markers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_START = "\u2581"  # SentencePiece writes a leading space so


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token as OpenAI shows it: `text` is `bytes:\\x..` where the bytes alone are not UTF-8."""

    text: str
    data: bytes


class Vocabulary:
    """Reads a transformers tokenizer; ids beyond its table have no text.

    `special_ids` have none either; `markers` are those of a chat's channels, None where there are none; `eos_id` ends a
    text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, TokenText] = {}
        added = tokenizer.added_tokens_decoder
        special = {str(token): int(i) for i, token in added.items() if token.special}
        self.special_ids = frozenset(special.values())
        self.markers: Markers | None = find_markers(special)
        self.eos_id: int | None = tokenizer.eos_token_id

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` together, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def token(self, token_id: int) -> TokenText:
        """One token by itself."""
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._read(token_id)
        return found

    def _read(self, token_id: int) -> TokenText:
        data = self._bytes(token_id)
        try:
            return TokenText(data.decode(), data)
        except UnicodeDecodeError:
            return TokenText("bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data)

    def _bytes(self, token_id: int) -> bytes:
        text = self.decode([token_id])
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        if name is None:
            return b""
        if match := _BYTE_TOKEN.fullmatch(name):
            return bytes([int(match[1], 16)])
        if "\ufffd" in text and all(character in _BYTE_OF for character in name):
            return bytes(_BYTE_OF[character] for character in name)
        spaces = _leading(name, _WORD_START) - _leading(text, " ")  # a decoder drops the first space of a text
        return (" " * spaces + text).encode()


def _leading(text: str, character: str) -> int:
    return len(text) - len(text.lstrip(character))


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one character: printable latin-1 as itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
