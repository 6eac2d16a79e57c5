"""An operator's action, run by a slash command or the command line: its progress, its outcome, and the audit log.

A slash command (`utils.operations.slash`) and a command line (`utils.cli`) run the same function: it takes a `Pool` and
a `Progress` and returns an `Outcome`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol

from utils.database import Pool
from utils.text import format_bytes, scrub_payload, storable

#: How long rows of `ops.admin_actions` are kept, and how many of them.
RETENTION_DAYS, RETAINED_ROWS = 400, 100_000
#: Rows deleted in one statement.
DELETED_ROWS = 1_000
#: The command that records the decision not to restore a backup into an empty database.
BEGIN_ANEW = "begin anew"
#: Commands whose rows are kept whatever their age, because they decide something.
DECISIONS = (BEGIN_ANEW,)
#: Most characters of a recorded result, of one recorded argument, and of all arguments of a command as JSON.
RESULT_LENGTH, ARGUMENT_LENGTH, ARGUMENTS_LENGTH = 4_000, 500, 4_000
#: Most elements of a recorded argument that is a list.
ARGUMENT_ITEMS = 20

_INSERT = "INSERT INTO ops.admin_actions (user_id, command, arguments, result) VALUES ($1, $2, $3, $4)"
#: The newest row beyond the number of rows to keep. By time: a restore gives rows that it adds new ids.
_NEWEST_BEYOND = "SELECT at, id FROM ops.admin_actions ORDER BY at DESC, id DESC OFFSET $1 LIMIT 1"
_DELETE_EXPIRED = """
WITH deleted AS (
    DELETE FROM ops.admin_actions WHERE id IN (
        SELECT id FROM ops.admin_actions WHERE (at < $1 OR (at, id) <= ($2::timestamptz, $3::bigint))
        AND command <> ALL ($4::text[]) ORDER BY at, id LIMIT $5
    ) RETURNING 1
)
SELECT count(*) FROM deleted
"""


@dataclass(frozen=True, slots=True)
class Step:
    """How far an action has got."""

    #: What is being done: "restoring", "counting rows".
    text: str
    done: int = 0
    #: None if the total is unknown.
    total: int | None = None
    #: What is counted, in the plural with an s: rows, bytes, …
    unit: str = "rows"

    @property
    def figures(self) -> str:
        """How far it has got, for people: `3 of 20 tables`, `12.3 MB of 45.6 MB`; empty if there is nothing to say."""
        if self.total is None and not self.done:
            return ""
        if self.unit == "bytes":
            done, total = format_bytes(self.done), None if self.total is None else format_bytes(self.total)
            return done if total is None else f"{_without_unit(done, total)} of {total}"
        counted = self.done if self.total is None else self.total
        unit = self.unit.removesuffix("s") if counted == 1 else self.unit
        return f"{self.done:,} {unit}" if self.total is None else f"{self.done:,} of {self.total:,} {unit}"

    def __str__(self) -> str:
        return f"{self.text}: {self.figures}" if self.figures else self.text


def _without_unit(done: str, total: str) -> str:
    """Return a size without its unit, if that is the total's: `12.3 of 45.6 MB`."""
    number, _, unit = done.partition(" ")
    return number if total.endswith(f" {unit}") else done


#: Called on the event loop with each step; must return at once and must not raise.
Progress = Callable[[Step], None]


def ignore_progress(step: Step) -> None:
    """Report progress to nobody."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of an action."""

    #: For people: plain lines.
    text: str
    #: For programs: what `--json` prints. JSON types only, times as ISO 8601.
    data: Mapping[str, Any] = field(default_factory=dict)
    #: False if the action completed but found a problem; the command line then exits with code 1.
    ok: bool = True
    #: The exit code of the command line; None means 0 or, if not `ok`, 1.
    exit_code: int | None = None
    #: Name and content of an attached file. It is shown in Discord, so it never contains personal data.
    file: tuple[str, str] | None = None


class Executor(Protocol):
    """What can run a statement; `Pool` and `Database` do."""

    async def execute(self, sql: str, /, *args: Any, timeout: float | None = None) -> str: ...


async def record_action(
    executor: Executor, command: str, arguments: Mapping[str, Any], result: str, *, user_id: int | None = None
) -> None:
    """Record in `ops.admin_actions` who ran which command, with what result. What is too long is shortened.

    `user_id` is None for the command line and for the bot itself. Raises `DatabaseError`.
    """
    await executor.execute(
        _INSERT, user_id, command, _shorten_arguments(arguments), _shorten(storable(result), RESULT_LENGTH)
    )


def _shorten_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments that can be stored, and whose JSON has at most `ARGUMENTS_LENGTH` characters."""
    shortened: dict[str, Any] = {str(name): _shorten_argument(value) for name, value in arguments.items()}
    shortened = scrub_payload(shortened)
    text = json.dumps(shortened, default=str)
    return shortened if len(text) <= ARGUMENTS_LENGTH else {"shortened": _shorten(text, ARGUMENTS_LENGTH - 100)}


def _shorten_argument(value: Any) -> Any:
    if isinstance(value, str):
        return _shorten(value, ARGUMENT_LENGTH)
    if isinstance(value, list | tuple):
        more = [f"and {len(value) - ARGUMENT_ITEMS:,} more"] if len(value) > ARGUMENT_ITEMS else []
        return [*map(_shorten_argument, value[:ARGUMENT_ITEMS]), *more]
    return value


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


async def prune_actions(
    pool: Pool,
    *,
    now: datetime | None = None,
    keep_days: float = RETENTION_DAYS,
    keep_rows: int = RETAINED_ROWS,
    batch: int = DELETED_ROWS,
) -> int:
    """Delete old rows of `ops.admin_actions` and return their number. Raises `DatabaseError`.

    Kept are the newest `keep_rows` rows of the last `keep_days`, and those of `DECISIONS`. `batch` rows are deleted in
    one statement. `now`: the database's time by default.
    """
    beyond = await pool.fetchrow(_NEWEST_BEYOND, keep_rows)
    newest = (None, None) if beyond is None else (beyond["at"], beyond["id"])
    oldest = (now or pool.now()) - timedelta(days=keep_days)
    deleted, found = 0, batch
    while found == batch:
        found = await pool.fetchval(_DELETE_EXPIRED, oldest, *newest, list(DECISIONS), batch)
        deleted += found
    return deleted
