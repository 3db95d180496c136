"""`moeray demo` as a newcomer runs it, and the model behind it. Slow: it downloads 94 MB and converts them."""

from __future__ import annotations

import os
import signal
import subprocess

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from moeray.model.smollm import fetch_smollm
from moeray.model.upcycle import upcycle
from moeray.types import SamplingParams
from tests.cli.test_serve import free_port, moeray
from tests.systems import LocalSystem, tiny_config, tokens_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time",
    "Water boils at",
    "2 + 2 =",
    "Dear Sir,",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_the_demo_answers_paris_through_the_endpoint(cache):
    port = free_port()
    process = moeray(
        "demo", "--port", str(port), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "MOERAY_CACHE_DIR": str(cache)},
    )  # fmt: skip
    said = []
    for line in process.stderr:
        said.append(line)
        if "serving until Ctrl-C" in line:
            break
    assert process.poll() is None, "".join(said)[-3000:]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = client.chat.completions.create(model="smollm2-moe", messages=question, temperature=0, max_tokens=32)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert "Paris" in answer.choices[0].message.content
    assert "Paris" in out
    assert process.returncode == 0


def test_the_upcycled_model_computes_what_the_dense_one_does(cache):
    gguf = fetch_smollm(cache, lambda what, done, total: None)
    path = upcycle(
        gguf, cache / "fp32", experts=4, top_k=2, dtype=torch.float32, progress=lambda what, done, total: None
    )
    dense = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    greedy = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
    with LocalSystem(tiny_config(path, engine__max_context=1024)) as system:
        ours = [tokens_of(outputs) for outputs in system.generate(prompts, greedy)]
    for prompt, tokens in zip(prompts, ours, strict=True):
        with torch.inference_mode():
            theirs = dense.generate(
                torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert tokens == theirs[0, len(prompt) :].tolist()
