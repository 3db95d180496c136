"""The live page's files and data over HTTP."""

from __future__ import annotations

import asyncio
import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from moeray import __version__
from moeray.config import Config
from moeray.serve.backend import BackendState
from moeray.serve.console.state import KEEP_S, ConsoleState
from moeray.serve.errors import ControllerLostError
from moeray.settings.serve import ServeConfig
from tests.serve.support import EchoBackend, model_info, serving

STATE = "/console/state"


def test_the_page_is_at_the_root_and_comes_from_nowhere_else(http):
    page = http.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
    assert policy["frame-ancestors"] == "'none'"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "//" not in "".join(re.findall(r'(?:src|href)="([^"]*)"', page.text))
    assert "style=" not in page.text  # the policy would block it
    assert "onclick=" not in page.text


@pytest.mark.parametrize(
    ("name", "kind"),
    [("console.js", "text/javascript"), ("console.css", "text/css"), ("icon.svg", "image/svg+xml")],
)
def test_files_have_their_type_and_are_checked_by_their_tag(http, name, kind):
    first = http.get(f"/console/{name}")
    assert first.headers["content-type"].startswith(kind)
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = http.get(f"/console/{name}", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert http.get(f"/console/{name}", headers={"If-None-Match": '"other"'}).content == first.content


def test_head_has_no_body(http):
    head = http.head("/")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["etag"] == http.get("/").headers["etag"]


@pytest.mark.parametrize("path", ["/console/../auth.py", "/console/no-such.js", "/console/", "/console/%2e%2e/auth.py"])
def test_there_is_nothing_else(http, path):
    assert http.get(path).status_code == 404


def test_every_module_that_is_imported_is_there(http):
    imported = set()
    for name in ("console.js", "chat.js", "heatmap.js", "tables.js", "tiles.js", "api.js", "format.js", "palette.js"):
        imported |= set(re.findall(r'from "\./([^"]+)"', http.get(f"/console/{name}").text))
    assert imported
    assert all(http.get(f"/console/{name}").status_code == 200 for name in imported)


def state_when(http, what):
    """The first state of which `what` holds: the answer of an earlier test may still be given again."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        answer = http.get(STATE)
        assert answer.headers["cache-control"] == "no-store"
        if what(answer.json()):
            return answer.json()
    raise AssertionError(f"it did not come to pass: {answer.text}")


def test_the_state(http):
    assert state_when(http, lambda state: state["system"]) == {
        "version": __version__,
        "endpoint": {"status": "ready", "detail": ""},
        "model": {"name": "org/echo", "max_context": 512},
        "system": {"status": "ready", "detail": "ready", "epoch": 7},
        "error": None,
    }


def test_while_it_loads_and_while_the_controller_is_lost_there_is_a_state(http, backend):
    backend.state, backend.model = BackendState("loading", "loading experts 3/8"), None
    backend.refuse = ControllerLostError("the controller is gone: it was killed")
    state = state_when(http, lambda state: state["error"])
    assert state["endpoint"] == {"status": "loading", "detail": "loading experts 3/8"}
    assert (state["model"], state["system"]) == (None, None)
    assert state["error"] == "the controller is gone: it was killed"


def test_the_key_is_asked_for_the_data_and_not_for_the_page(metadata_dir):
    config = Config(serve=ServeConfig(api_key="s3cret"))
    with serving(EchoBackend(model_info(metadata_dir)), config) as url, httpx.Client(base_url=url) as http:
        assert http.get("/").status_code == 200
        assert http.get("/console/console.js").status_code == 200
        assert http.get(STATE).status_code == 401
        assert http.get(STATE, headers={"Authorization": "Bearer other"}).status_code == 401
        assert http.get(STATE, headers={"Authorization": "Bearer s3cret"}).status_code == 200


def test_many_pages_are_one_question_to_the_controller(http, backend):
    began = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: http.get(STATE).status_code, range(64)))
    assert answers == [200] * 64
    assert backend.looks <= 2 + (time.monotonic() - began) / KEEP_S


def test_nobody_is_asked_again_before_its_time(metadata_dir):
    now, backend = [0.0], EchoBackend(model_info(metadata_dir))

    async def ask() -> list[int]:
        state, looks = ConsoleState(backend, lambda: now[0]), []
        for step in (0.0, KEEP_S / 2, KEEP_S, KEEP_S):
            now[0] += step
            await asyncio.gather(*(state.read() for _ in range(5)))
            looks.append(backend.looks)
        return looks

    assert asyncio.run(ask()) == [1, 1, 2, 3]
