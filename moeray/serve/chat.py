"""A chat job's deltas as OpenAI's `chat.completion` objects and chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from moeray.serve.generate import Delta, Generation, TokenRecord
from moeray.serve.job import Job
from moeray.serve.prompt_scores import LOWEST_LOGPROB, prompt_scores
from moeray.serve.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    Finish,
    TopLogprob,
    Usage,
)
from moeray.serve.tokens import Vocabulary


async def plain_chat(job: Job, generation: Generation, vocabulary: Vocabulary) -> bytes:
    """The whole answer as JSON."""
    texts: list[list[str]] = [[] for _ in job.choices]
    reasoning: list[list[str]] = [[] for _ in job.choices]
    tokens: list[list[TokenRecord]] = [[] for _ in job.choices]
    finishes: list[Finish] = ["stop" for _ in job.choices]
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            texts[delta.index].append(delta.text)
            reasoning[delta.index].append(delta.reasoning)
            tokens[delta.index] += delta.tokens
            finishes[delta.index] = delta.finish or finishes[delta.index]
    choices = [
        ChatChoice(
            index=index,
            message=_message("".join(texts[index]), "".join(reasoning[index])),
            logprobs=_logprobs(job, vocabulary, tokens[index]),
            finish_reason=finishes[index],
        )
        for index in range(len(job.choices))
    ]
    answer = ChatCompletion(
        id=job.id,
        object="chat.completion",
        created=job.created,
        model=job.model.name,
        choices=choices,
        usage=generation.usage(),
    )
    if job.prompt_logprobs:
        answer.prompt_logprobs = prompt_scores(
            job.choices[0].request.prompt_ids, generation.prompt_logprobs(0), vocabulary
        )
    return answer.encode()


async def chat_events(job: Job, generation: Generation, vocabulary: Vocabulary) -> AsyncGenerator[bytes, None]:
    """The answer as stream chunks, each JSON: for each choice its role, its text, its end; then the usage if asked."""
    begun: set[int] = set()

    def chunk(choice: ChatChunkChoice) -> bytes:
        return _object(job, [choice], **generation.usage_so_far()).encode()

    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            if delta.index not in begun:
                begun.add(delta.index)
                yield chunk(_part(delta.index, ChatDelta(role="assistant", content="")))
            logprobs = _logprobs(job, vocabulary, delta.tokens)
            if delta.reasoning:
                yield chunk(_part(delta.index, ChatDelta(reasoning_content=delta.reasoning), logprobs))
                logprobs = None
            if delta.text:
                yield chunk(_part(delta.index, ChatDelta(content=delta.text), logprobs))
            if delta.finish:
                yield chunk(_end(job, vocabulary, delta))
    if job.include_usage:
        yield _object(job, [], usage=generation.usage()).encode()


def _message(text: str, reasoning: str) -> ChatMessage:
    if not reasoning:
        return ChatMessage(role="assistant", content=text, refusal=None)
    return ChatMessage(role="assistant", content=text, reasoning_content=reasoning, refusal=None)


def _part(index: int, delta: ChatDelta, logprobs: ChatLogprobs | None = None) -> ChatChunkChoice:
    return ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=None)


def _end(job: Job, vocabulary: Vocabulary, delta: Delta) -> ChatChunkChoice:
    """The closing chunk; it carries the last tokens' log probabilities where no text could."""
    rest = () if delta.text or delta.reasoning else delta.tokens
    logprobs = _logprobs(job, vocabulary, rest) if rest else None
    return ChatChunkChoice(index=delta.index, delta=ChatDelta(), logprobs=logprobs, finish_reason=delta.finish)


def _object(job: Job, choices: list[ChatChunkChoice], **usage: Usage | None) -> ChatChunk:
    return ChatChunk(
        id=job.id, object="chat.completion.chunk", created=job.created, model=job.model.name, choices=choices, **usage
    )


def _logprobs(job: Job, vocabulary: Vocabulary, tokens: Sequence[TokenRecord]) -> ChatLogprobs | None:
    if job.choices[0].request.sampling.logprobs is None:
        return None
    return ChatLogprobs(content=[_token(vocabulary, token) for token in tokens], refusal=None)


def _token(vocabulary: Vocabulary, token: TokenRecord) -> ChatTokenLogprob:
    assert token.logprobs is not None, "a chat's answer repeats no prompt"
    shown = _top(vocabulary, token.token_id, token.logprobs.logprob)
    top = [_top(vocabulary, token_id, logprob) for token_id, logprob in token.logprobs.top]
    return ChatTokenLogprob(token=shown.token, logprob=shown.logprob, bytes=shown.bytes, top_logprobs=top)


def _top(vocabulary: Vocabulary, token_id: int, logprob: float) -> TopLogprob:
    text = vocabulary.token(token_id)
    return TopLogprob(token=text.text, logprob=max(logprob, LOWEST_LOGPROB), bytes=list(text.data))
