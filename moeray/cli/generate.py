"""`moeray generate MODEL`: one prompt, one answer, then everything is stopped."""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from moeray.cli.options import config_of, config_options
from moeray.config import Config
from moeray.errors import CheckpointError, RequestError
from moeray.types import FinishReason, GenerationRequest, SamplingParams, TokenOutput


@click.command("generate")
@click.argument("model")
@click.option("--prompt", help="Text to continue.")
@click.option("--prompt-ids", help="Token ids to continue, such as 1,2,3.")
@click.option("--max-tokens", type=int, default=16, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True)
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--top-k", type=int, default=0, show_default=True)
@click.option("--min-p", type=float, default=0.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True)
@click.option("--presence-penalty", type=float, default=0.0, show_default=True)
@click.option("--frequency-penalty", type=float, default=0.0, show_default=True)
@click.option("--logprobs", type=int, default=0, show_default=True, help="Alternatives to report per token.")
@click.option("--ignore-eos", is_flag=True, help="Go on behind an end-of-sequence token.")
@click.option("--local", is_flag=True, help="Run every actor in this process, without Ray.")
@click.option("--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@config_options
def command(model: str, prompt: str | None, prompt_ids: str | None, local: bool, output: str, **flags: Any) -> None:
    """Generate from MODEL (a local folder or a hub id) and print the answer.

    The system that runs in the cluster is used where it serves the model just so; else one is started for this, and
    stopped at the end.
    """
    config = config_of(model, flags.pop("config_file"), flags)
    names = SamplingParams.__dataclass_fields__
    sampling = SamplingParams(**{key: value for key, value in flags.items() if key in names})
    if (prompt is None) == (prompt_ids is None):
        raise RequestError("give one of --prompt and --prompt-ids", param="prompt")
    ids = None if prompt_ids is None else _parse_ids(prompt_ids)
    answer = asyncio.run(_generate(config, prompt or "", ids, sampling, local))
    if output == "json":
        click.echo(json.dumps(answer))
    elif answer["text"] is not None:
        click.echo(answer["text"])
    else:
        click.echo(",".join(map(str, answer["token_ids"])))


async def _generate(
    config: Config, prompt: str, ids: tuple[int, ...] | None, sampling: SamplingParams, local: bool
) -> dict[str, Any]:
    from moeray.cli.session import local_system, running_or_own
    from moeray.logs import setup_logging
    from moeray.serve.bounds import check_prompt, max_tokens

    setup_logging(replace(config, log_requests=False))  # the output says what each has become
    async with local_system(config) if local else running_or_own(config, "generate") as backend:
        assert backend.model is not None
        tokenizer = _tokenizer(backend.model.metadata_dir, needed=ids is None)
        if ids is None:
            ids = tuple(tokenizer(prompt)["input_ids"])
        check_prompt(ids, backend.model, "prompt")
        limit = max_tokens(len(ids), sampling.max_tokens, 0, backend.model, "max_tokens")
        request = GenerationRequest(uuid.uuid4().hex, ids, replace(sampling, max_tokens=limit))
        outputs = [output async for output in backend.generate(request)]
    return _answer(outputs, len(ids), tokenizer)


def _parse_ids(text: str) -> tuple[int, ...]:
    try:
        ids = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"--prompt-ids must be numbers with commas between, got {text!r}", param="prompt") from None
    if min(ids) < 0:
        raise RequestError(f"--prompt-ids must be 0 or more, got {text!r}", param="prompt")
    return ids


def _tokenizer(folder: Path, *, needed: bool) -> Any:
    """None where there is none and none is needed."""
    from moeray.serve.prompt import has_tokenizer, load_tokenizer

    try:
        return load_tokenizer(folder)
    except CheckpointError as error:
        if needed:
            raise RequestError(f"{error}, or give --prompt-ids", param="prompt") from error
        if has_tokenizer(folder):
            click.echo(f"moeray: {error}", err=True)
        return None


def _answer(outputs: list[TokenOutput], prompt_tokens: int, tokenizer: Any) -> dict[str, Any]:
    last = outputs[-1]
    if last.finish_reason is FinishReason.ERROR:
        click.echo(f"moeray: {last.error}", err=True)
        sys.exit(1)
    ids = [token for output in outputs for token in output.token_ids]
    logprobs = [
        {"logprob": entry.logprob, "top": [{"token_id": t, "logprob": lp} for t, lp in entry.top]}
        for output in outputs
        for entry in output.logprobs
    ]
    return {
        "token_ids": ids,
        "text": tokenizer.decode(ids, skip_special_tokens=True) if tokenizer else None,
        "logprobs": logprobs,
        "finish_reason": last.finish_reason.value if last.finish_reason else None,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(ids),
            "total_tokens": prompt_tokens + len(ids),
            "cached_tokens": max(output.cached_tokens for output in outputs),
        },
    }
