"""A completion job's deltas as OpenAI's `text_completion` objects."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from moeray.serve.generate import Delta, Generation, TokenRecord
from moeray.serve.job import Job
from moeray.serve.prompt_scores import LOWEST_LOGPROB, prompt_scores
from moeray.serve.responses import Completion, CompletionChoice, CompletionLogprobs, Finish, Usage
from moeray.serve.tokens import Vocabulary
from moeray.types import TokenLogprobs


async def plain_completion(job: Job, generation: Generation, vocabulary: Vocabulary) -> bytes:
    """The whole answer as JSON."""
    texts: list[list[str]] = [[] for _ in job.choices]
    tokens: list[list[TokenRecord]] = [[] for _ in job.choices]
    finishes: list[Finish | None] = [None for _ in job.choices]
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            texts[delta.index].append(delta.text)
            tokens[delta.index] += delta.tokens
            finishes[delta.index] = delta.finish
    choices = []
    for i in range(len(job.choices)):
        choice = _choice(job, vocabulary, Delta(i, "".join(texts[i]), tuple(tokens[i]), finishes[i]))
        if job.prompt_logprobs:
            ids = job.choices[i].request.prompt_ids
            choice.prompt_logprobs = prompt_scores(ids, generation.prompt_logprobs(i), vocabulary)
        choices.append(choice)
    return _object(job, choices, usage=generation.usage()).encode()


async def completion_events(job: Job, generation: Generation, vocabulary: Vocabulary) -> AsyncGenerator[bytes, None]:
    """The answer as stream chunks, each JSON."""
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            if delta.text or delta.finish:
                yield _object(job, [_choice(job, vocabulary, delta)], **generation.usage_so_far()).encode()
    if job.include_usage:
        yield _object(job, [], usage=generation.usage()).encode()


def _object(job: Job, choices: list[CompletionChoice], **usage: Usage | None) -> Completion:
    return Completion(
        id=job.id, object="text_completion", created=job.created, model=job.model.name, choices=choices, **usage
    )


def _choice(job: Job, vocabulary: Vocabulary, delta: Delta) -> CompletionChoice:
    wanted = job.choices[delta.index].request.sampling.logprobs is not None
    logprobs = _logprobs(vocabulary, delta.tokens) if wanted else None
    return CompletionChoice(index=delta.index, text=delta.text, logprobs=logprobs, finish_reason=delta.finish)


def _logprobs(vocabulary: Vocabulary, tokens: Sequence[TokenRecord]) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[vocabulary.token(token.token_id).text for token in tokens],
        token_logprobs=[None if t.logprobs is None else max(t.logprobs.logprob, LOWEST_LOGPROB) for t in tokens],
        top_logprobs=[
            None if t.logprobs is None else _alternatives(vocabulary, t.token_id, t.logprobs) for t in tokens
        ],
        text_offset=[token.offset for token in tokens],
    )


def _alternatives(vocabulary: Vocabulary, chosen: int, logprobs: TokenLogprobs) -> dict[str, float]:
    """The likeliest tokens, and the chosen one where it is not among them."""
    found: dict[str, float] = {}
    for token_id, logprob in (*logprobs.top, (chosen, logprobs.logprob)):
        found.setdefault(vocabulary.token(token_id).text, max(logprob, LOWEST_LOGPROB))
    return found
