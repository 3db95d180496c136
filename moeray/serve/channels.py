"""The parts of a chat's answer where the model marks them itself, by special tokens: gpt-oss's harmony format.

`<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`: what stands in the channel
`final` is the answer, what stands in others (analysis, commentary) how the model came to it.
Source: the format's description in OpenAI's cookbook, "OpenAI harmony response format".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from moeray.serve.detokenize import Decode

_FINAL = "final"


class Part(StrEnum):
    """What a client sees as the answer, and as how the model came to it."""

    CONTENT = "content"
    REASONING = "reasoning"


@dataclass(frozen=True, slots=True)
class Markers:
    """Ids of the special tokens: `channel` begins a channel's name, `message` its text, each of `ends` ends that."""

    channel: int
    message: int
    ends: frozenset[int]


def find_markers(special: Mapping[str, int]) -> Markers | None:
    """Those of a tokenizer with these special tokens; None where it does not mark channels."""
    if not {"<|channel|>", "<|message|>"} <= special.keys():
        return None
    ends = (special.get(f"<|{name}|>") for name in ("start", "end", "return", "call"))
    return Markers(special["<|channel|>"], special["<|message|>"], frozenset(i for i in ends if i is not None))


class Channels:
    """Reads one answer's tokens in order. One that begins without a marker is content."""

    def __init__(self, markers: Markers, decode: Decode) -> None:
        self._markers = markers
        self._decode = decode
        self._part: Part | None = Part.CONTENT
        self._name: list[int] | None = None

    def part_of(self, token_id: int) -> Part | None:
        """Where a token's text belongs; None for a marker, and for what stands between a message and the next."""
        if token_id == self._markers.channel:
            self._part, self._name = None, []
        elif token_id == self._markers.message:
            self._part, self._name = self._named(), None
        elif token_id in self._markers.ends:
            self._part, self._name = None, None
        elif self._name is not None:
            self._name.append(token_id)
        else:
            return self._part
        return None

    def _named(self) -> Part:
        """A message without a channel is content; a name may be followed by who it is for."""
        words = self._decode(self._name).split() if self._name else []
        return Part.CONTENT if not words or words[0] == _FINAL else Part.REASONING
