"""Dead letters: what the database refuses is set apart with its error, and the rest of its batch is written."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from utils.database import Connection
from utils.exceptions import DatabaseError
from utils.mirror.records.events import Event, Message
from utils.mirror.records.rows import Entry, Group, Key, key_columns
from utils.mirror.write.merge_sql import subject
from utils.service import metrics

_log = logging.getLogger(__name__)

Piece = TypeVar("Piece")

_BURY = (
    "INSERT INTO ops.dead_letters (table_name, key, user_id, payload, stamp, sqlstate, error) "
    "VALUES ($1, $2, $3, $4, $5, $6, $7)"
)


def is_about_rows(error: BaseException) -> bool:
    """Return whether a row itself is at fault: classes 22 and 23 (PostgreSQL documentation, "Error Codes")."""
    return isinstance(error, DatabaseError) and (error.sqlstate or "")[:2] in ("22", "23")


async def isolate(
    pieces: Sequence[Piece],
    write: Callable[[Sequence[Piece]], Awaitable[None]],
    bury: Callable[[Piece, Exception], Awaitable[None]],
) -> None:
    """Halve what the database refuses until the bad piece stands alone, and bury it; write the rest, in order.

    Raises what `write` and `bury` raise when no piece is at fault; what they were not called for is not written then.
    """
    parts = [pieces]
    while parts:
        part = parts.pop()
        if not part:
            continue
        try:
            await write(part)
        except DatabaseError as error:
            if not is_about_rows(error):
                raise
            if len(part) == 1:
                await bury(part[0], error)
            else:
                half = len(part) // 2
                parts += [part[half:], part[:half]]


async def bury_row(connection: Connection, slot: tuple[str, Key], entry: Entry, error: Exception) -> None:
    """Keep a refused row in `ops.dead_letters`."""
    table, key = slot
    names = dict(zip(key_columns(table), key, strict=True))
    values = names | entry.values
    person = values["id"] if table == "users" else values.get(subject(table) or "")
    await _bury(connection, table, names, person, entry.values, entry.stamp, error)


async def bury_record(connection: Connection, group: Group, record: tuple[Any, ...], error: Exception) -> None:
    """Keep a refused record of a listing in `ops.dead_letters`."""
    keys = len(key_columns(group.table))
    values = dict(zip(group.columns, record[keys:-1], strict=True))
    await bury_row(connection, (group.table, record[:keys]), Entry(values, True, record[-1]), error)


async def bury_event(connection: Connection, event: Event, error: Exception) -> None:
    """Keep a refused event in `ops.dead_letters`."""
    table = "member_stats" if isinstance(event, Message) else "member_events"
    payload = event._asdict()
    stamp = payload.pop("stamp")
    key = {"guild_id": event.guild_id, "user_id": event.user_id}
    await _bury(connection, table, key, event.user_id, payload, stamp, error)


async def _bury(
    connection: Connection,
    table: str,
    key: dict[str, Any],
    person: int | None,
    payload: dict[str, Any],
    stamp: int,
    error: Exception,
) -> None:
    await connection.execute(
        _BURY, table, key, person, payload, stamp, getattr(error, "sqlstate", None), str(error)[:2_000]
    )
    metrics.dead_letters.labels(table).inc()
    _log.error("%s %s is refused by the database, it is kept in ops.dead_letters: %s", table, key, error)
