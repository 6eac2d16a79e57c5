"""An operator's action, whichever way it was asked for: how far it has come, what came of it, and a line in the books.

A slash command (`utils.operations.slash`) and a command line (`utils.cli`) run the same function: it takes a `Pool` and
a `Progress` and returns an `Outcome`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

_WRITE_DOWN = "INSERT INTO ops.admin_actions (user_id, command, arguments, result) VALUES ($1, $2, $3, $4)"


@dataclass(frozen=True, slots=True)
class Step:
    """How far an action has come."""

    #: What is being done: "restoring", "counting rows".
    text: str
    done: int = 0
    #: None: nobody knows.
    total: int | None = None
    #: What is counted: rows, bytes, …
    unit: str = "rows"

    def __str__(self) -> str:
        if self.total is None:
            return f"{self.text}: {self.done:,} {self.unit}" if self.done else self.text
        return f"{self.text}: {self.done:,} of {self.total:,} {self.unit}"


#: Told of every step as it comes; it returns at once and raises nothing. Called on the event loop.
Progress = Callable[[Step], None]


def silent(step: Step) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an action."""

    #: For people, plain lines.
    text: str
    #: For programs: what `--json` prints. Only what JSON has, times as ISO 8601.
    data: Mapping[str, Any] = field(default_factory=dict)
    #: False: it was done, and something is not as it should be. The command line then ends with exit code 1.
    ok: bool = True
    #: A file that goes with it, name and content; None: there is none. Never people's data: it is shown in Discord.
    file: tuple[str, str] | None = None


class Executes(Protocol):
    """What a line is written with: `Pool` and `Database` both do."""

    async def execute(self, sql: str, /, *args: Any, timeout: float | None = None) -> str: ...


async def write_down(
    database: Executes, command: str, arguments: Mapping[str, Any], result: str, *, user_id: int | None = None
) -> None:
    """Write into `ops.admin_actions` who did what; `user_id` None: the command line, or the bot by itself.

    Raises `DatabaseError`.
    """
    await database.execute(_WRITE_DOWN, user_id, command, dict(arguments), result)
