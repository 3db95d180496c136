"""Lines of a process's log: who speaks, of which request, and what they never hold."""

import io
import json
import logging
from dataclasses import replace

import pytest

from moeray.config import Config, load_config
from moeray.errors import ConfigError
from moeray.logs import REQUEST_ID, REQUESTS, JsonFormatter, TextFormatter, log_names, setup_logging


def line(formatter: logging.Formatter, message: str = "hello %d", *args: object, **extra: object) -> str:
    record = logging.getLogger("moeray.x").makeRecord(
        "moeray.x", logging.INFO, "f", 1, message, args or (1,), None, extra=extra or None
    )
    record.created = 1_700_000_000.5
    return formatter.format(record)


@pytest.fixture
def request_id():
    token = REQUEST_ID.set("abc")
    yield "abc"
    REQUEST_ID.reset(token)


def test_json_has_every_field(request_id):
    epochs = iter((None, 7))
    formatter = JsonFormatter({"actor": "router-0", "kind": "router", "epoch": lambda: next(epochs)})
    assert json.loads(line(formatter)) == {
        "time": "2023-11-14T22:13:20.500Z", "level": "INFO", "logger": "moeray.x", "message": "hello 1",
        "actor": "router-0", "kind": "router", "request_id": "abc",
    }  # fmt: skip
    other = json.loads(line(formatter, **log_names("seq-0", "other"), ttft_s=0.5))
    assert (other["epoch"], other["request_id"], other["sequence"], other["ttft_s"]) == (7, "other", "seq-0", 0.5)


def test_text_has_what_places_it(request_id):
    formatter = TextFormatter({"actor": "router-0", "group": "router", "epoch": lambda: 3})
    assert line(formatter, ttft_s=0.5) == (
        "2023-11-14T22:13:20.500Z INFO moeray.x: hello 1 [actor=router-0 epoch=3 request_id=abc]"
    )


def test_without_context_there_are_no_brackets():
    assert line(TextFormatter({})) == "2023-11-14T22:13:20.500Z INFO moeray.x: hello 1"
    assert set(json.loads(line(JsonFormatter({})))) == {"time", "level", "logger", "message"}


def test_what_other_libraries_hang_on_records_is_left_out():
    assert set(json.loads(line(JsonFormatter({}), _theirs=1))) == {"time", "level", "logger", "message"}


def test_an_exception_stays_in_its_line():
    log, out = logging.getLogger("moeray.test_logs"), io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonFormatter({}))
    log.addHandler(handler)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("it failed")
    finally:
        log.removeHandler(handler)
    (only,) = out.getvalue().splitlines()
    assert "ValueError: two\nlines" in json.loads(only)["exception"]


@pytest.fixture
def restored():
    """The process's logging as it was."""
    loggers = [logging.getLogger(name) for name in ("moeray", REQUESTS, "transformers")]
    before = [(log, log.handlers[:], log.level, log.propagate) for log in loggers]
    yield
    for log, handlers, level, propagate in before:
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        (Config(), ["info", "warning", "request"]),
        (Config(log_level="debug"), ["debug", "info", "warning", "request"]),
        (Config(log_level="warning"), ["warning"]),
        (Config(log_requests=False), ["info", "warning"]),
    ],
)
def test_the_config_chooses_what_is_shown(restored, capfd, config, shown):
    setup_logging(config, actor="me")
    log = logging.getLogger("moeray.any")
    log.debug("debug")
    log.info("info")
    log.warning("warning")
    logging.getLogger(REQUESTS).info("request")
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(": ")[1].split()[0] for line in lines] == shown
    assert all("[actor=me]" in line for line in lines)


def test_the_level_of_the_environment(monkeypatch):
    monkeypatch.setenv("MOERAY_LOG_LEVEL", "DEBUG")
    assert load_config().log_level == "debug"
    assert load_config(None, {"log_level": "error"}).log_level == "error"
    monkeypatch.setenv("MOERAY_LOG_LEVEL", "loud")
    with pytest.raises(ConfigError, match=r"log_level.*debug, info, warning, error.*loud"):
        load_config()


def test_a_config_in_a_line_holds_no_secret():
    config = load_config(None, {"wire.token": "s3cret-token", "serve.api_key": "s3cret-key"})
    assert "s3cret" not in line(JsonFormatter({}), "%s", config, config=replace(config, model="m"))
