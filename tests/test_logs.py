"""One line an event, whoever logs it, and nothing secret in any of them."""

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
    """Configures JSON logs with a secret, and afterwards gives what was written."""
    stream = io.StringIO()
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.raiseExceptions
    levels = {name: logging.getLogger(name).level for name in logs._CHATTY}
    logs.configure("json", "DEBUG", secrets=[SECRET, "abc"], stream=stream)

    def read() -> list[dict[str, Any]]:
        for secret in (SECRET, json.dumps(SECRET)[1:-1], "5u/p3r", TOKEN):
            assert secret not in stream.getvalue()
        return [json.loads(line) for line in stream.getvalue().splitlines()]

    yield read
    root.handlers[:], level, logging.raiseExceptions = before
    root.setLevel(level)
    for name, chatty in levels.items():
        logging.getLogger(name).setLevel(chatty)
    logging.captureWarnings(False)
    logs.set_secrets(())
    structlog.reset_defaults()


def test_a_record_of_the_standard_library_becomes_one_line_with_its_fields(lines: Callable[..., Any]) -> None:
    log.info("synced %s members", 5, extra={"guild_id": 42, "seconds": 0.5})
    (line,) = lines()
    assert line["event"] == "synced 5 members"
    assert (line["guild_id"], line["seconds"], line["level"]) == (42, 0.5, "info")
    assert line["logger"] == "guildbook.test"
    assert line["timestamp"].endswith("Z")


def test_structlogs_own_loggers_go_the_same_way(lines: Callable[..., Any]) -> None:
    structlog.get_logger("guildbook.other").warning("stalled", seconds=0.2)
    (line,) = lines()
    assert (line["event"], line["seconds"], line["logger"]) == ("stalled", 0.2, "guildbook.other")


def test_console_lines_are_for_people(capsys: pytest.CaptureFixture[str], lines: Callable[..., Any]) -> None:
    stream = io.StringIO()
    logs.configure("console", "INFO", stream=stream)
    log.info("synced", extra={"guild_id": 42})
    assert "synced" in stream.getvalue()
    assert "guild_id=42" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_auto_is_json_where_nobody_watches(lines: Callable[..., Any]) -> None:
    stream = io.StringIO()
    logs.configure("auto", "INFO", stream=stream)
    log.info("synced")
    assert json.loads(stream.getvalue())["event"] == "synced"


def test_configuring_twice_logs_once(lines: Callable[..., Any]) -> None:
    logs.configure("json", "DEBUG", stream=io.StringIO())
    stream = io.StringIO()
    logs.configure("json", "DEBUG", stream=stream)
    log.info("synced")
    assert len(stream.getvalue().splitlines()) == 1


def test_secrets_are_hidden_wherever_they_are(lines: Callable[..., Any]) -> None:
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


def test_a_short_secret_is_hidden_as_a_word_only(lines: Callable[..., Any]) -> None:
    log.info("abc and abcdef")
    assert lines()[0]["event"] == f"{logs.REDACTED} and abcdef"


def test_a_message_about_a_setting_stays_readable(lines: Callable[..., Any]) -> None:
    log.error("DISCORD_TOKEN: expected the token as the developer portal shows it")
    assert lines()[0]["event"].startswith("DISCORD_TOKEN: expected the token")


def test_a_record_that_cannot_be_formatted_is_logged_all_the_same(lines: Callable[..., Any]) -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no words")

        __repr__ = __str__

    log.info("%d members", "many")
    log.info("value", extra={"broken": Broken()})
    log.info("surrogate \ud800 and %s", 2**70, extra={"n": 2**70, "key": {1: "\udfff"}})
    structlog.get_logger("x").info("odd", value=object(), **{"exc": Broken()})
    said = lines()
    assert len(said) == 4
    assert said[0]["event"] == "%d members"
    assert "TypeError" in said[0]["log_error"]
    assert said[1]["broken"] == said[3]["exc"] == "<Broken>"
    assert said[2]["n"] == 2**70


def test_an_unexpected_error_keeps_its_traceback(lines: Callable[..., Any]) -> None:
    try:
        dict[str, int]()["user"]
    except KeyError:
        log.exception("failed")
    (line,) = lines()
    assert "Traceback" in line["exception"]
    assert "KeyError" in line["exception"]


async def test_a_database_out_of_reach_is_one_sentence_without_a_traceback(lines: Callable[..., Any]) -> None:
    db = Pool(ConnectTarget(("/nowhere",), (5432,), password=SECRET), connect_timeout=0.05)
    try:
        await db.connect()
    except DatabaseUnavailable:
        log.exception("no database")
    line = lines()[-1]
    assert "exception" not in line
    assert "could not be reached" in line["error"]
    assert not [line for line in lines() if "retry_scheduled" in line["event"]]


def test_warnings_of_libraries_are_lines_too(lines: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old ways", UserWarning, stacklevel=1)
    assert "old ways" in lines()[0]["event"]


def test_a_stream_that_is_closed_stops_nothing(capsys: pytest.CaptureFixture[str], lines: Callable[..., Any]) -> None:
    stream = io.StringIO()
    logs.configure("json", "INFO", stream=stream)
    stream.close()
    log.info("into the void")
    assert capsys.readouterr().err == ""


def test_once_logs_the_first_time_and_counts_the_rest(lines: Callable[..., Any]) -> None:
    mine = logging.getLogger("guildbook.once")
    logged = [logs.log_once(mine, "MESSAGE", "odd %s", "x", event_type="MESSAGE") for _ in range(3)]
    assert logged == [True, False, False]
    assert logs.repeat_count(mine, "MESSAGE") == 3
    (line,) = lines()
    assert (line["event"], line["event_type"], line["level"]) == ("odd x", "MESSAGE", "warning")


def test_once_remembers_a_bounded_number_of_things() -> None:
    seen = logs.RepeatCounter(limit=10)
    assert sum(seen.is_first(number) for number in range(1_000)) == 11
    assert not seen.is_first(5)
    assert len(seen._counts) == 11


@given(st.text(), st.text(min_size=8))
def test_hiding_never_raises_and_always_hides(text: str, secret: str) -> None:
    logs.set_secrets([secret])
    try:
        assert secret not in logs.redact(text + secret + text).replace(logs.REDACTED, "")
    finally:
        logs.set_secrets(())


def test_logging_goes_to_standard_error(lines: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "INFO")
    assert [h for h in logging.getLogger().handlers if getattr(h, "stream", None) is sys.stderr]
