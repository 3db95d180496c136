"""Run a job's choices side by side and hand out their text as it comes, in one order for plain and streamed answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Literal

from moeray.serve.backend import Backend
from moeray.serve.channels import Channels, Part
from moeray.serve.detokenize import IncrementalDetokenizer
from moeray.serve.echo import Echo
from moeray.serve.errors import GenerationFailedError
from moeray.serve.job import Choice, Job
from moeray.serve.responses import PromptTokensDetails, Usage
from moeray.serve.tokens import Vocabulary
from moeray.types import FinishReason, TokenLogprobs, TokenOutput

_QUEUED_DELTAS = 64  # then a client that reads slowly holds its own choices up, not the memory


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """One token of the answer, or of the prompt that it repeats, with its log probabilities, which a prompt's first
    token has not; `offset` is where its text begins, in characters."""

    token_id: int
    logprobs: TokenLogprobs | None
    offset: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What a choice gained. The first delta of a choice may be empty; the last one alone has `finish`.

    `reasoning`: how a model that marks it came to its answer, which goes before `text`.
    """

    index: int
    text: str
    tokens: tuple[TokenRecord, ...] = ()
    finish: Literal["stop", "length"] | None = None
    reasoning: str = ""


class ChoiceRun:
    """Turns one choice's TokenOutputs into deltas: the first one at once, later ones for `interval` tokens each. Tokens
    whose text is held back wait for it. A token that ends the sequence has no text, unless the job shows it.
    `first`: the run of the prompt's first choice, None for that one itself. `prompt_logprobs`: of the prompt's tokens
    from the second on, as far as they are there; the first choice's are those of all."""

    def __init__(
        self, choice: Choice, job: Job, vocabulary: Vocabulary, interval: int, first: ChoiceRun | None = None
    ) -> None:
        self.choice = choice
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.finished = False
        self.begun = asyncio.Event()
        self.scorer = first if first is not None and first.choice.request.sampling.prompt_logprobs is not None else None
        self.prompt_logprobs: list[TokenLogprobs] = [] if self.scorer is None else self.scorer.prompt_logprobs
        self._job = job
        self._echo = job.echoes[choice.prompt] if job.echoes else Echo("")
        self._min_tokens = choice.request.sampling.min_tokens
        self._with_logprobs = choice.request.sampling.logprobs is not None
        self._interval = interval
        self._waiting: list[TokenRecord] = []
        self._waiting_text: dict[Part, list[str]] = {part: [] for part in Part}
        self._told = 0
        marked = None if job.continues_text else vocabulary.markers
        self._channels = None if marked is None else Channels(marked, vocabulary.decode)
        self._part = Part.CONTENT
        self._ended: set[Part] = set()
        self._detokenizer = partial(
            IncrementalDetokenizer, vocabulary.decode, stop=job.stop, include_stop=job.include_stop, skip=job.skip
        )
        self._text = self._detokenizer(context=choice.request.prompt_ids[-8:] if job.continues_text else ())

    def advance(self, output: TokenOutput) -> Delta | None:
        """The delta of `output`, None when it shows nothing yet. Raises GenerationFailedError."""
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            raise GenerationFailedError(output.error or f"the sequence ended early ({output.finish_reason})")
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        self.prompt_logprobs += output.prompt_logprobs
        if not output.token_ids and output.finish_reason is None:
            return None  # a part of the prompt
        begins = not self.begun.is_set()
        if begins:
            self._repeat_prompt()
            self.begun.set()
        for place in range(len(output.token_ids) if self._job.answers else 0):
            self._take(output, place)
        finish = self._finish(output)
        if finish is not None:
            self._wait(self._text.finish(self._may_stop))
            if self._text.stopped:
                finish = "stop"
        if not begins and finish is None and not (self._waits and self._is_due()):
            return None
        return self._delta(finish)

    def rest(self) -> Delta | None:
        """What waits to be shown of a choice that has failed."""
        return self._delta(None) if self._waits else None

    def _wait(self, text: str) -> None:
        if text:
            self._waiting_text[self._part].append(text)

    @property
    def _waits(self) -> bool:
        """Whether there is text to be shown."""
        return any(self._waiting_text.values())

    def _is_due(self) -> bool:
        return not self._told or self.completion_tokens - self._told >= self._interval

    def _repeat_prompt(self) -> None:
        self._wait(self._echo.text)
        if self._echo.offsets:
            scores = (None, *self.prompt_logprobs)
            each = zip(self.choice.request.prompt_ids, scores, self._echo.offsets, strict=True)
            self._waiting += [TokenRecord(*record) for record in each]

    @property
    def _may_stop(self) -> bool:
        """Whether a stop string counts that ends in the newest token's text."""
        return self.completion_tokens > self._min_tokens

    def _take(self, output: TokenOutput, place: int) -> None:
        if self._text.stopped:
            return
        token_id = output.token_ids[place]
        self.completion_tokens += 1
        if self._with_logprobs:
            offset = len(self._echo.text) + self._text.offset
            self._waiting.append(TokenRecord(token_id, output.logprobs[place], offset))
        ends = output.finish_reason is FinishReason.STOP and place == len(output.token_ids) - 1
        part = self._part if self._channels is None else self._channels.part_of(token_id)
        if ends and not self._job.include_stop:
            return
        if part is None:
            self._end_message()
            return
        if part in self._ended:  # messages of one part, a line each
            self._ended.discard(part)
            self._waiting_text[part].append("\n")
        self._part = part
        self._wait(self._text.feed(token_id, self._may_stop))

    def _end_message(self) -> None:
        """Nothing of it belongs to what comes: neither half a character nor the beginning of a stop string."""
        if self._text.offset:
            self._ended.add(self._part)
        self._wait(self._text.finish(self._may_stop))
        if not self._text.stopped:
            self._text = self._detokenizer()

    def _finish(self, output: TokenOutput) -> Literal["stop", "length"] | None:
        if not self._job.answers:
            return "length"
        if self._text.stopped or output.finish_reason is FinishReason.STOP:
            return "stop"
        return "length" if output.finish_reason is FinishReason.LENGTH else None

    def _delta(self, finish: Literal["stop", "length"] | None) -> Delta:
        tokens: tuple[TokenRecord, ...] = ()
        text, reasoning = ("".join(self._waiting_text[part]) for part in (Part.CONTENT, Part.REASONING))
        self._waiting_text = {part: [] for part in Part}
        if text or reasoning:
            self._told = self.completion_tokens
        if text or reasoning or finish is not None:
            tokens, self._waiting = tuple(self._waiting), []
        self.finished = finish is not None
        return Delta(self.choice.index, text, tokens, finish, reasoning)


class Generation:
    """One job on its way. `deltas` runs once, with `interval` tokens in each of a choice but the first; `usage` is
    exact when it has ended."""

    def __init__(self, backend: Backend, job: Job, vocabulary: Vocabulary, interval: int = 1) -> None:
        self._backend = backend
        self._job = job
        self._runs: list[ChoiceRun] = []
        firsts: dict[int, ChoiceRun] = {}
        for choice in job.choices:
            self._runs.append(ChoiceRun(choice, job, vocabulary, interval, firsts.get(choice.prompt)))
            firsts.setdefault(choice.prompt, self._runs[-1])

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Every choice's deltas, interleaved as they come. Closing it aborts what still runs.

        Raises the first error of any choice, after the others were aborted.
        """
        queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(_QUEUED_DELTAS)
        tasks = [asyncio.create_task(self._follow(run, queue)) for run in self._runs]
        running = len(tasks)
        try:
            while running:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def prompt_logprobs(self, index: int) -> list[TokenLogprobs]:
        """Of the prompt's tokens of a choice, from the second on."""
        return self._runs[index].prompt_logprobs

    def usage(self) -> Usage:
        """Token counts; what the prefix cache held of a prompt is what its least lucky choice found there."""
        prompt = sum(self._job.prompt_lengths)
        completion = sum(run.completion_tokens for run in self._runs)
        cached: dict[int, int] = {}
        for run in self._runs:
            place = run.choice.prompt
            cached[place] = min(cached.get(place, run.cached_tokens), run.cached_tokens)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(cached.values())),
        )

    def usage_so_far(self) -> dict[str, Usage | None]:
        """What a chunk of a stream but the last says of usage: with `include_usage` OpenAI sends null, and vLLM the
        counts where they are asked for all along."""
        if self._job.continuous_usage:
            return {"usage": self.usage()}
        return {"usage": None} if self._job.include_usage else {}

    async def _follow(self, run: ChoiceRun, queue: asyncio.Queue[Delta | Exception | None]) -> None:
        """Send one choice's deltas, then None; or the error that ended it. Where the first choice has the prompt
        scored, the others start behind it: they need its scores, and find the prompt in the prefix cache."""
        try:
            if run.scorer is not None:
                await run.scorer.begun.wait()
            async with aclosing(self._backend.generate(run.choice.request)) as stream:
                async for output in stream:
                    if (delta := run.advance(output)) is not None:
                        await queue.put(delta)
                    if run.finished:
                        if output.finish_reason is None:
                            self._backend.stopped(output.request_id)
                        break
                else:
                    raise GenerationFailedError("the sequence's stream ended without a reason")
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise  # it is us who stop it
            await queue.put(GenerationFailedError("the sequence was cancelled by the system"))
        except Exception as error:  # whatever it is, the one who waits for the deltas gets it
            if (rest := run.rest()) is not None:
                await queue.put(rest)
            await queue.put(error)
        else:
            await queue.put(None)
