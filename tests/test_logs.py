"""Log records of all loggers become one line each, with secrets redacted."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from utils import logs
from utils.database import Pool
from utils.database.target import ConnectTarget
from utils.exceptions import DatabaseUnavailable

TOKEN = "MTIzNDU2Nzg5MDEyMzQ1Njc4.GabcDE.abcdefghijklmnopqrstuvwxyz0123456789AB"
SECRET = 'hush"5u/p3r ü'
log = logging.getLogger("guildbook.test")


@pytest.fixture
def lines() -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """Configure JSON logs with a secret; the fixture returns the parsed lines and checks that none contains it."""
    stream = io.StringIO()
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.raiseExceptions
    levels = {name: logging.getLogger(name).level for name in logs._QUIET}
    logs.configure("json", "DEBUG", secrets=[SECRET, "abc"], stream=stream)

    def read() -> list[dict[str, Any]]:
        for secret in (SECRET, json.dumps(SECRET)[1:-1], "5u/p3r", TOKEN):
            assert secret not in stream.getvalue()
        return [json.loads(line) for line in stream.getvalue().splitlines()]

    yield read
    root.handlers[:], root_level, logging.raiseExceptions = before
    root.setLevel(root_level)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(False)
    logs.set_secrets(())
    structlog.reset_defaults()


def test_a_standard_record_is_one_line_with_its_fields(lines: Callable[..., Any]) -> None:
    log.info("synced %s members", 5, extra={"guild_id": 42, "seconds": 0.5})
    (line,) = lines()
    assert line["event"] == "synced 5 members"
    assert (line["guild_id"], line["seconds"], line["level"]) == (42, 0.5, "info")
    assert line["logger"] == "guildbook.test"
    assert line["timestamp"].endswith("Z")


def test_structlog_loggers_use_the_same_output(lines: Callable[..., Any]) -> None:
    structlog.get_logger("guildbook.other").warning("stalled", seconds=0.2)
    (line,) = lines()
    assert (line["event"], line["seconds"], line["logger"]) == ("stalled", 0.2, "guildbook.other")


def test_console_format_is_readable_text(capsys: pytest.CaptureFixture[str], lines: Callable[..., Any]) -> None:
    stream = io.StringIO()
    logs.configure("console", "INFO", stream=stream)
    log.info("synced", extra={"guild_id": 42})
    assert "synced" in stream.getvalue()
    assert "guild_id=42" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_auto_format_is_json_without_a_terminal(lines: Callable[..., Any]) -> None:
    stream = io.StringIO()
    logs.configure("auto", "INFO", stream=stream)
    log.info("synced")
    assert json.loads(stream.getvalue())["event"] == "synced"


def test_configuring_again_replaces_the_handler(lines: Callable[..., Any]) -> None:
    logs.configure("json", "DEBUG", stream=io.StringIO())
    stream = io.StringIO()
    logs.configure("json", "DEBUG", stream=stream)
    log.info("synced")
    assert len(stream.getvalue().splitlines()) == 1


def test_redacts_secrets_everywhere(lines: Callable[..., Any]) -> None:
    log.info("token %s", TOKEN)
    log.info("value", extra={"url": f"postgresql://amy:{SECRET}@h/d", "nested": {"x": [SECRET, f"Bot {TOKEN}"]}})
    log.info("connecting to postgres://amy:other-p4ss@h/d and password=other-p4ss sslmode=x")
    log.info("hook https://discord.com/api/webhooks/123/abcdefghijklmnopqrstuvwxyz0123456789")
    structlog.get_logger("x").info("asked", json={"password": "other-p4ss", "user": "amy"})
    try:
        int(f"cannot parse {SECRET!r} {TOKEN}")
    except ValueError:
        log.exception("failed")
    for line in (text := lines()):
        assert logs.REDACTED in json.dumps(line)
    assert "other-p4ss" not in json.dumps(text)
    assert "abcdefghijklmnopqrstuvwxyz" not in json.dumps(text)
    assert "amy" in json.dumps(text)


def test_redacts_a_short_secret_only_as_a_word(lines: Callable[..., Any]) -> None:
    log.info("abc and abcdef")
    assert lines()[0]["event"] == f"{logs.REDACTED} and abcdef"


def test_does_not_redact_setting_names(lines: Callable[..., Any]) -> None:
    log.error("DISCORD_TOKEN: expected the token as the developer portal shows it")
    assert lines()[0]["event"].startswith("DISCORD_TOKEN: expected the token")


def test_logs_records_that_cannot_be_formatted(lines: Callable[..., Any]) -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("broken")

        __repr__ = __str__

    log.info("%d members", "many")
    log.info("value", extra={"broken": Broken()})
    log.info("surrogate \ud800 and %s", 2**70, extra={"n": 2**70, "key": {1: "\udfff"}})
    structlog.get_logger("x").info("odd", value=object(), **{"exc": Broken()})
    logged = lines()
    assert len(logged) == 4
    assert logged[0]["event"] == "%d members"
    assert "TypeError" in logged[0]["log_error"]
    assert logged[1]["broken"] == logged[3]["exc"] == "<Broken>"
    assert logged[2]["n"] == 2**70


def test_logs_tracebacks_of_unexpected_errors(lines: Callable[..., Any]) -> None:
    try:
        dict[str, int]()["user"]
    except KeyError:
        log.exception("failed")
    (line,) = lines()
    assert "Traceback" in line["exception"]
    assert "KeyError" in line["exception"]


async def test_an_unreachable_database_is_one_sentence(lines: Callable[..., Any]) -> None:
    db = Pool(ConnectTarget(("/nowhere",), (5432,), password=SECRET), connect_timeout=0.05)
    try:
        await db.connect()
    except DatabaseUnavailable:
        log.exception("no database")
    line = lines()[-1]
    assert "exception" not in line
    assert "could not be reached" in line["error"]
    assert not [line for line in lines() if "retry_scheduled" in line["event"]]


def test_logs_python_warnings(lines: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old ways", UserWarning, stacklevel=1)
    assert "old ways" in lines()[0]["event"]


def test_survives_a_closed_stream(capsys: pytest.CaptureFixture[str], lines: Callable[..., Any]) -> None:
    stream = io.StringIO()
    logs.configure("json", "INFO", stream=stream)
    stream.close()
    log.info("into the void")
    assert capsys.readouterr().err == ""


def test_log_once_logs_the_first_and_counts_the_rest(lines: Callable[..., Any]) -> None:
    logger = logging.getLogger("guildbook.repeats")
    logged = [logs.log_once(logger, "MESSAGE", "odd %s", "x", event_type="MESSAGE") for _ in range(3)]
    assert logged == [True, False, False]
    assert logs.repeat_count(logger, "MESSAGE") == 3
    (line,) = lines()
    assert (line["event"], line["event_type"], line["level"]) == ("odd x", "MESSAGE", "warning")


def test_repeat_counter_is_bounded() -> None:
    counter = logs.RepeatCounter(limit=10)
    assert sum(counter.is_first(number) for number in range(1_000)) == 11
    assert not counter.is_first(5)
    assert len(counter._counts) == 11


def test_rate_limit_admits_a_few_of_each_key_and_counts_the_others() -> None:
    limit = logs.RateLimit(5, 3_600, per_key=2)
    assert [limit.admits("a") for _ in range(3)] == [True, True, False]
    assert sum(limit.admits(number) for number in range(10_000)) == 3
    assert len(limit._admitted) == 5
    assert (limit.take_refused(), limit.take_refused()) == (9_998, 0)


def test_rate_limit_admits_again_after_its_time() -> None:
    limit = logs.RateLimit(1, 0.0)
    assert [limit.admits() for _ in range(3)] == [True, True, True]


@given(st.text(), st.text(min_size=8))
def test_redacts_any_secret_in_any_text(text: str, secret: str) -> None:
    logs.set_secrets([secret])
    try:
        assert secret not in logs.redact(text + secret + text).replace(logs.REDACTED, "")
    finally:
        logs.set_secrets(())


def test_logs_to_standard_error_by_default(lines: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "INFO")
    assert [h for h in logging.getLogger().handlers if getattr(h, "stream", None) is sys.stderr]
