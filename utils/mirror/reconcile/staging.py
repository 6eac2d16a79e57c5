"""Large listings: streamed into staging by COPY in bounded memory, merged when the last page has come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from typing import Any, Protocol

import asyncpg

from utils.database import Connection, Pool
from utils.exceptions import SyncError
from utils.mirror.reconcile.listing import Listing
from utils.mirror.records.rows import Group, Mode, Run, key_columns
from utils.mirror.translate.objects import LISTED_MEMBER_COLUMNS, LISTED_USER_COLUMNS
from utils.mirror.translate.pages import Page, Record
from utils.mirror.write import merge_sql
from utils.mirror.write.apply import Written, record, write_groups
from utils.mirror.write.buffer import Buffer
from utils.mirror.write.overlay import LiveOverlay
from utils.service import metrics
from utils.service.lease import Fence

_log = logging.getLogger(__name__)

#: Users are merged and committed every so many pages: short transactions, and a staging table that stays small.
USER_BATCH_PAGES = 25
#: Pages that wait between the gateway and a COPY; a page of members is about 0.6 MB, one of users 0.4 MB.
QUEUED_PAGES = 4
#: Enough for members to go on while a batch of users is merged.
QUEUED_USER_PAGES = 16
#: Share of unknown rows from which inserting them by themselves is faster: measured, 0.27 s against 0.40 s for 100,000.
MASS = 0.1
#: Seconds that one COPY may take: it lasts as long as the listing does. What bounds it in practice is the wait for each
#: page, and the gateway's patience with a database that takes none.
COPY_SECONDS = 3_600.0
#: Seconds that one statement of a merge may take: a guild of a million on a small host needs more than any other.
MERGE_SECONDS = 600.0

_MEMBER_COLUMNS = (*key_columns("members"), *LISTED_MEMBER_COLUMNS, "stamp")
#: Enough to hash a large guild without spilling; the pool sets it back when the connection returns.
_WORK_MEM = "SET work_mem = '64MB'"
#: A table that was never analysed looks empty, and a nested loop over staging, which has no index, would be chosen:
#: measured on a guild of 20,000, 7.5 s instead of 0.1 s.
_NO_NESTED_LOOPS = "SET LOCAL enable_nestloop = off"


class Writer(Protocol):
    """What a large listing needs of the mirror."""

    @property
    def database(self) -> Pool: ...
    @property
    def touched(self) -> LiveOverlay: ...
    @property
    def buffer(self) -> Buffer: ...
    @property
    def writing(self) -> asyncio.Lock: ...
    @property
    def users_writing(self) -> asyncio.Lock: ...
    @property
    def fence(self) -> Fence: ...

    async def flush_before(self) -> None:
        """Write what waits in the buffer; the caller holds `writing`."""


class StagedListing:
    """Writes one large listing: users in short transactions as pages come, members in one at the end."""

    def __init__(self, writer: Writer, listing: Listing, *, page_timeout: float) -> None:
        self._writer = writer
        self._database = writer.database
        self._listing = listing
        self._timeout = page_timeout
        self._users: asyncio.Queue[list[Record] | None] = asyncio.Queue(QUEUED_USER_PAGES)
        self._members: asyncio.Queue[list[Record] | None] = asyncio.Queue(QUEUED_PAGES)
        #: From here on the users' side needs `writing` no more: the members' side may hold it and wait for them.
        self._flushed = asyncio.Event()
        self._users_done = asyncio.Event()
        self.run = Run(listing.guild_id, listing.started_at, listing.source, listing.reason, listing.stamp)

    async def write(self, first: Iterable[Page]) -> Run:
        """Write the pages that came already and all that follow; when it raises, the members are as they were."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._pump(first))
            tasks.create_task(self._write_users())
            tasks.create_task(self._write_members())
        return self.run

    async def _pump(self, first: Iterable[Page]) -> None:
        for page in first:
            await self._hand_over(page)
        while (page := await self._listing.next(self._timeout)) is not None:  # type: ignore[assignment]
            await self._hand_over(page)
        await self._users.put(None)
        await self._members.put(None)

    async def _hand_over(self, page: Page) -> None:
        await self._users.put(page.users)
        await self._members.put(page.members)

    async def _write_users(self) -> None:
        merge = merge_sql.staged("users", LISTED_USER_COLUMNS)
        async with self._database.acquire(temp=True) as connection:
            await connection.execute(f"{merge.create}; {_WORK_MEM}")
            more = True
            while more:
                stream = _Stream(self._users, USER_BATCH_PAGES)
                await _copy(connection, merge.staging, merge.columns, stream)
                more = not stream.ended
                if not self._flushed.is_set():  # what was received before the listing was asked for
                    async with self._writer.writing:
                        await self._writer.flush_before()
                    self._flushed.set()
                async with self._writer.users_writing, connection.transaction():
                    await self._writer.fence.check(connection)
                    await self._merge(connection, merge, LISTED_USER_COLUMNS, None)
                await connection.execute(f"TRUNCATE {merge.staging}")
        self._users_done.set()

    async def _write_members(self) -> None:
        guild_id = self._listing.guild_id
        async with self._database.acquire(temp=True) as connection:
            if self._listing.source == "gateway" and await self._is_first(connection):
                async with self._writer.writing:
                    # What is held must be younger than the listing: nothing from before may lie under it.
                    await self._writer.flush_before()
                    self._writer.buffer.hold(guild_id)
                try:
                    if await self._is_first(connection):
                        await self._write_first(connection)
                        return
                finally:
                    self._writer.buffer.release(guild_id)
            await self._write_difference(connection)

    async def _is_first(self, connection: Connection) -> bool:
        known = await connection.fetchval(
            "SELECT EXISTS (SELECT FROM members WHERE guild_id = $1)", self._listing.guild_id
        )
        return not known

    async def _write_first(self, connection: Connection) -> None:
        """COPY straight into a guild that has no rows yet; whatever comes live meanwhile waits for the commit."""
        guild_id = self._listing.guild_id
        async with connection.transaction():
            await self._writer.fence.check(connection)
            await connection.execute("SELECT pg_advisory_xact_lock($1)", guild_id)
            if not await self._is_first(connection):
                raise asyncpg.UniqueViolationError(f"guild {guild_id} got members meanwhile")
            self.run.rows_inserted = await _copy(connection, "members", _MEMBER_COLUMNS, _Stream(self._members))
            await self._users_done.wait()
            await self._finish(connection)
        metrics.rows_written.labels("members").inc(self.run.rows_inserted)

    async def _write_difference(self, connection: Connection) -> None:
        merge = merge_sql.staged("members", LISTED_MEMBER_COLUMNS)
        guild_id, stamp = self._listing.guild_id, self._listing.stamp
        await connection.execute(f"{merge.create}; {_WORK_MEM}")
        await _copy(connection, merge.staging, merge.columns, _Stream(self._members))
        await self._flushed.wait()
        async with self._writer.writing:
            await self._writer.flush_before()
            async with connection.transaction():
                await self._writer.fence.check(connection)
                await connection.execute(_NO_NESTED_LOOPS)
                if await connection.fetchval(merge_sql.SUPERSEDED, guild_id, stamp):
                    raise SyncError(f"guild {guild_id}: a later listing has been completed meanwhile")
                counts = await self._merge(connection, merge, LISTED_MEMBER_COLUMNS, guild_id)
                self.run.rows_inserted, self.run.rows_updated = counts
                spared = self._listing.spared()
                if spared is None:
                    _log.warning("a member's id could not be read: nobody is tombstoned", extra={"guild_id": guild_id})
                else:
                    self.run.rows_left = await connection.fetchval(
                        merge.absent, list(spared), guild_id, stamp, self._database.now()
                    )
                await self._users_done.wait()  # users are committed first
                await self._finish(connection)

    async def _merge(
        self, connection: Connection, merge: merge_sql.StagedMerge, columns: tuple[str, ...], guild_id: int | None
    ) -> tuple[int, int]:
        """Merge what is staged, inside a transaction; return the number of rows inserted and updated."""
        stamp, touched = self._listing.stamp, self._writer.touched
        ids = list(touched.since(merge.table, guild_id or 0, stamp))
        inserted, updated = await _merge(connection, merge, guild_id, ids)
        if ids:
            staged = [tuple(row) for row in await connection.fetch(merge.named, ids)]
            behind = touched.behind(Group(merge.table, columns, Mode.MERGE, staged), guild_id or 0, stamp)
            written = Written()
            partial = [group for group in behind if group.mode is Mode.UPDATE]
            await write_groups(connection, partial, written, inferred=True)
            updated += written.updated.total()
        metrics.rows_written.labels(merge.table).inc(inserted + updated)
        return inserted, updated

    async def _finish(self, connection: Connection) -> None:
        self.run.pages = self._listing.pages
        self.run.rows_seen = self._listing.seen
        await record(connection, self._database, self.run)


class _Stream:
    """Records of queued pages, as one COPY takes them: up to `limit` pages; None for all of them."""

    def __init__(self, queue: asyncio.Queue[list[Record] | None], limit: int | None = None) -> None:
        self._queue = queue
        self._limit = limit
        self.ended = False

    async def records(self) -> AsyncIterator[Record]:
        """Yield record by record, as pages come."""
        taken = 0
        while self._limit is None or taken < self._limit:
            page = await self._queue.get()
            if page is None:
                self.ended = True
                return
            for row in page:
                yield row
            taken += 1
            await asyncio.sleep(0)  # a COPY that never waits would keep the loop from everything else


async def _copy(connection: Connection, table: str, columns: tuple[str, ...], stream: _Stream) -> int:
    """COPY what the stream yields, and return how many rows that were."""
    status = await connection.copy_records_to_table(
        table, records=stream.records(), columns=columns, timeout=COPY_SECONDS
    )
    return int(status.split()[-1])


async def _merge(
    connection: Connection, merge: merge_sql.StagedMerge, guild_id: int | None, touched: list[int]
) -> tuple[int, int]:
    """Merge a staging table, inside a transaction; return the number of rows inserted and updated."""
    inserted = 0
    if await connection.fetchval(merge.sampled, guild_id, timeout=MERGE_SECONDS) > merge_sql.SAMPLE * MASS:
        row: Any = await connection.fetchrow(merge.counted, touched, guild_id, timeout=MERGE_SECONDS)
        unknown, differing = row
        if unknown:
            try:
                async with connection.transaction():
                    inserted = await _insert(connection, merge.fresh, guild_id)
            except asyncpg.UniqueViolationError:
                inserted = await _insert(connection, merge.fresh_checked, guild_id)
        if not differing:
            return inserted, 0
    row = await connection.fetchrow(merge.difference, touched, guild_id, timeout=MERGE_SECONDS)
    return inserted + row[0], row[1]


async def _insert(connection: Connection, statement: str, guild_id: int | None) -> int:
    """Run an INSERT and return how many rows it made, whether it answers that or leaves it to the server to say."""
    if statement.startswith("INSERT"):
        return int((await connection.execute(statement, guild_id, timeout=MERGE_SECONDS)).split()[-1])
    inserted: int = await connection.fetchval(statement, guild_id, timeout=MERGE_SECONDS)
    return inserted
