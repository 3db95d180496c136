"""What a request may ask of a model: its context and its vocabulary."""

from __future__ import annotations

from moeray.errors import RequestError
from moeray.serve.backend import ModelInfo


def check_prompt(ids: tuple[int, ...], model: ModelInfo, param: str) -> None:
    """Raises RequestError for a prompt that is empty, leaves no room for an answer, or has a token of no meaning."""
    if not ids:
        raise RequestError(f"{param} has no tokens; give some text", param=param, code="empty_prompt")
    if len(ids) >= model.max_context:
        raise RequestError(
            f"the prompt has {len(ids)} tokens but the model's context is {model.max_context} tokens, of which the "
            "answer needs at least one; shorten the prompt",
            param=param,
            code="context_length_exceeded",
        )
    check_token(max(ids), model, param)


def check_token(token_id: int, model: ModelInfo, param: str) -> None:
    """Raises RequestError for a token id beyond the vocabulary."""
    if token_id >= model.vocab_size:
        raise RequestError(
            f"{param}: token id {token_id} is not in the vocabulary of {model.vocab_size} tokens", param=param
        )


def max_tokens(prompt_tokens: int, wanted: int | None, default: int, model: ModelInfo, param: str) -> int:
    """As many as are wanted, else the default as far as the context goes. Raises RequestError beyond the context."""
    left = model.max_context - prompt_tokens
    if wanted is None:
        return min(default, left)
    if wanted > left:
        raise RequestError(
            f"{prompt_tokens} prompt tokens and {param}={wanted} are over the model's context of {model.max_context} "
            f"tokens; ask for at most {left}",
            param=param,
            code="context_length_exceeded",
        )
    return wanted
