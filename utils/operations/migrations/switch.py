"""Whether the bot may bring the schema up to date by itself: a downgrade says no, or the next start would undo it.

It is a comment on the table `alembic_version`, which outlives a downgrade to base (the schema `ops` does not), needs no
disk, and belongs to whoever migrates. A setting of the database would say the same, but PostgreSQL lets only a
superuser give a database a setting that no module of its has declared (manual, ALTER DATABASE), and hosts give none.
"""

from __future__ import annotations

from datetime import UTC, datetime

import asyncpg
from sqlalchemy import Connection, text

from utils.database import ConnectTarget, Pool
from utils.exceptions import MigrationError, translate

#: What the comment begins with; anything else is somebody else's remark, and says nothing about us.
PREFIX = "AUTO_MIGRATE is off: "
#: Seconds for a question.
SECONDS = 10.0

_READ = "SELECT obj_description(to_regclass('alembic_version'), 'pg_class')"
#: COMMENT takes no parameters: the server quotes the text itself.
_WRITE = (
    "SELECT pg_catalog.format('COMMENT ON TABLE %s IS %L', to_regclass('alembic_version'), $1::text)"
    " WHERE to_regclass('alembic_version') IS NOT NULL"
)


async def is_off(where: Pool | ConnectTarget) -> str | None:
    """Return why and since when the schema is left as it is; None: it may be brought up to date.

    Raises `DatabaseError`.
    """
    return _reason(await _ask(where, _READ))


async def turn_off(where: Pool | ConnectTarget, revision: str, *, now: datetime | None = None) -> str:
    """Leave the schema as it is from now on, and return what `is_off` says thereafter.

    `revision`: where an operator takes it; `now`: for tests. Raises `MigrationError` when no schema was ever made.
    """
    when = (now or datetime.now(UTC)).astimezone(UTC)
    reason = f"the schema was taken down to {revision} by an operator on {when:%Y-%m-%d at %H:%M} UTC"
    statement = await _ask(where, _WRITE, PREFIX + reason)
    if statement is None:
        raise MigrationError(
            "AUTO_MIGRATE cannot be switched off where no schema was ever made: run python bot.py db upgrade first"
        )
    await _ask(where, statement)
    return reason


async def turn_on(where: Pool | ConnectTarget) -> None:
    """Let the schema be brought up to date again; nothing happens when it may be already. Raises `DatabaseError`."""
    if await is_off(where) is not None:
        await _ask(where, "COMMENT ON TABLE alembic_version IS NULL")


def read(connection: Connection) -> str | None:
    """Return what `is_off` does, on a connection of SQLAlchemy's."""
    return _reason(connection.scalar(text(_READ)))


def clear(connection: Connection) -> None:
    """Do what `turn_on` does, on a connection of SQLAlchemy's; the caller commits."""
    if read(connection) is not None:
        connection.execute(text("COMMENT ON TABLE alembic_version IS NULL"))


def _reason(comment: str | None) -> str | None:
    return comment.removeprefix(PREFIX) if comment is not None and comment.startswith(PREFIX) else None


async def _ask(where: Pool | ConnectTarget, query: str, *arguments: str) -> str | None:
    if isinstance(where, Pool):
        found: str | None = await where.fetchval(query, *arguments, timeout=SECONDS)
        return found
    try:
        connection = await asyncpg.connect(**where.connect_kwargs(), timeout=SECONDS, command_timeout=SECONDS)
        try:
            found = await connection.fetchval(query, *arguments)
        finally:
            await connection.close(timeout=SECONDS)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as exc:
        raise translate(exc) or exc from exc
    return found
