"""Writes one batch through the merge: users first, in their own short transaction, everything else in a second one."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from sqlalchemy import ARRAY
from sqlalchemy.dialects.postgresql import JSONB

from utils.database import Connection, Pool
from utils.database.sql import array_literal, load_statements
from utils.mirror.records.events import Event, Membership
from utils.mirror.records.rows import (
    COUNTER_BITS,
    Absence,
    Entry,
    Group,
    Key,
    Mode,
    Run,
    group_entries,
    key_columns,
    table_of,
    tombstone_column,
)
from utils.mirror.write import events, merge_sql
from utils.service.lease import Fence

#: Rows in one statement: bounds the size of the arrays and the time that the event loop spends on encoding them.
STATEMENT_ROWS = 1_000
#: Tables that a batch may write beside the mirrored ones.
HISTORY_TABLES = ("changes", "user_changes", "member_events", "member_stats", "sync_runs")

_CASCADES = load_statements(Path(__file__).with_name("cascades.sql"))
_STRIP_DELETED_ROLES = _CASCADES["strip_deleted_roles"]
_DELETE_THREADS_OF_CHANNELS = _CASCADES["delete_threads_of_channels"]
_LEAVE_UNLISTED_GUILDS = _CASCADES["leave_unlisted_guilds"]
_INSERT_SYNC_RUN = """
INSERT INTO sync_runs (guild_id, started_at, finished_at, state, source, reason, stamp, pages, rows_seen,
                       rows_inserted, rows_updated, rows_left, error)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
"""


@dataclass(slots=True)
class EventBatch:
    """Events of one journal, oldest first, and the journal position that is committed with them."""

    journal: str
    events: list[Event]
    position: int
    #: Whether the database may already have some of them: a commit was not confirmed, or this journal was never read.
    may_be_committed: bool = True
    #: Other joins, leaves and bans of the same people in the same journal; compared with, not written.
    context: Sequence[Membership] = ()


@dataclass(slots=True)
class Batch:
    """What is written together: events, buffered rows, listings, what complete listings prove, and their runs."""

    entries: Mapping[tuple[str, Key], Entry] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    absences: list[Absence] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    #: Guilds named by READY: (shard id, number of shards, guild ids, stamp).
    ready: list[tuple[int, int, set[int], int]] = field(default_factory=list)
    events: EventBatch | None = None


@dataclass(slots=True)
class WriteCounts:
    """Rows that a batch changed, by table, and events that it added."""

    inserted: Counter[str] = field(default_factory=Counter)
    updated: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    events: int = 0

    @property
    def total(self) -> int:
        """All rows of mirrored tables that were written."""
        return self.inserted.total() + self.updated.total() + self.removed.total()

    @property
    def tables(self) -> frozenset[str]:
        """Tables that may have changed, history included."""
        changed = {table for counter in (self.inserted, self.updated, self.removed) for table in +counter}
        return frozenset((*changed, *(HISTORY_TABLES if changed or self.events else ())))


async def write_batch(pool: Pool, batch: Batch, fence: Fence, users_lock: asyncio.Lock | None = None) -> WriteCounts:
    """Write a batch and return what it changed.

    Buffered rows are written before listings, which were requested after those rows were received. Events are written
    before both, so that a listing infers no join that an event reports. `users_lock` is held while users are written;
    None if nothing else writes users. Raises `LeaseLost` when another process holds the lease.
    """
    counts = WriteCounts()
    live = list(group_entries(batch.entries.items()))
    live_users = [group for group in live if group.table == "users"]
    listed_users = [group for group in batch.groups if group.table == "users"]
    live_rest = [group for group in live if group.table != "users"]
    listed_rest = [group for group in batch.groups if group.table != "users"]
    if live_users or listed_users:
        async with users_lock or contextlib.nullcontext(), pool.transaction() as connection:
            await fence.check(connection)
            await write_groups(connection, live_users, counts)
            await write_groups(connection, listed_users, counts, inferred=True)
    if live_rest or listed_rest or batch.absences or batch.runs or batch.ready or batch.events:
        async with pool.transaction() as connection:
            await fence.check(connection)
            if batch.events is not None:
                counts.events = await _write_events(connection, batch.events, fence)
            await write_groups(connection, live_rest, counts)
            await _apply_live_cascades(connection, pool, batch.entries)
            runs = {run.guild_id: run for run in batch.runs}
            for run in batch.runs:  # an earlier attempt may have counted rows
                run.rows_inserted = run.rows_updated = run.rows_left = 0
            await write_groups(connection, listed_rest, counts, runs, inferred=True)
            await _write_absences(connection, pool, batch.absences, counts, runs)
            if _may_record_memberships(batch, live_rest, listed_rest):
                queued = batch.events
                await events.settle_histories(
                    connection,
                    written=[event for event in queued.events if isinstance(event, Membership)] if queued else (),
                    pending=[event for event in queued.context if event.stamp > queued.position] if queued else (),
                )
            for shard_id, shards, ids, stamp in batch.ready:
                counts.removed["guilds"] += await connection.fetchval(
                    _LEAVE_UNLISTED_GUILDS, shard_id, shards, sorted(ids), stamp, pool.now()
                )
            for run in batch.runs:
                await insert_sync_run(connection, pool, run)
    return counts


def _may_record_memberships(batch: Batch, *groups: Sequence[Group]) -> bool:
    """Return whether a batch can add joins or leaves, reported or inferred."""
    return (
        (batch.events is not None and any(isinstance(event, Membership) for event in batch.events.events))
        or any(absence.table == "members" for absence in batch.absences)
        or any(group.table == "members" and "joined_at" in group.columns for some in groups for group in some)
    )


async def _write_events(connection: Connection, batch: EventBatch, fence: Fence) -> int:
    """Write events and the position that they reach; events that are already in the database are left out."""
    new, context = batch.events, batch.context
    if batch.may_be_committed:
        position = await connection.fetchval(events.SELECT_POSITION, batch.journal)
        if position is not None:
            committed = [event for event in new if event.stamp <= position and isinstance(event, Membership)]
            context = [*context, *committed]
            new = [event for event in new if event.stamp > position]
    first_stamp = fence.epoch << COUNTER_BITS
    written = await events.write_events(connection, new, first_stamp, context) if new else 0
    await connection.execute(events.ADVANCE_POSITION, batch.journal, batch.position)
    return written


async def write_groups(
    connection: Connection,
    groups: Iterable[Group],
    counts: WriteCounts,
    runs: Mapping[int, Run] | None = None,
    *,
    inferred: bool = False,
) -> None:
    """Merge groups inside a transaction, and add to `counts` and, for members, to the run of their guild.

    `inferred`: a listing or a snapshot showed the rows; false if dispatches did.
    """
    for group in groups:
        statement = merge_sql.merge_arrays(group.table, group.columns, group.mode)
        for start in range(0, len(group.records), STATEMENT_ROWS):
            records = group.records[start : start + STATEMENT_ROWS]
            row = await connection.fetchrow(
                statement, *_to_arrays(group, records), inferred and group.mode is not Mode.CREATE
            )
            assert row is not None
            inserted, updated = row
            counts.inserted[group.table] += inserted
            counts.updated[group.table] += updated
            if runs and group.table == "members" and (run := runs.get(records[0][0])) is not None:
                run.rows_inserted += inserted
                run.rows_updated += updated


def _to_arrays(group: Group, records: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    """Turn records into one array for each column; arrays and jsonb are sent as text."""
    arrays = [list(values) for values in zip(*records, strict=True)]
    columns = table_of(group.table).columns
    for position, name in enumerate((*key_columns(group.table), *group.columns)):
        type_ = columns[name].type
        if isinstance(type_, ARRAY):
            arrays[position] = [None if value is None else array_literal(value) for value in arrays[position]]
        elif isinstance(type_, JSONB):
            arrays[position] = [
                value if value is None or isinstance(value, str) else orjson.dumps(value).decode()
                for value in arrays[position]
            ]
    return arrays


async def _apply_live_cascades(connection: Connection, pool: Pool, entries: Mapping[tuple[str, Key], Entry]) -> None:
    """Apply the cascades that Discord sends nothing for, after dispatches that deleted roles or channels."""
    for table in ("roles", "channels"):
        tombstone = str(tombstone_column(table))
        deleted = [
            (*key, entry.stamp)
            for (name, key), entry in entries.items()
            if name == table and entry.values.get(tombstone) is not None
        ]
        await apply_cascade(connection, pool, table, deleted)


async def apply_cascade(
    connection: Connection, pool: Pool, table: str, deleted: Sequence[tuple[int, ...]], *, inferred: bool = False
) -> None:
    """Apply what the deletion of roles or channels implies for members or threads.

    `deleted` holds (guild id, id, stamp). `inferred`: a listing proved the deletions. Rows of other tables imply
    nothing.
    """
    if not deleted:
        return
    guild_ids, ids, stamps = (list(values) for values in zip(*sorted(deleted), strict=True))
    if table == "roles":
        await connection.execute(_STRIP_DELETED_ROLES, guild_ids, ids, inferred)
    elif table == "channels":
        await connection.execute(_DELETE_THREADS_OF_CHANNELS, guild_ids, ids, stamps, pool.now(), inferred)


async def _write_absences(
    connection: Connection,
    pool: Pool,
    absences: Sequence[Absence],
    counts: WriteCounts,
    runs: Mapping[int, Run],
) -> None:
    """Tombstone what complete listings did not show, with the cascades."""
    for table in sorted({absence.table for absence in absences}):
        of_table = [absence for absence in absences if absence.table == table]
        listed = [(absence.guild_id, id) for absence in of_table for id in absence.present]
        tombstoned = await connection.fetch(
            merge_sql.tombstone_absent(table),
            [guild_id for guild_id, _ in listed],
            [id for _, id in listed],
            [absence.guild_id for absence in of_table],
            [absence.stamp for absence in of_table],
            pool.now(),
        )
        counts.removed[table] += len(tombstoned)
        if table == "members":
            for guild_id, _ in tombstoned:
                if guild_id in runs:
                    runs[guild_id].rows_left += 1
        else:
            stamps = {absence.guild_id: absence.stamp for absence in of_table}
            deleted = [(guild_id, id, stamps[guild_id]) for guild_id, id in tombstoned]
            await apply_cascade(connection, pool, table, deleted, inferred=True)


async def insert_sync_run(connection: Connection, pool: Pool, run: Run) -> None:
    """Insert the `sync_runs` row of a finished reconcile."""
    await connection.execute(
        _INSERT_SYNC_RUN,
        run.guild_id,
        run.started_at,
        pool.now(),
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
