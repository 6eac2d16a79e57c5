"""Writes large listings: streamed into staging tables by COPY in bounded memory, merged after the last page."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from typing import Protocol

import asyncpg

from utils.database import Connection, Pool
from utils.database.placement import placement_on
from utils.exceptions import SyncError
from utils.mirror.reconcile import staging_sql
from utils.mirror.reconcile.listing import Listing
from utils.mirror.records.rows import Group, Mode, Run, key_columns
from utils.mirror.translate.objects import LISTED_MEMBER_COLUMNS, LISTED_USER_COLUMNS
from utils.mirror.translate.pages import Page, Record
from utils.mirror.write.batch import WriteCounts, insert_sync_run, write_groups
from utils.mirror.write.buffer import Buffer
from utils.mirror.write.events import settle_histories
from utils.mirror.write.overlay import LiveOverlay
from utils.service import metrics
from utils.service.lease import Fence

_log = logging.getLogger(__name__)

#: Pages after which users are merged and committed: short transactions, and a staging table that stays small.
USER_BATCH_PAGES = 25
#: Pages queued between the gateway and a COPY; a page of members takes about 0.6 MB, one of users 0.4 MB.
QUEUED_PAGES = 4
#: Enough for members to continue while a batch of users is merged.
QUEUED_USER_PAGES = 16
#: Share of unknown rows from which inserting them separately is faster. Measured for 100,000: 0.27 s against 0.40 s.
MOSTLY_NEW = 0.1
#: Time limit of one COPY, which lasts as long as its listing. The page timeout ends a stuck listing long before.
COPY_SECONDS = 3_600.0
#: Time limit of one merge statement: a guild of a million members on a small host needs minutes.
MERGE_SECONDS = 600.0

_MEMBER_COLUMNS = (*key_columns("members"), *LISTED_MEMBER_COLUMNS, "stamp")
#: Enough to hash a large guild without spilling; the pool resets it when the connection is returned.
_SET_WORK_MEM = "SET work_mem = '64MB'"
#: A table that was never analysed looks empty, and the planner would choose a nested loop over the staging table, which
#: has no index. Measured on a guild of 20,000 members: 7.5 s instead of 0.1 s.
_DISABLE_NESTED_LOOPS = "SET LOCAL enable_nestloop = off"
#: Whether a later listing of the guild has been completed. Parameters: guild id, stamp of the listing.
_IS_SUPERSEDED = "SELECT EXISTS (SELECT FROM sync_runs WHERE guild_id = $1 AND state = 'complete' AND stamp > $2)"
_HAS_MEMBERS = "SELECT EXISTS (SELECT FROM members WHERE guild_id = $1)"


class Writer(Protocol):
    """The part of `MirrorWriter` that a large listing uses."""

    @property
    def pool(self) -> Pool: ...
    @property
    def overlay(self) -> LiveOverlay: ...
    @property
    def buffer(self) -> Buffer: ...
    @property
    def write_lock(self) -> asyncio.Lock: ...
    @property
    def users_lock(self) -> asyncio.Lock: ...
    @property
    def fence(self) -> Fence: ...

    async def flush_locked(self) -> None:
        """Write the buffer; the caller holds `write_lock`."""


class StagedListing:
    """Writes one large listing: users in short transactions while pages come, members in one transaction at the end."""

    def __init__(
        self, writer: Writer, listing: Listing, *, page_timeout: float, user_batch_pages: int = USER_BATCH_PAGES
    ) -> None:
        self.run = Run(listing.guild_id, listing.started_at, listing.source, listing.reason, listing.stamp)
        self._writer = writer
        self._pool = writer.pool
        self._listing = listing
        self._page_timeout = page_timeout
        self._user_batch_pages = user_batch_pages
        self._users: asyncio.Queue[list[Record] | None] = asyncio.Queue(QUEUED_USER_PAGES)
        self._members: asyncio.Queue[list[Record] | None] = asyncio.Queue(QUEUED_PAGES)
        #: Set when the users' side no longer needs `write_lock`: the members' side may hold it and wait for the users.
        self._flushed = asyncio.Event()
        self._users_done = asyncio.Event()

    async def write(self, first: Iterable[Page]) -> Run:
        """Write the pages already received and all that follow. If it raises, the members are unchanged."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._distribute_pages(first))
            tasks.create_task(self._write_users())
            tasks.create_task(self._write_members())
        return self.run

    async def _distribute_pages(self, first: Iterable[Page]) -> None:
        for page in first:
            await self._queue_page(page)
        while (next_page := await self._listing.next_page(self._page_timeout)) is not None:
            await self._queue_page(next_page)
        await self._users.put(None)
        await self._members.put(None)

    async def _queue_page(self, page: Page) -> None:
        await self._users.put(page.users)
        await self._members.put(page.members)

    async def _write_users(self) -> None:
        staging = staging_sql.staging_table("users")
        columns = staging_sql.staged_columns("users", LISTED_USER_COLUMNS)
        async with self._pool.acquire(temp=True) as connection:
            await connection.execute(staging_sql.create_staging("users", LISTED_USER_COLUMNS))
            await connection.execute(_SET_WORK_MEM)
            has_more = True
            while has_more:
                pages = _PageStream(self._users, self._user_batch_pages)
                await _copy(connection, staging, columns, pages)
                has_more = not pages.has_ended
                if not self._flushed.is_set():  # write what was received before the listing was requested
                    async with self._writer.write_lock:
                        await self._writer.flush_locked()
                    self._flushed.set()
                async with self._writer.users_lock, connection.transaction():
                    await self._writer.fence.check(connection)
                    await self._merge(connection, "users", LISTED_USER_COLUMNS, None)
                await connection.execute(staging_sql.truncate_staging("users"))
        self._users_done.set()

    async def _write_members(self) -> None:
        guild_id = self._listing.guild_id
        async with self._pool.acquire(temp=True) as connection:
            if self._listing.source == "gateway" and not await self._has_members(connection):
                async with self._writer.write_lock:
                    # Rows held from here on must be newer than the listing, so write the older ones first.
                    await self._writer.flush_locked()
                    self._writer.buffer.hold(guild_id)
                try:
                    if not await self._has_members(connection):
                        await self._copy_into_empty_guild(connection)
                        return
                finally:
                    self._writer.buffer.release(guild_id)
            await self._merge_members(connection)

    async def _has_members(self, connection: Connection) -> bool:
        return bool(await connection.fetchval(_HAS_MEMBERS, self._listing.guild_id))

    async def _copy_into_empty_guild(self, connection: Connection) -> None:
        """COPY directly into the members of a guild that has none; its live rows are held until the commit."""
        guild_id = self._listing.guild_id
        async with connection.transaction():
            await self._writer.fence.check(connection)
            await connection.execute("SELECT pg_advisory_xact_lock($1)", placement_on(connection).lock_key(guild_id))
            if await self._has_members(connection):
                raise asyncpg.UniqueViolationError(f"guild {guild_id} got members meanwhile")
            self.run.rows_inserted = await _copy(connection, "members", _MEMBER_COLUMNS, _PageStream(self._members))
            await self._users_done.wait()
            await self._insert_run(connection)
        metrics.rows_written.labels("members").inc(self.run.rows_inserted)

    async def _merge_members(self, connection: Connection) -> None:
        staging = staging_sql.staging_table("members")
        guild_id, stamp = self._listing.guild_id, self._listing.stamp
        await connection.execute(staging_sql.create_staging("members", LISTED_MEMBER_COLUMNS))
        await connection.execute(_SET_WORK_MEM)
        await _copy(connection, staging, _MEMBER_COLUMNS, _PageStream(self._members))
        await self._flushed.wait()
        async with self._writer.write_lock:
            await self._writer.flush_locked()
            async with connection.transaction():
                await self._writer.fence.check(connection)
                await connection.execute(_DISABLE_NESTED_LOOPS)
                if await connection.fetchval(_IS_SUPERSEDED, guild_id, stamp):
                    raise SyncError(f"guild {guild_id}: a later listing has been completed meanwhile")
                counts = await self._merge(connection, "members", LISTED_MEMBER_COLUMNS, guild_id)
                self.run.rows_inserted, self.run.rows_updated = counts
                protected = self._listing.protected_ids()
                if protected is None:
                    _log.warning(
                        "could not read the id of a member: nothing is tombstoned", extra={"guild_id": guild_id}
                    )
                else:
                    self.run.rows_left = await connection.fetchval(
                        staging_sql.tombstone_unstaged("members"), list(protected), guild_id, stamp, self._pool.now()
                    )
                await settle_histories(connection)
                await self._users_done.wait()  # users are committed first
                await self._insert_run(connection)

    async def _merge(
        self, connection: Connection, table: str, columns: tuple[str, ...], guild_id: int | None
    ) -> tuple[int, int]:
        """Merge a staging table inside a transaction and return (rows inserted, rows updated)."""
        stamp, overlay = self._listing.stamp, self._writer.overlay
        touched = list(overlay.touched_since(table, guild_id or 0, stamp))
        inserted, updated = await _merge_staged(connection, table, columns, guild_id, touched)
        if touched:
            staged = await connection.fetch(staging_sql.select_staged(table, columns), touched)
            group = Group(table, columns, Mode.MERGE, [tuple(row) for row in staged])
            partial = [part for part in overlay.split_stale(group, guild_id or 0, stamp) if part.mode is Mode.UPDATE]
            counts = WriteCounts()
            await write_groups(connection, partial, counts, inferred=True)
            updated += counts.updated.total()
        metrics.rows_written.labels(table).inc(inserted + updated)
        return inserted, updated

    async def _insert_run(self, connection: Connection) -> None:
        self.run.pages = self._listing.pages
        self.run.rows_seen = self._listing.seen
        await insert_sync_run(connection, self._pool, self.run)


class _PageStream:
    """The records of queued pages for one COPY: of up to `limit` pages, or of all of them (None)."""

    def __init__(self, queue: asyncio.Queue[list[Record] | None], limit: int | None = None) -> None:
        self._queue = queue
        self._limit = limit
        self.has_ended = False

    async def records(self) -> AsyncIterator[Record]:
        """Yield records as pages come."""
        taken = 0
        while self._limit is None or taken < self._limit:
            page = await self._queue.get()
            if page is None:
                self.has_ended = True
                return
            for row in page:
                yield row
            taken += 1
            await asyncio.sleep(0)  # a COPY that never has to wait would block the event loop


async def _copy(connection: Connection, table: str, columns: tuple[str, ...], pages: _PageStream) -> int:
    """COPY records into a table and return their number."""
    status = await connection.copy_records_to_table(
        table, records=pages.records(), columns=columns, timeout=COPY_SECONDS
    )
    return int(status.split()[-1])


async def _merge_staged(
    connection: Connection, table: str, columns: tuple[str, ...], guild_id: int | None, touched: list[int]
) -> tuple[int, int]:
    """Merge a staging table inside a transaction and return (rows inserted, rows updated).

    If most rows are known, one statement does it. If many are new, they are inserted first.
    """
    inserted = 0
    unknown_in_sample = await connection.fetchval(
        staging_sql.count_unknown_in_sample(table), guild_id, timeout=MERGE_SECONDS
    )
    if unknown_in_sample > staging_sql.SAMPLE_ROWS * MOSTLY_NEW:
        differences = await connection.fetchrow(
            staging_sql.count_differences(table, columns), touched, guild_id, timeout=MERGE_SECONDS
        )
        assert differences is not None
        unknown, differing = differences
        if unknown:
            inserted = await _insert_unknown(connection, table, columns, guild_id)
        if not differing:
            return inserted, 0
    merged = await connection.fetchrow(
        staging_sql.merge_staged(table, columns), touched, guild_id, timeout=MERGE_SECONDS
    )
    assert merged is not None
    return inserted + merged[0], merged[1]


async def _insert_unknown(connection: Connection, table: str, columns: tuple[str, ...], guild_id: int | None) -> int:
    """Insert the staged rows that the table does not have, and return their number."""

    async def insert(*, skip_conflicts: bool) -> int:
        statement = staging_sql.insert_unknown(table, columns, skip_conflicts=skip_conflicts)
        if table == "members":
            inserted: int = await connection.fetchval(statement, guild_id, timeout=MERGE_SECONDS)
            return inserted
        return int((await connection.execute(statement, guild_id, timeout=MERGE_SECONDS)).split()[-1])

    try:
        async with connection.transaction():
            return await insert(skip_conflicts=False)
    except asyncpg.UniqueViolationError:
        return await insert(skip_conflicts=True)
