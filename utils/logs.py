"""Logs: structlog behind the standard library's handlers, and nothing secret in them."""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
from collections.abc import Iterable, MutableMapping
from typing import Any, Literal, TextIO
from urllib.parse import quote

import orjson
import stamina.instrumentation
import structlog
from structlog.typing import EventDict, Processor

from utils.exceptions import is_transient, translate

REDACTED = "[hidden]"
#: What secrets look like wherever they come from: Discord's tokens (API reference, "Authentication"; the shape is
#: known from its secret-scanning patterns), webhooks' and interactions' in addresses, passwords in URLs and in DSNs.
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b[A-Za-z0-9_-]{23,28}\.[A-Za-z0-9_-]{6,7}\.[A-Za-z0-9_-]{27,}"), REDACTED),
    (re.compile(r"\bmfa\.[A-Za-z0-9_-]{20,}"), REDACTED),
    (re.compile(r"((?:webhooks|interactions)/\d+/)[A-Za-z0-9_-]{20,}"), rf"\1{REDACTED}"),
    (re.compile(r"([a-z][a-z0-9+.-]*://[^\s:/?#@'\"]*:)[^\s/'\"]+(?=@)", re.IGNORECASE), rf"\1{REDACTED}"),
    (re.compile(r"((?:password|passwd|pwd|secret|token)=[\"']?)[^\s\"',&;)}\]]+", re.IGNORECASE), rf"\1{REDACTED}"),
    (re.compile(r"([\"'](?:\w*password|secret|\w*token)\\?[\"']:\s*\\?[\"'])[^\"']+", re.IGNORECASE), rf"\1{REDACTED}"),
    (re.compile(r"((?:Bot|Bearer)\s+)[A-Za-z0-9._-]{20,}"), rf"\1{REDACTED}"),
)
#: Loggers whose INFO is of no use to operators.
_CHATTY = {
    "aiohttp.access": logging.WARNING,
    "alembic": logging.WARNING,
    "asyncio": logging.WARNING,
    "asyncpg.pool": logging.ERROR,  # that it could not connect: whoever wanted to says so
}

_secrets: re.Pattern[str] | None = None


def redact(text: str) -> str:
    """Return the text without anything secret in it."""
    if _secrets is not None:
        text = _secrets.sub(REDACTED, text)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def set_secrets(values: Iterable[str]) -> None:
    """Say which values no log line may hold, in whatever way they are escaped; replaces what was said before."""
    global _secrets  # noqa: PLW0603 - the formatter of every handler reads it
    forms: set[str] = set()
    for value in filter(None, values):
        spelled = {value, quote(value, safe=""), quote(value), json.dumps(value)[1:-1], repr(value)[1:-1]}
        spelled |= {orjson.dumps(value.encode(errors="replace").decode()).decode()[1:-1]}
        # A short one may be part of any word: there it is no secret.
        forms |= {re.escape(form) if len(value) >= 8 else rf"(?<!\w){re.escape(form)}(?!\w)" for form in spelled}
    _secrets = re.compile("|".join(sorted(forms, key=len, reverse=True))) if forms else None


def configure(
    format: Literal["auto", "console", "json"] = "auto",  # noqa: A002
    level: str = "INFO",
    *,
    secrets: Iterable[str] = (),
    stream: TextIO | None = None,
) -> None:
    """Send the records of every logger to one stream (None: standard error).

    `auto`: for people when the stream is a terminal, JSON lines elsewhere. `secrets` are kept out of every line.
    """
    out = stream if stream is not None else sys.stderr
    set_secrets(secrets)
    for_people = format == "console" or (format == "auto" and _is_terminal(out))
    handler = logging.StreamHandler(out)
    handler.setFormatter(_Formatter(for_people=for_people, colors=for_people and _is_terminal(out)))
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old.formatter, _Formatter):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    for name, least in _CHATTY.items():
        logging.getLogger(name).setLevel(max(least, root.level))
    logging.raiseExceptions = False  # a log line that cannot be written is no reason to print tracebacks
    logging.captureWarnings(True)
    stamina.instrumentation.set_on_retry_hooks(())  # who retries says so itself, in words for people
    structlog.configure(
        processors=[*_shared(), structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def _shared() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]


class _Formatter(structlog.stdlib.ProcessorFormatter):
    """Formats every record, whoever made it; never raises, and hides secrets last, in the finished line."""

    def __init__(self, *, for_people: bool, colors: bool) -> None:
        renderer: Processor = (
            structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)
            if for_people
            else structlog.processors.JSONRenderer(serializer=_to_json)
        )
        chain: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, _short_outage]
        if not for_people:
            chain.append(structlog.processors.format_exc_info)
        super().__init__(foreign_pre_chain=[*_shared(), structlog.stdlib.ExtraAdder()], processors=[*chain, renderer])

    def format(self, record: logging.LogRecord) -> str:
        try:
            return redact(super().format(record))
        except Exception as exc:  # whatever is wrong with a record, logging must go on
            fallback = {
                "event": redact(_text(record.msg)[:2_000]),
                "level": record.levelname.lower(),
                "logger": record.name,
                "log_error": f"the line could not be formatted: {type(exc).__name__}",
            }
            return json.dumps(fallback)


def _short_outage(logger: Any, name: str, event: EventDict) -> EventDict:
    """Put one sentence in place of a traceback for what an operator can mend: a server out of reach."""
    info = event.get("exc_info")
    error = info[1] if isinstance(info, tuple) else sys.exc_info()[1] if info is True else info
    if isinstance(error, BaseException) and is_transient(error):
        event.pop("exc_info")
        # A socket's error may come from anywhere; the database's own say so.
        is_sockets = isinstance(error, OSError)
        event["error"] = str(error) or type(error).__name__ if is_sockets else str(translate(error) or error)
    return event


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:  # an object of someone else's that cannot be shown is no reason to lose the line
        return f"<{type(value).__name__}>"


def _to_json(event: MutableMapping[str, Any], **_: Any) -> str:
    try:
        return orjson.dumps(event, default=_text, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:  # lone surrogates, integers beyond 64 bits: the slow one escapes them
        return json.dumps({str(key): value for key, value in event.items()}, default=_text)


class RepeatCounter:
    """Counts what keeps happening, and lets its first time through: for what others may send us without end."""

    def __init__(self, limit: int = 1_000) -> None:
        #: How many different things are told apart; the ones after that count as one.
        self.limit: int = limit
        self._counts: dict[object, int] = {}
        self._lock = threading.Lock()

    def is_first(self, key: object) -> bool:
        """Count one more, and tell whether it was the first."""
        with self._lock:
            kept = key if key in self._counts or len(self._counts) < self.limit else _REST
            self._counts[kept] = self._counts.get(kept, 0) + 1
            return self._counts[kept] == 1

    def count(self, key: object) -> int:
        """Return how often it happened."""
        return self._counts.get(key, 0)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._counts.clear()


_REST = object()
_repeats = RepeatCounter()


def log_once(
    logger: logging.Logger, key: object, message: str, *args: Any, level: int = logging.WARNING, **fields: Any
) -> bool:
    """Log a message the first time that `key` comes up and only count it afterwards; tell whether it was logged."""
    if not _repeats.is_first((logger.name, key)):
        return False
    logger.log(level, message, *args, extra=fields)
    return True


def repeat_count(logger: logging.Logger, key: object) -> int:
    """Return how often `once` was called with this key."""
    return _repeats.count((logger.name, key))


def reset_repeats() -> None:
    """Forget which keys were logged: the next `log_once` of each is logged again."""
    _repeats.clear()
