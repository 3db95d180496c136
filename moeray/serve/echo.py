"""A prompt as the answer to it repeats it, where `echo` asks for that."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from moeray.serve.detokenize import IncrementalDetokenizer
from moeray.serve.tokens import Vocabulary

_INLINE_TOKENS = 512  # some milliseconds of detokenizing; longer prompts go to a thread


@dataclass(frozen=True, slots=True)
class Echo:
    """`offsets`: where the text of each of the prompt's tokens begins, in characters; empty where nobody asks."""

    text: str
    offsets: tuple[int, ...] = ()


async def echo_of(
    prompt: str | Sequence[int], ids: Sequence[int], vocabulary: Vocabulary, skip: Collection[int], with_offsets: bool
) -> Echo:
    """`prompt` as it was given, with its token ids; a text is repeated to the letter, whatever a tokenizer makes of it.
    Tokens in `skip` have no text."""
    if len(ids) <= _INLINE_TOKENS:
        return _echo(prompt, ids, vocabulary, skip, with_offsets)
    return await asyncio.to_thread(_echo, prompt, ids, vocabulary, skip, with_offsets)


def _echo(
    prompt: str | Sequence[int], ids: Sequence[int], vocabulary: Vocabulary, skip: Collection[int], with_offsets: bool
) -> Echo:
    text = prompt if isinstance(prompt, str) else vocabulary.decode([i for i in ids if i not in skip])
    if not with_offsets:
        return Echo(text)
    tokens = IncrementalDetokenizer(vocabulary.decode, skip=skip)
    offsets = []
    for token_id in ids:
        offsets.append(min(tokens.offset, len(text)))
        tokens.feed(token_id)
    return Echo(text, tuple(offsets))
