"""The live page of a running endpoint in a real browser: a question, its answer as it streams, experts lighting up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.browser import browser
from tests.checkpoints import make_tiny
from tests.cli.test_serve import free_port, moeray

pytestmark = pytest.mark.ray

ANSWER = ".turn.assistant:last-child"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture(scope="module")
def url(page, tmp_path_factory):
    """Where a tiny model is served."""
    folder = tmp_path_factory.mktemp("console")
    model = make_tiny("qwen3_moe", folder / "tiny-moe", tokenizer=True, eos_token_id=None)  # it never ends by itself
    written = model / "tokenizer_config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | {"eos_token": None}))
    port = free_port()
    log = (folder / "log").open("w+")
    process = moeray(
        "serve", str(model), "--port", str(port), "--dtype", "float32", "--engine-kv-blocks", "512",
        "--experts-max-actors", "3", "--experts-num-cpus", "0.1", "--router-num-cpus", "0.1",
        stdout=subprocess.PIPE, stderr=log, env={**os.environ, "MOERAY_CACHE_DIR": str(folder)},
    )  # fmt: skip
    assert "serving" in process.stdout.readline(), Path(log.name).read_text()[-3000:]
    yield f"http://127.0.0.1:{port}/"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0, Path(log.name).read_text()[-3000:]


def watch_answers(page):
    """Have the page note how long the answer is whenever it grows."""
    page.run(
        """window.lengths = [];
        const log = document.getElementById("log");
        new MutationObserver(() => lengths.push(log.textContent.length))
          .observe(log, { characterData: true, childList: true, subtree: true });"""
    )


def drawn(page):
    return page.run("return document.getElementById('heat').toDataURL()")


def rows(page):
    return page.run("return [...document.querySelectorAll('tbody tr:not(.group)')].map((row) => row.innerText)")


def test_a_question_is_answered_in_pieces_and_experts_light_up(page, url):
    page.open(url)
    page.until(lambda: page.find("#send").is_enabled())
    page.until_text("#experts-line", "16 experts in 2 layers")
    dark = drawn(page)
    watch_answers(page)
    page.run("document.getElementById('max-tokens').value = 400")
    page.type("#ask", "Which experts answer?\n")
    page.until(lambda: drawn(page) != dark)
    page.until(lambda: float(page.text("#scale-high").rstrip("k")) > 1)
    page.until_text(f"{ANSWER} .meta", "400 tokens", timeout=120)
    assert len(set(page.run("return lengths"))) >= 5
    assert page.text(f"{ANSWER} .text")
    page.until(lambda: "–" not in page.text(".tile:nth-child(2) .value"))  # the time to the first token
    assert page.errors() == []
    assert {address for address in page.requested() if not address.startswith(url)} == set()


def test_actors_and_decisions_are_shown(page, url):
    page.open(url)
    page.until(lambda: len(rows(page)) == 3)
    table = "\n".join(rows(page))
    assert table.count("ready") == 3
    assert all(actor in table for actor in ("experts-0", "experts-1", "router-0"))
    assert "scales from 2 to 3" in page.text("table")
    assert "Place the experts" in page.text("#decisions")
    done = moeray("scale", "experts=3", "--output", "json", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.wait(120) == 0, done.stderr.read()
    page.until(lambda: any("experts-2" in row and "ready" in row for row in rows(page)))
    page.until_text("#decisions", "Group experts was set to 3 actors by hand")


def test_an_expert_is_looked_at_by_keyboard(page, url):
    page.open(url)
    page.until_text("#experts-line", "16 experts in 2 layers")
    page.run("document.getElementById('heat').focus()")
    for key in ("\ue014", "\ue014", "\ue015"):  # right, right, down
        page.driver.switch_to.active_element.send_keys(key)
    assert page.text("#tip").startswith("Layer 2, expert 1")
    assert "Layer 2, expert 1" in page.text("#tip-spoken")
    assert "1 replica" in page.text("#tip")


@pytest.mark.parametrize("width", [360, 820, 1400])
def test_nothing_is_wider_than_the_window(page, url, width):
    page.open(url)
    page.until(lambda: len(rows(page)) >= 3)
    emulate = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", emulate)
    try:
        assert page.run("return document.documentElement.scrollWidth") <= width
        assert page.run("return document.getElementById('heat').clientWidth") <= width
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
