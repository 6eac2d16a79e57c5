"""Logging: structlog behind the standard library's handlers, with secrets redacted."""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, MutableMapping
from typing import Any, Literal, TextIO
from urllib.parse import quote

import orjson
import stamina.instrumentation
import structlog
from structlog.typing import EventDict, Processor

from utils.exceptions import is_transient, translate

REDACTED = "[hidden]"
#: Patterns of secrets: Discord's tokens (API reference, "Authentication"; their shape is known from secret-scanning
#: patterns), the tokens in webhook and interaction URLs, passwords in URLs and DSNs.
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b[A-Za-z0-9_-]{23,28}\.[A-Za-z0-9_-]{6,7}\.[A-Za-z0-9_-]{27,}"), REDACTED),
    (re.compile(r"\bmfa\.[A-Za-z0-9_-]{20,}"), REDACTED),
    (re.compile(r"((?:webhooks|interactions)/\d+/)[A-Za-z0-9_-]{20,}"), rf"\1{REDACTED}"),
    (re.compile(r"([a-z][a-z0-9+.-]*://[^\s:/?#@'\"]*:)[^\s/'\"]+(?=@)", re.IGNORECASE), rf"\1{REDACTED}"),
    (re.compile(r"((?:password|passwd|pwd|secret|token)=[\"']?)[^\s\"',&;)}\]]+", re.IGNORECASE), rf"\1{REDACTED}"),
    (re.compile(r"([\"'](?:\w*password|secret|\w*token)\\?[\"']:\s*\\?[\"'])[^\"']+", re.IGNORECASE), rf"\1{REDACTED}"),
    (re.compile(r"((?:Bot|Bearer)\s+)[A-Za-z0-9._-]{20,}"), rf"\1{REDACTED}"),
)
#: Minimum levels of loggers whose INFO is of no use to operators.
_QUIET = {
    "aiohttp.access": logging.WARNING,
    "alembic": logging.WARNING,
    "asyncio": logging.WARNING,
    "asyncpg.pool": logging.ERROR,  # the caller logs a failed connection itself
}

_secrets: re.Pattern[str] | None = None


def redact(text: str) -> str:
    """Replace every secret in the text with `REDACTED`."""
    if _secrets is not None:
        text = _secrets.sub(REDACTED, text)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def set_secrets(values: Iterable[str]) -> None:
    """Set the values to redact from every log line, in all their escaped forms; replaces earlier ones."""
    global _secrets  # noqa: PLW0603 - the formatter of every handler reads it
    patterns: set[str] = set()
    for value in filter(None, values):
        spellings = {value, quote(value, safe=""), quote(value), json.dumps(value)[1:-1], repr(value)[1:-1]}
        spellings |= {orjson.dumps(value.encode(errors="replace").decode()).decode()[1:-1]}
        # A short secret may be part of an ordinary word: it is redacted only as a whole word.
        patterns |= {re.escape(text) if len(value) >= 8 else rf"(?<!\w){re.escape(text)}(?!\w)" for text in spellings}
    _secrets = re.compile("|".join(sorted(patterns, key=len, reverse=True))) if patterns else None


def configure(
    format: Literal["auto", "console", "json"] = "auto",  # noqa: A002
    level: str = "INFO",
    *,
    secrets: Iterable[str] = (),
    stream: TextIO | None = None,
) -> None:
    """Send the records of all loggers to one stream; None means standard error.

    `auto` is `console` if the stream is a terminal and `json` otherwise. `secrets` are redacted from every line.
    """
    target = stream if stream is not None else sys.stderr
    set_secrets(secrets)
    is_console = format == "console" or (format == "auto" and _is_terminal(target))
    handler = logging.StreamHandler(target)
    handler.setFormatter(_Formatter(is_console=is_console, colors=is_console and _is_terminal(target)))
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old.formatter, _Formatter):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    for name, minimum in _QUIET.items():
        logging.getLogger(name).setLevel(max(minimum, root.level))
    logging.raiseExceptions = False  # do not print tracebacks for log lines that cannot be written
    logging.captureWarnings(True)
    stamina.instrumentation.set_on_retry_hooks(())  # callers log their retries themselves
    structlog.configure(
        processors=[*_shared_processors(), structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def _shared_processors() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]


class _Formatter(structlog.stdlib.ProcessorFormatter):
    """Formats the records of all loggers; never raises, and redacts secrets in the finished line."""

    def __init__(self, *, is_console: bool, colors: bool) -> None:
        renderer: Processor = (
            structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)
            if is_console
            else structlog.processors.JSONRenderer(serializer=_to_json)
        )
        processors: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, _summarize_outage]
        if not is_console:
            processors.append(structlog.processors.format_exc_info)
        super().__init__(
            foreign_pre_chain=[*_shared_processors(), structlog.stdlib.ExtraAdder()], processors=[*processors, renderer]
        )

    def format(self, record: logging.LogRecord) -> str:
        try:
            return redact(super().format(record))
        except Exception as exc:  # a malformed record must not break the caller
            fallback = {
                "event": redact(_text(record.msg)[:2_000]),
                "level": record.levelname.lower(),
                "logger": record.name,
                "log_error": f"could not format this record: {type(exc).__name__}",
            }
            return json.dumps(fallback)


def _summarize_outage(logger: Any, name: str, event: EventDict) -> EventDict:
    """Replace the traceback of an unreachable server, which an operator can fix, with one sentence."""
    info = event.get("exc_info")
    error = info[1] if isinstance(info, tuple) else sys.exc_info()[1] if info is True else info
    if isinstance(error, BaseException) and is_transient(error):
        event.pop("exc_info")
        # An OSError may not come from the database, so its own message is kept.
        is_os_error = isinstance(error, OSError)
        event["error"] = str(error) or type(error).__name__ if is_os_error else str(translate(error) or error)
    return event


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:  # a foreign object whose __str__ raises must not cost the line
        return f"<{type(value).__name__}>"


def _to_json(event: MutableMapping[str, Any], **_: Any) -> str:
    try:
        return orjson.dumps(event, default=_text, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:  # lone surrogates, integers beyond 64 bits: the standard library escapes them
        return json.dumps({str(key): value for key, value in event.items()}, default=_text)


# --- repeats


class RepeatCounter:
    """Counts occurrences by key, so that only the first of each is logged: for input that may repeat forever."""

    def __init__(self, limit: int = 1_000) -> None:
        #: How many keys are distinguished; all further ones share one count.
        self.limit: int = limit
        self._counts: dict[object, int] = {}
        self._lock = threading.Lock()

    def is_first(self, key: object) -> bool:
        """Count an occurrence and return whether it is the key's first."""
        with self._lock:
            counted = key if key in self._counts or len(self._counts) < self.limit else _OTHER
            self._counts[counted] = self._counts.get(counted, 0) + 1
            return self._counts[counted] == 1

    def count(self, key: object) -> int:
        """Return how many occurrences were counted."""
        return self._counts.get(key, 0)

    def clear(self) -> None:
        """Reset all counts."""
        with self._lock:
            self._counts.clear()


class RateLimit:
    """Admits at most `limit` occurrences within `seconds`, and `per_key` of one key; counts the others.

    Its memory is bounded by `limit`, whatever the number of keys.
    """

    def __init__(self, limit: int, seconds: float, *, per_key: int | None = None) -> None:
        self.limit: int = limit
        self.seconds: float = seconds
        self.per_key: int = limit if per_key is None else per_key
        self._admitted: deque[tuple[float, object]] = deque()
        self._refused: int = 0

    def admits(self, key: object = None) -> bool:
        """Return whether one more occurrence is within the limits, and count it."""
        now = time.monotonic()
        while self._admitted and now - self._admitted[0][0] >= self.seconds:
            self._admitted.popleft()
        same = sum(other == key for _, other in self._admitted)
        if len(self._admitted) >= self.limit or same >= self.per_key:
            self._refused += 1
            return False
        self._admitted.append((now, key))
        return True

    def take_refused(self) -> int:
        """Return how many occurrences were not admitted since the last call."""
        refused, self._refused = self._refused, 0
        return refused


#: The key of occurrences beyond the limit.
_OTHER = object()
_repeats = RepeatCounter()


def log_once(
    logger: logging.Logger, key: object, message: str, *args: Any, level: int = logging.WARNING, **fields: Any
) -> bool:
    """Log a message the first time `key` occurs and only count it afterwards; return whether it was logged."""
    if not _repeats.is_first((logger.name, key)):
        return False
    logger.log(level, message, *args, extra=fields)
    return True


def repeat_count(logger: logging.Logger, key: object) -> int:
    """Return how often `log_once` was called with this key."""
    return _repeats.count((logger.name, key))


def reset_repeats() -> None:
    """Forget all keys: the next `log_once` of each is logged again."""
    _repeats.clear()
