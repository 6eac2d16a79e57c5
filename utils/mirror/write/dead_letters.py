"""Isolates what the database refuses: the bad row or event becomes a dead letter, everything else is written."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import asyncpg

from models import Base, Erase
from utils.database import Connection, Pool
from utils.exceptions import DatabaseError, DatabaseUnavailable, LeaseLost
from utils.mirror.records.batch_rows import DecodedRow
from utils.mirror.records.events import Event, Membership, Message
from utils.mirror.records.rows import COUNTER_BITS, Absence, Entry, Group, Key, Observation, key_columns
from utils.mirror.spool.queue import EventQueue
from utils.mirror.write import events, merge_sql
from utils.mirror.write.batch import Batch, EventBatch, WriteCounts, write_batch
from utils.mirror.write.buffer import Buffer
from utils.mirror.write.merge_sql import person_column
from utils.service import metrics
from utils.service.lease import Fence
from utils.text import storable

_log = logging.getLogger(__name__)

Slot = tuple[str, Key]
Item = TypeVar("Item")

#: Rows of a table, and of what waits, that are tried to find out whether the table accepts any.
_SAMPLE_ROWS = 10
#: Characters of an error message that a dead letter keeps.
_ERROR_LENGTH = 2_000
_INSERT = """
INSERT INTO ops.dead_letters (table_name, key, user_id, payload, stamp, sqlstate, error, cog)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
"""


class Writer(Protocol):
    """The part of `MirrorWriter` that isolation uses."""

    @property
    def pool(self) -> Pool: ...
    @property
    def fence(self) -> Fence: ...
    @property
    def buffer(self) -> Buffer: ...
    @property
    def queue(self) -> EventQueue: ...
    @property
    def write_lock(self) -> asyncio.Lock: ...
    @property
    def users_lock(self) -> asyncio.Lock: ...

    async def next_events(self) -> EventBatch | None: ...
    async def write(self, batch: Batch) -> WriteCounts: ...
    def count(self, counts: WriteCounts) -> None: ...
    def finish(self, observation: Observation, error: Exception | None) -> None: ...
    def without_stale_columns(self, observation: Observation) -> Iterator[Group]: ...
    def absences_without_live(self, observation: Observation) -> list[Absence]: ...


def is_row_error(error: BaseException) -> bool:
    """Return whether a row itself is at fault: SQLSTATE classes 22 and 23 (PostgreSQL manual, appendix A)."""
    return isinstance(error, DatabaseError) and (error.sqlstate or "")[:2] in ("22", "23")


def may_be_row_error(error: BaseException) -> bool:
    """Return whether a row may be at fault: a trigger, a policy or a limit refuses some rows and accepts others."""
    if isinstance(error, DatabaseUnavailable | LeaseLost):
        return False
    return isinstance(error, DatabaseError) and error.sqlstate is not None


async def write_isolated(writer: Writer, observations: list[Observation]) -> None:
    """Write queued events, buffered rows and observations; each bad row or event becomes a dead letter.

    Finished observations are removed from the list. What the database refuses of a whole table stays queued, and its
    error is raised after everything else is written.
    """
    held: DatabaseError | None = None
    async with writer.write_lock:
        for write in (_write_queued_events, _write_buffered_rows):
            try:
                await write(writer)
            except DatabaseError as error:
                if not may_be_row_error(error):
                    raise
                held = held or error
    while observations:
        refused: DatabaseError | None = None
        async with writer.write_lock:
            try:
                await _write_observation(writer, observations[0])
            except DatabaseError as error:
                if not may_be_row_error(error):
                    raise
                refused = error
        writer.finish(observations.pop(0), refused)
    if held is not None:
        raise held


async def _write_queued_events(writer: Writer) -> None:
    newest = writer.queue.last
    while (batch := await writer.next_events()) is not None:
        writer.count(WriteCounts(events=await write_events_isolated(writer.pool, writer.fence, batch)))
        await writer.queue.discard(batch.position)
        if batch.position >= newest:
            return


async def write_events_isolated(
    pool: Pool, fence: Fence, batch: EventBatch, entries: Mapping[Slot, Entry] | None = None
) -> int:
    """Write events, the position that they reach, and rows; each bad event becomes a dead letter.

    Returns how many events were new. Raises `DatabaseError` when no event or row is at fault, `LeaseLost` when another
    process holds the lease.
    """
    try:
        return (await write_batch(pool, Batch(events=batch, entries=entries or {}), fence)).events
    except DatabaseError as error:
        if not may_be_row_error(error):
            raise
    written = 0

    async def write(part: Sequence[Event]) -> None:
        nonlocal written
        others = set(batch.events).difference(part)
        context = [event for event in batch.events if isinstance(event, Membership) and event in others]
        piece = EventBatch(batch.journal, list(part), part[-1].stamp, context=[*context, *batch.context])
        written += (await write_batch(pool, Batch(events=piece), fence)).events

    async def bury(event: Event, error: Exception) -> None:
        async with pool.transaction() as connection:
            await fence.check(connection)
            await _bury_event(connection, event, error)
            await connection.execute(events.ADVANCE_POSITION, batch.journal, event.stamp)

    async def is_accepted(event: Event) -> bool:
        """Try an event in a transaction that is rolled back: its position must not be recorded before the others'."""
        async with _rolled_back(pool) as connection:
            await events.write_events(connection, [event], fence.epoch << COUNTER_BITS)
            return True

    accepts = _AcceptsRows(pool, _event_table, is_accepted)
    await _bisect(batch.events, write, bury, accepts)
    if entries:  # the rows of events are an extra: without them, the next reconcile shows the same
        with contextlib.suppress(DatabaseError):
            await write_batch(pool, Batch(entries=entries), fence)
    return written


async def _write_buffered_rows(writer: Writer) -> None:
    remaining = writer.buffer.take()

    async def write(part: Sequence[tuple[Slot, Entry]]) -> None:
        await _write_and_count(writer, Batch(entries=dict(part)))
        for slot, _ in part:
            remaining.pop(slot, None)

    async def bury(item: tuple[Slot, Entry], error: Exception) -> None:
        async with writer.pool.transaction() as connection:
            await writer.fence.check(connection)
            await _bury_row(connection, *item, error)
        remaining.pop(item[0], None)

    async def is_accepted(item: tuple[Slot, Entry]) -> bool:
        await write([item])
        return True

    by_table: dict[str, list[tuple[Slot, Entry]]] = defaultdict(list)
    for slot, entry in remaining.items():
        by_table[slot[0]].append((slot, entry))
    held: DatabaseError | None = None
    try:
        for table in sorted(by_table, key=lambda name: (name != "users", name)):
            accepts = _AcceptsRows(writer.pool, lambda item: item[0][0], is_accepted)
            try:
                await _bisect(by_table[table], write, bury, accepts)
            except DatabaseError as error:
                if not may_be_row_error(error):
                    raise
                held = held or error
        if held is not None:
            raise held
    finally:
        writer.buffer.give_back(remaining)


async def _write_observation(writer: Writer, observation: Observation) -> None:
    """Write the rows of an observation, then what it proves."""

    async def write(part: Sequence[tuple[Group, tuple[Any, ...]]]) -> None:
        await _write_and_count(writer, Batch(groups=list(_regrouped(part))))

    async def bury(item: tuple[Group, tuple[Any, ...]], error: Exception) -> None:
        async with writer.pool.transaction() as connection:
            await writer.fence.check(connection)
            await _bury_record(connection, *item, error)

    async def is_accepted(item: tuple[Group, tuple[Any, ...]]) -> bool:
        await write([item])
        return True

    groups = list(writer.without_stale_columns(observation))
    accepts = _AcceptsRows(writer.pool, lambda item: item[0].table, is_accepted)
    await _bisect([(group, record) for group in groups for record in group.records], write, bury, accepts)
    proof = Batch(absences=writer.absences_without_live(observation))
    if observation.run is not None:
        proof.runs.append(observation.run)
    if observation.ready is not None:
        proof.ready.append((*observation.ready, observation.stamp))
    await _write_and_count(writer, proof)


async def _write_and_count(writer: Writer, batch: Batch) -> None:
    writer.count(await writer.write(batch))


def _regrouped(items: Iterable[tuple[Group, tuple[Any, ...]]]) -> Iterator[Group]:
    """Put records back into groups like those that they came from."""
    source: Group | None = None
    regrouped: Group | None = None
    for group, record in items:
        if group is not source or regrouped is None:
            if regrouped is not None:
                yield regrouped
            source, regrouped = group, Group(group.table, group.columns, group.mode)
        regrouped.records.append(record)
    if regrouped is not None:
        yield regrouped


class _AcceptsRows:
    """Finds out, once for each table, whether a table accepts rows: then an error is about those that it refuses.

    `is_accepted` tries one item: it returns True, or raises the database's error.
    """

    def __init__(
        self, pool: Pool, table_of: Callable[[Any], str], is_accepted: Callable[[Any], Awaitable[bool]]
    ) -> None:
        self._pool = pool
        self._table_of = table_of
        self._is_accepted = is_accepted
        self._known: dict[str, bool] = {}

    async def __call__(self, item: Any, items: Sequence[Any]) -> bool:
        """Return whether the table of `item` accepts others of `items`, or the rows that it has."""
        table = self._table_of(item)
        if table not in self._known:
            others = [other for other in items if other is not item and self._table_of(other) == table]
            self._known[table] = await self._accepts_any(others) or await accepts_own_rows(self._pool, table)
        return self._known[table]

    async def _accepts_any(self, others: Sequence[Any]) -> bool:
        for other in random.sample(others, min(len(others), _SAMPLE_ROWS)):
            try:
                return await self._is_accepted(other)
            except DatabaseError as error:
                if not may_be_row_error(error):
                    raise
        return False


async def accepts_own_rows(pool: Pool, table: str) -> bool:
    """Return whether a table accepts any of a few rows that it has, written once more and rolled back."""
    async with _rolled_back(pool) as connection:
        try:
            rows = [
                row
                for newest in (False, True)
                for row in await connection.fetch(merge_sql.select_sample_keys(table, newest), _SAMPLE_ROWS // 2)
            ]
        except asyncpg.PostgresError:
            return False
        for row in rows:
            try:
                async with connection.transaction():
                    await connection.execute(merge_sql.rewrite_row(table), *row)
                    return True
            except asyncpg.PostgresError:
                continue
    return False


@contextlib.asynccontextmanager
async def _rolled_back(pool: Pool) -> AsyncIterator[Connection]:
    """Yield a connection in a transaction that is always rolled back."""
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            yield connection
            await connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
        finally:
            await transaction.rollback()


def _event_table(event: Event) -> str:
    return "member_stats" if isinstance(event, Message) else "member_events"


async def _bisect(
    items: Sequence[Item],
    write: Callable[[Sequence[Item]], Awaitable[None]],
    bury: Callable[[Item, Exception], Awaitable[None]],
    accepts: _AcceptsRows,
) -> None:
    """Write items in order; halve a part that the database refuses until the bad item is alone, and bury it.

    An error of `write` or `bury` that is not about a row, or about every row of a table, is raised, and the remaining
    items are not written.
    """
    parts = [items]
    while parts:
        part = parts.pop()
        if not part:
            continue
        try:
            await write(part)
        except DatabaseError as error:
            if not may_be_row_error(error):
                raise
            if len(part) > 1:
                half = len(part) // 2
                parts += [part[half:], part[:half]]
            elif is_row_error(error) or await accepts(part[0], items):
                await bury(part[0], error)
            else:
                raise


async def _bury_row(connection: Connection, slot: Slot, entry: Entry, error: Exception) -> None:
    table, key = slot
    named_key = dict(zip(key_columns(table), key, strict=True))
    values = named_key | entry.values
    user_id = values["id"] if table == "users" else values.get(person_column(table) or "")
    await _insert(connection, table, named_key, user_id, entry.values, entry.stamp, error)


async def _bury_record(connection: Connection, group: Group, record: tuple[Any, ...], error: Exception) -> None:
    keys = len(key_columns(group.table))
    values = dict(zip(group.columns, record[keys:-1], strict=True))
    await _bury_row(connection, (group.table, record[:keys]), Entry(values, True, record[-1]), error)


async def _bury_event(connection: Connection, event: Event, error: Exception) -> None:
    payload = event._asdict()
    stamp = payload.pop("stamp")
    key = {"guild_id": event.guild_id, "user_id": event.user_id}
    await _insert(connection, _event_table(event), key, event.user_id, payload, stamp, error)


async def _insert(
    connection: Connection,
    table: str,
    key: dict[str, Any],
    user_id: int | None,
    payload: dict[str, Any],
    stamp: int,
    error: Exception,
) -> None:
    sqlstate = getattr(error, "sqlstate", None)
    await connection.execute(_INSERT, table, key, user_id, payload, stamp, sqlstate, str(error)[:_ERROR_LENGTH], None)
    metrics.dead_letters.labels(table).inc()
    _log.error("the database refused a row of %s; moved to ops.dead_letters: key %s: %s", table, key, error)


async def bury_batch_rows(connection: Connection, refused: Iterable[tuple[DecodedRow, asyncpg.PostgresError]]) -> None:
    """Add dead letters for rows that cogs added to batches and their tables refuse."""
    letters = []
    for row, error in refused:
        table, keys, _, cog = row.target
        key = {name: row.values[name] for name in keys}
        state = getattr(error, "sqlstate", None)
        text = storable(str(error))[:_ERROR_LENGTH]
        letters.append((table, key, _subject_of(table, row.values), row.values, row.stamp, state, text, cog))
        metrics.dead_letters.labels(table).inc()
    await connection.executemany(_INSERT, letters)


def _subject_of(table: str, values: Mapping[str, Any]) -> int | None:
    """Return the user whom a row of a cog's table is about; None if it is about none, or the models are not loaded."""
    known = Base.metadata.tables.get(table)
    names = ["user_id"] if known is None else [c.name for c in known.columns if c.info.get("erase") is Erase.SUBJECT]
    value = next((values[name] for name in names if name in values), None)
    return value if type(value) is int else None


async def bury_change(
    pool: Pool,
    cog: str,
    *,
    table: str,
    key: dict[str, Any],
    user_id: int | None,
    payload: dict[str, Any],
    id: int,
    error: BaseException,
) -> None:
    """Add a dead letter for a change that a listener of a cog could not handle; the statement is a transaction."""
    text = storable(f"{type(error).__name__}: {error}")[:_ERROR_LENGTH]
    await pool.execute(_INSERT, table, key, user_id, payload, id, None, text, cog)
    metrics.dead_letters.labels(table).inc()
