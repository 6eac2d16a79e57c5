"""Writes batches through the merge: users first in their own short transaction, all else in one."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from sqlalchemy import ARRAY
from sqlalchemy.dialects.postgresql import JSONB

from utils.database import Connection, Pool
from utils.mirror.records.events import Event, Membership
from utils.mirror.records.rows import (
    COUNTER_BITS,
    Absence,
    Entry,
    Group,
    Key,
    Run,
    group_entries,
    key_columns,
    table_of,
    tombstone_column,
)
from utils.mirror.write import event_sql, merge_sql
from utils.service.lease import Fence

#: Rows in one statement: keeps the arrays, and the time that the loop spends on encoding them, small.
BATCH_ROWS = 1_000


@dataclass(slots=True)
class Told:
    """Events of one journal, oldest first, and the position that is committed with them."""

    journal: str
    events: list[Event]
    upto: int
    #: Whether some of them may be in the database already: the answer to an earlier commit was lost, or never asked.
    in_doubt: bool = True
    #: What else the same journal says of the same people, before and after.
    beside: Sequence[Membership] = ()


@dataclass(slots=True)
class Batch:
    """What is written together: events, waiting rows, listings proven complete, and the runs that proved them."""

    entries: Mapping[tuple[str, Key], Entry] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    absences: list[Absence] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    #: Guilds that the bot is in, by READY: (shard id, number of shards, ids, stamp).
    ready: list[tuple[int, int, set[int], int]] = field(default_factory=list)
    told: Told | None = None


#: What is written beside mirrored tables.
HISTORY = ("changes", "user_changes", "member_events", "member_stats", "sync_runs")


@dataclass(slots=True)
class Written:
    """How many rows a batch changed, by table."""

    inserted: Counter[str] = field(default_factory=Counter)
    updated: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    #: Events that were new.
    events: int = 0

    @property
    def total(self) -> int:
        """All rows written, history not counted."""
        return self.inserted.total() + self.updated.total() + self.removed.total()

    @property
    def tables(self) -> frozenset[str]:
        """Tables that may have changed, history included."""
        changed = {table for counter in (self.inserted, self.updated, self.removed) for table in +counter}
        return frozenset((*changed, *(HISTORY if changed or self.events else ())))


async def apply(database: Pool, batch: Batch, fence: Fence, users_writing: asyncio.Lock | None = None) -> Written:
    """Write a batch; waiting rows go before listings, which were asked for after they had been received.

    Events go first: who joined by an event needs no listing to prove it. `users_writing` is held while users are
    written; None where nobody else writes any. Raises `LeaseLost` when another process acts now.
    """
    written = Written()
    live = list(group_entries(batch.entries.items()))
    users = [group for group in live if group.table == "users"]
    listed_users = [group for group in batch.groups if group.table == "users"]
    rest = [group for group in live if group.table != "users"]
    listed = [group for group in batch.groups if group.table != "users"]
    if users or listed_users:
        async with users_writing or contextlib.nullcontext(), database.transaction() as connection:
            await fence.check(connection)
            await write_groups(connection, users, written)
            await write_groups(connection, listed_users, written, inferred=True)
    if rest or listed or batch.absences or batch.runs or batch.ready or batch.told:
        async with database.transaction() as connection:
            await fence.check(connection)
            if batch.told is not None:
                written.events = await _tell(connection, batch.told, fence)
            await write_groups(connection, rest, written)
            await _bury(connection, database, batch.entries)
            counted = {run.guild_id: run for run in batch.runs}
            for run in batch.runs:  # this may be the second try
                run.rows_inserted = run.rows_updated = run.rows_left = 0
            await write_groups(connection, listed, written, counted, inferred=True)
            await _tombstone(connection, database, batch.absences, written, counted)
            for shard_id, shards, ids, stamp in batch.ready:
                gone = await connection.fetchval(
                    merge_sql.LEFT_GUILDS, shard_id, shards, sorted(ids), stamp, database.now()
                )
                written.removed["guilds"] += gone
            for run in batch.runs:
                await record(connection, database, run)
    return written


async def _tell(connection: Connection, told: Told, fence: Fence) -> int:
    """Write events with the position that they reach; those that are in already are left out."""
    events, beside = told.events, told.beside
    if told.in_doubt and (position := await connection.fetchval(event_sql.POSITION, told.journal)) is not None:
        beside = [*beside, *(event for event in events if event.stamp <= position and isinstance(event, Membership))]
        events = [event for event in events if event.stamp > position]
    first_stamp = fence.epoch << COUNTER_BITS
    written = await event_sql.write_events(connection, events, first_stamp, beside) if events else 0
    await connection.execute(event_sql.ADVANCE, told.journal, told.upto)
    return written


async def write_groups(
    connection: Connection,
    groups: Iterable[Group],
    written: Written,
    runs: Mapping[int, Run] | None = None,
    *,
    inferred: bool = False,
) -> None:
    """Merge groups, inside a transaction; counts are added to `written`, those of members to the run of their guild.

    `inferred`: a listing or a snapshot shows them, no live event told of them.
    """
    for group in groups:
        statement = merge_sql.merge(group.table, group.columns, group.mode)
        for start in range(0, len(group.records), BATCH_ROWS):
            records = group.records[start : start + BATCH_ROWS]
            row = await connection.fetchrow(statement, *_arrays(group, records), inferred)
            assert row is not None
            written.inserted[group.table] += row[0]
            written.updated[group.table] += row[1]
            if runs and group.table == "members" and (run := runs.get(records[0][0])) is not None:
                run.rows_inserted += row[0]
                run.rows_updated += row[1]


def _arrays(group: Group, records: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    """Turn records into a parallel array for each column; nested values travel as text."""
    arrays = [list(values) for values in zip(*records, strict=True)]
    columns = table_of(group.table).columns
    for position, name in enumerate((*key_columns(group.table), *group.columns)):
        type_ = columns[name].type
        if isinstance(type_, ARRAY):
            arrays[position] = [None if value is None else _array_literal(value) for value in arrays[position]]
        elif isinstance(type_, JSONB):
            arrays[position] = [
                value if value is None or isinstance(value, str) else orjson.dumps(value).decode()
                for value in arrays[position]
            ]
    return arrays


def _array_literal(values: Sequence[Any]) -> str:
    if not values or isinstance(values[0], int):
        return "{" + ",".join(map(str, values)) + "}"
    quoted = (value.replace("\\", "\\\\").replace('"', '\\"') for value in values)
    return "{" + ",".join(f'"{value}"' for value in quoted) + "}"


async def _bury(connection: Connection, database: Pool, entries: Mapping[tuple[str, Key], Entry]) -> None:
    """Do what Discord leaves unsaid when a role or a channel is deleted."""
    for table, statement in (("roles", merge_sql.STRIP_ROLES), ("channels", merge_sql.BURY_THREADS)):
        tombstone = tombstone_column(table)
        dead = [
            (*key, entry.stamp)
            for (name, key), entry in entries.items()
            if name == table and entry.values.get(str(tombstone)) is not None
        ]
        await bury(connection, database, statement, dead)


async def bury(
    connection: Connection,
    database: Pool,
    statement: str,
    dead: Sequence[tuple[int, ...]],
    *,
    inferred: bool = False,
) -> None:
    """Run `STRIP_ROLES` or `BURY_THREADS` for (guild, id, stamp) of what was deleted; `inferred`: by a listing."""
    if dead:
        guilds, ids, stamps = (list(values) for values in zip(*sorted(dead), strict=True))
        if statement is merge_sql.STRIP_ROLES:
            await connection.execute(statement, guilds, ids, inferred)
        else:
            await connection.execute(statement, guilds, ids, stamps, database.now(), inferred)


async def _tombstone(
    connection: Connection,
    database: Pool,
    absences: Sequence[Absence],
    written: Written,
    runs: Mapping[int, Run],
) -> None:
    for table in sorted({absence.table for absence in absences}):
        proven = [absence for absence in absences if absence.table == table]
        pairs = [(absence.guild_id, id) for absence in proven for id in absence.present]
        gone = await connection.fetch(
            merge_sql.absence(table),
            [guild_id for guild_id, _ in pairs],
            [id for _, id in pairs],
            [absence.guild_id for absence in proven],
            [absence.stamp for absence in proven],
            database.now(),
        )
        written.removed[table] += len(gone)
        if table == "members":
            for guild_id, _ in gone:
                if guild_id in runs:
                    runs[guild_id].rows_left += 1
        elif gone:
            stamps = {absence.guild_id: absence.stamp for absence in proven}
            dead = [(guild_id, id, stamps[guild_id]) for guild_id, id in gone]
            statement = merge_sql.STRIP_ROLES if table == "roles" else merge_sql.BURY_THREADS
            await bury(connection, database, statement, dead, inferred=True)


async def record(connection: Connection, database: Pool, run: Run) -> None:
    """Write the `sync_runs` row of a finished reconcile."""
    await connection.execute(
        "INSERT INTO sync_runs (guild_id, started_at, finished_at, state, source, reason, stamp, pages, "
        "rows_seen, rows_inserted, rows_updated, rows_left, error) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)",
        run.guild_id,
        run.started_at,
        database.now(),
        "complete" if run.error is None else "failed",
        run.source,
        run.reason,
        run.stamp if run.error is None else None,
        run.pages,
        run.rows_seen,
        run.rows_inserted,
        run.rows_updated,
        run.rows_left,
        run.error,
    )
