"""`moeray demo`: a small model, upcycled to a Mixture of Experts, served by Ray actors and asked a question."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from moeray.cli.options import COUNT, config_of, config_options
from moeray.cli.progress import progress

QUESTION = "What is the capital of France?"


@click.command("demo")
@click.option("--question", default=QUESTION, show_default=True)
@click.option("--max-tokens", type=COUNT, default=64, show_default=True)
@click.option("--exit", "leave", is_flag=True, help="Stop after the answer instead of serving on.")
@config_options
def command(question: str, max_tokens: int, leave: bool, config_file: str | None, **flags: Any) -> None:
    """Download a small model, make it a Mixture of Experts, serve it on this machine and ask it QUESTION."""
    from moeray.cli.endpoint import running_endpoint, wait_for_interrupt

    config = config_of("", config_file, flags, serve__model_name="smollm2-moe", engine__max_context=2048)
    model = prepare(config.cache_folder)
    config = replace(config, model=str(model))
    click.echo("starting Ray, two expert groups, a router and the endpoint ...", err=True)
    with running_endpoint(config) as url:
        click.echo(f"\n> {question}", err=True)
        answer = ask(url, question, max_tokens, config.serve.api_key)
        click.echo(
            f"\n{answer.tokens} tokens, {answer.tokens_per_s:.1f} tokens/s after the first, "
            f"first token after {answer.first_s:.2f} s\n",
            err=True,
        )
        print_load(config.serve.name)
        click.echo(f"the endpoint: {url}/v1   (model {config.serve.model_name!r}; try any OpenAI client)", err=True)
        if not leave:
            click.echo("serving until Ctrl-C", err=True)
            wait_for_interrupt()


def prepare(cache: Path) -> Path:
    """The demo's checkpoint, made on the first call: SmolLM2-135M-Instruct as 8 experts, 2 a token, in bfloat16."""
    import torch

    from moeray.logs import setup_logging
    from moeray.model.smollm import fetch_smollm
    from moeray.model.upcycle import upcycle

    setup_logging()
    out = cache / "demo" / "smollm2-135m-8x-top2-bf16"
    if not out.exists():
        with progress() as report:
            gguf = fetch_smollm(cache, report)
            upcycle(gguf, out, experts=8, top_k=2, dtype=torch.bfloat16, progress=report)
    return out


@dataclass(frozen=True)
class Answer:
    tokens: int
    first_s: float
    tokens_per_s: float


def ask(url: str, question: str, max_tokens: int, api_key: str | None) -> Answer:
    """Stream the answer to the terminal, through the endpoint as any client would."""
    import json

    import httpx

    body = {
        "model": "smollm2-moe", "messages": [{"role": "user", "content": question}], "stream": True, "temperature": 0,
        "max_tokens": max_tokens, "stream_options": {"include_usage": True},
    }  # fmt: skip
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    began, first, tokens = time.perf_counter(), 0.0, 0
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=300.0) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            text = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            if text:
                first = first or time.perf_counter() - began
                click.echo(text, nl=False)
    click.echo()
    rest = time.perf_counter() - began - first
    return Answer(tokens, first, (tokens - 1) / rest if tokens > 1 and rest > 0 else 0.0)


def print_load(name: str) -> None:
    """A table of the rows that each expert has served, one line a layer."""
    from rich.console import Console
    from rich.table import Table

    from moeray.cluster.ray import ask as ask_controller
    from moeray.cluster.ray import find_controller

    rows: list[tuple[int, int, int]] = ask_controller(find_controller(name), "load")
    experts = max(expert for _, expert, _ in rows) + 1
    table = Table(title="rows served, by layer and expert", title_justify="left")
    table.add_column("layer", justify="right")
    for expert in range(experts):
        table.add_column(f"e{expert}", justify="right")
    by_layer: dict[int, dict[int, int]] = {}
    for layer, expert, count in rows:
        by_layer.setdefault(layer, {})[expert] = count
    for layer, counts in by_layer.items():
        table.add_row(str(layer), *(str(counts.get(expert, 0)) for expert in range(experts)))
    Console(stderr=True).print(table)
