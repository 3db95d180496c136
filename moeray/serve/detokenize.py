"""Token ids to text deltas that never show half a character nor any part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

Decode = Callable[[Sequence[int]], str]

_HALF = "\ufffd"  # what decoders write for bytes that are no character yet
_MAX_PENDING = 32  # a character spans at most 4 tokens; a longer run is output that is not UTF-8 at all
_CONTEXT_TOKENS = 8
_CHARACTER_TOKENS = 4


class IncrementalDetokenizer:
    """Feed it a sequence's tokens in order; the deltas together are the text, cut before the first stop string, or
    behind it with `include_stop`.

    `decode` maps ids to text; `skip` lists ids without text (special tokens). `context` are the ids before the first
    one, for tokenizers that drop the space of a first word. Its state follows from the tokens alone, so feeding
    the tokens of an earlier attempt again brings it to where that attempt was.
    """

    def __init__(
        self,
        decode: Decode,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip: Collection[int] = frozenset(),
        context: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._skip = skip
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._longest = max(map(len, self._stop), default=0)
        self._ids = self._whole([i for i in context if i not in skip][-_CONTEXT_TOKENS:])
        self._read = len(self._ids)  # _ids[:_read] are decoded in full already and only give context
        self._read_text = self._decode(self._ids) if self._ids else ""
        self._shown = 0  # characters of the pending window that were taken already
        self._held = ""  # decoded, but it may begin a stop string
        self._sent = 0
        self.stopped = False

    @property
    def offset(self) -> int:
        """Where the next token's text begins, in characters; text that is held back counts."""
        return self._sent + len(self._held)

    def feed(self, token_id: int, may_stop: bool = True) -> str:
        """The text that this token made certain, often none. Nothing comes after `stopped`, and no stop string ends in
        the text of a token that may not stop it."""
        if self.stopped or token_id in self._skip:
            return ""
        self._ids.append(token_id)
        return self._take(self._decode_pending(final=False), final=False, may_stop=may_stop)

    def finish(self, may_stop: bool = True) -> str:
        """The text that was held back, now that no more tokens come."""
        if self.stopped:
            return ""
        return self._take(self._decode_pending(final=True), final=True, may_stop=may_stop)

    def _decode_pending(self, *, final: bool) -> str:
        """New text of the window behind `_read`, without the half characters that may still be completed."""
        if self._read == len(self._ids):
            return ""
        window = self._decode(self._ids)[len(self._read_text) :]
        pending = len(self._ids) - self._read
        if not window.endswith(_HALF) or final or pending >= _MAX_PENDING:
            new = window[self._shown :]
            self._slide()
            return new
        certain = len(window.rstrip(_HALF))
        new = window[self._shown : certain]
        self._shown = max(self._shown, certain)
        return new

    def _slide(self) -> None:
        """Keep only the tokens just decoded, as the context of the next ones."""
        self._ids = self._ids[self._read :][-_CONTEXT_TOKENS:]
        self._read = len(self._ids)
        self._read_text = self._decode(self._ids)
        self._shown = 0

    def _whole(self, ids: list[int]) -> list[int]:
        """Without the end of a character that begins before them: decoders that fall back to bytes take a whole run of
        them for broken, with what follows in it."""
        for first in range(_CHARACTER_TOKENS):
            if not self._decode(ids[first:]).startswith(_HALF):
                return ids[first:]
        return ids

    def _take(self, new: str, *, final: bool, may_stop: bool) -> str:
        """Hand out what cannot belong to a stop string any more. A stop string begins in held text or later, and ends
        in new text."""
        text = self._held + new
        if may_stop and (cut := self._find_stop(text, len(self._held))) is not None:
            self.stopped = True
            text = text[:cut]
        keep = 0 if self.stopped or final else self._may_begin_stop(text)
        end = len(text) - keep
        self._held = text[end:]
        self._sent += end
        return text[:end]

    def _find_stop(self, text: str, held: int) -> int | None:
        """Where the text ends by the stop string that begins first, of those that end behind the first `held`
        characters."""
        found = [
            (place, place + len(stop))
            for stop in self._stop
            if (place := text.find(stop, max(0, held + 1 - len(stop)))) >= 0
        ]
        return min(found)[self._include_stop] if found else None

    def _may_begin_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), self._longest - 1)
        return next((n for n in range(longest, 0, -1) if self._begins_stop(text[-n:])), 0)

    def _begins_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stop)
