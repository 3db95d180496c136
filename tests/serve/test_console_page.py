"""The live page in a real browser, over a backend that answers by rule: what a reader may meet."""

from __future__ import annotations

import pytest

from moeray.config import Config
from moeray.serve.backend import BackendState
from moeray.serve.errors import ControllerLostError
from moeray.settings.serve import ServeConfig
from tests.browser import browser
from tests.serve.support import EchoBackend, model_info, save_tokenizer, serving

LAST = ".turn.assistant:last-child"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


def test_a_conversation_stopped_in_the_middle_and_begun_anew(page, url, backend):
    backend.hold_after = 6
    page.open(url)
    page.until(lambda: page.find("#send").is_enabled())
    page.type("#ask", "hello world, the quick brown fox\n")
    page.until_text(f"{LAST} .text", "hello")
    assert page.shows("#stop")
    assert not page.shows("#send")
    assert backend.held.acquire(timeout=30)
    page.click("#stop")
    assert backend.closed.acquire(timeout=30)  # the sequence was aborted
    page.until_text(f"{LAST} .meta", "stopped after")
    backend.hold_after = None
    page.type("#ask", "stop here\n")
    page.until_text(f"{LAST} .meta", "first after")
    assert page.text(f"{LAST} .text").endswith("stop here")  # it echoes the conversation so far
    assert page.text(f"{LAST} .text").startswith("hello world")
    page.click("#clear")
    assert not page.run("return document.querySelectorAll('.turn').length")
    page.type("#ask", "lazy dog\n")
    page.until_text(f"{LAST} .meta", "first after")
    assert page.text(f"{LAST} .text") == "lazy dog"
    assert page.errors() == []


def test_markup_is_shown_as_text(page, url, backend):
    page.open(url)
    page.until(lambda: page.find("#send").is_enabled())
    page.type("#ask", "<img src=x onerror=alert(1)>\n")
    page.until_text(f"{LAST} .meta", "first after")
    assert page.text(f"{LAST} .text") == "<img src=x onerror=alert(1)>"
    assert page.errors() == []


def test_a_refusal_is_shown(page, url, backend):
    page.open(url)
    page.until(lambda: page.find("#send").is_enabled())
    page.click(".settings summary")
    page.type("#max-tokens", "9999")
    page.type("#ask", "hello\n")
    page.until_text(f"{LAST} .meta", "over the model's context of 512")


def test_while_it_loads_the_page_says_how_far_it_is(page, url, backend):
    model, backend.model = backend.model, None
    backend.state = BackendState("loading", "loading experts 3/8")
    page.open(url)
    page.until_text("#loading-text", "loading experts 3/8")
    bar = page.find("#loading-bar")
    assert (bar.get_attribute("value"), bar.get_attribute("max")) == ("3", "8")
    assert not page.find("#send").is_enabled()
    assert page.text("#status") == "loading"
    backend.state, backend.model = BackendState("ready"), model
    page.until(lambda: page.find("#send").is_enabled())
    assert page.text("#model") == "org/echo"


def test_a_controller_that_is_lost_is_named_and_the_chat_goes_on(page, url, backend):
    page.open(url)
    page.until_text("#status", "ready")
    backend.refuse = ControllerLostError("the controller is gone")
    page.until_text("#notice", "There is no answer from the controller (the controller is gone)")
    backend.refuse = None
    page.type("#ask", "brown fox\n")
    page.until_text(f"{LAST} .text", "brown fox")
    page.until(lambda: not page.shows("#notice"))


def test_a_model_without_a_chat_template_goes_on_with_the_text(page, tmp_path):
    backend = EchoBackend(model_info(save_tokenizer(tmp_path, template=None)))
    with serving(backend) as url:
        page.open(url)
        page.until(lambda: page.find("#send").is_enabled())
        page.type("#ask", "over the lazy\n")
        page.until_text(f"{LAST} .meta", "first after")
        assert page.text(f"{LAST} .text") == "over the lazy"
        assert "no chat template" in page.text("#log")
        page.type("#ask", " dog\n")
        page.until_text(f"{LAST} .text", "over the lazyover the lazydog")


def test_the_key_is_asked_for_and_kept_for_the_tab(page, metadata_dir):
    config = Config(serve=ServeConfig(api_key="s3cret"))
    with serving(EchoBackend(model_info(metadata_dir)), config) as url:
        page.open(url)
        page.until(lambda: page.shows("#key-dialog"))
        page.type("#key", "wrong\n")
        page.until_text("#key-error", "refused")
        page.type("#key", "s3cret\n")
        page.until_text("#status", "ready")
        assert not page.shows("#key-dialog")
        page.type("#ask", "hello\n")
        page.until_text(f"{LAST} .text", "hello")
        page.driver.refresh()
        page.until_text("#status", "ready")
        assert not page.shows("#key-dialog")
        page.click("#forget-key")
        page.until(lambda: page.shows("#key-dialog"))
        unexpected = [error for error in page.errors() if "401" not in error]
        assert unexpected == []
