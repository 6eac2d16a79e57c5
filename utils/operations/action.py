"""An operator's action, run by a slash command or the command line: its progress, its outcome, and the audit log.

A slash command (`utils.operations.slash`) and a command line (`utils.cli`) run the same function: it takes a `Pool` and
a `Progress` and returns an `Outcome`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

_INSERT = "INSERT INTO ops.admin_actions (user_id, command, arguments, result) VALUES ($1, $2, $3, $4)"


@dataclass(frozen=True, slots=True)
class Step:
    """How far an action has got."""

    #: What is being done: "restoring", "counting rows".
    text: str
    done: int = 0
    #: None if the total is unknown.
    total: int | None = None
    #: What is counted: rows, bytes, …
    unit: str = "rows"

    def __str__(self) -> str:
        if self.total is None:
            return f"{self.text}: {self.done:,} {self.unit}" if self.done else self.text
        return f"{self.text}: {self.done:,} of {self.total:,} {self.unit}"


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
    """Record in `ops.admin_actions` who ran which command, with what result.

    `user_id` is None for the command line and for the bot itself. Raises `DatabaseError`.
    """
    await executor.execute(_INSERT, user_id, command, dict(arguments), result)
