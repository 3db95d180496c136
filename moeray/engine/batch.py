"""One step's work, as the scheduler decides it and a runner computes it."""

from __future__ import annotations

from dataclasses import dataclass

from moeray.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Entry:
    """Compute tokens [start, start + count) of `seq`; `samples` where that reaches its last token."""

    seq: Sequence
    start: int
    count: int
    samples: bool

    @property
    def scored(self) -> range:
        """Places of its tokens that are to be told how likely they make the next one of the prompt."""
        first, end = self.seq.num_scored, self.seq.num_prompt - 1
        return range(max(self.start, first), min(self.start + self.count, end))


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work: decodes first, then prefill chunks."""

    entries: tuple[Entry, ...]

    @property
    def num_tokens(self) -> int:
        return sum(entry.count for entry in self.entries)

    @property
    def num_decodes(self) -> int:
        """Entries that compute their sequence's newest token alone (and a prompt's last one, where it is one token)."""
        return sum(entry.samples and entry.count == 1 for entry in self.entries)

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that get a token from this step, in the order of the runner's logits."""
        return [entry.seq for entry in self.entries if entry.samples]
