"""Helpers of the tests of mirrored tables: rows to write, tables to read, received listings."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.leases import seize
from utils.database import Pool
from utils.exceptions import SyncError, ValidationError
from utils.mirror.reconcile.listing import Listing
from utils.mirror.records.rows import Absence, Entry, Group, Key, Run, key_columns
from utils.mirror.spool.queue import EventQueue
from utils.mirror.translate.objects import LISTED_MEMBER_COLUMNS, LISTED_USER_COLUMNS
from utils.mirror.translate.pages import Page, Record
from utils.mirror.write.batch import Batch, WriteCounts, write_batch
from utils.mirror.write.overlay import LiveOverlay
from utils.mirror.write.writer import FlushPolicy, MirrorWriter
from utils.service.lease import Fence

GUILD = 81_384_788_765_712_384
OTHER_GUILD = GUILD + (7 << 22)
MIRRORED = ("guilds", "users", "members", "roles", "channels", "threads")

Tables = dict[str, dict[Key, dict[str, Any]]]


def when(seconds: int) -> datetime:
    """Return a moment, `seconds` after an arbitrary one."""
    return datetime(2024, 5, 1, tzinfo=UTC) + timedelta(seconds=seconds)


def entry_of(
    table: str, key: Key, stamp: int, *, may_insert: bool = True, **values: Any
) -> tuple[tuple[str, Key], Entry]:
    """Return an entry of the buffer."""
    return (table, key), Entry(values, may_insert, stamp)


async def fence_of(database: Pool) -> Fence:
    """Return the fence of the active process, or of a test process if there is none."""
    epoch = await database.fetchval("SELECT epoch FROM ops.leases")
    return await seize(database, "a test") if epoch is None else Fence("a test", epoch)


async def applied(database: Pool, batch: Batch) -> WriteCounts:
    """Write a batch as the active process."""
    return await write_batch(database, batch, await fence_of(database))


async def writer_of(database: Pool, **policy: Any) -> MirrorWriter:
    """Return a writer of the active process, with a queue in memory only."""
    fence = await fence_of(database)
    queue = EventQueue(None, spool="off", max_rows=20_000)
    return MirrorWriter(
        database, fence, queue, FlushPolicy(**policy), on_lost=lambda: None, on_dropped=lambda guilds: None
    )


async def write(database: Pool, *entries: tuple[tuple[str, Key], Entry]) -> WriteCounts:
    """Write observations as one batch."""
    batch = dict(entries)
    assert len(batch) == len(entries), "a batch holds one entry a row"
    return await applied(database, Batch(entries=batch))


async def write_groups(database: Pool, *groups: Group, absences: Sequence[Absence] = ()) -> WriteCounts:
    """Write what a listing showed, as one batch."""
    return await applied(database, Batch(groups=list(groups), absences=list(absences)))


async def rows(database: Pool, table: str) -> dict[Key, dict[str, Any]]:
    """Return a table's rows by key, without updated_at."""
    keys = key_columns(table)
    records = await database.fetch(f"SELECT * FROM {table}")  # noqa: S608
    return {
        tuple(record[key] for key in keys): {
            name: value for name, value in record.items() if name not in (*keys, "updated_at")
        }
        for record in records
    }


async def dead_letters(database: Pool) -> list[dict[str, Any]]:
    """Return the dead letters, oldest first."""
    return [dict(row) for row in await database.fetch("SELECT * FROM ops.dead_letters ORDER BY id")]


async def row(database: Pool, table: str, key: Key) -> dict[str, Any]:
    """Return one row."""
    return (await rows(database, table))[key]


async def versions(database: Pool, table: str) -> dict[Key, tuple[Any, Any]]:
    """Return the ctid and xmin of each row of a table: even an update to equal values changes them."""
    keys = key_columns(table)
    records = await database.fetch(f"SELECT {', '.join(keys)}, ctid::text, xmin::text FROM {table}")  # noqa: S608
    return {tuple(record[key] for key in keys): (record["ctid"], record["xmin"]) for record in records}


async def history(database: Pool, table: str = "changes") -> list[tuple[Any, ...]]:
    """Return the history as (table, key, action, user id, before, after), oldest first."""
    records = await database.fetch(f"SELECT * FROM {table} ORDER BY id")  # noqa: S608
    return [
        (
            record["table_name"],
            tuple(record["key"][name] for name in key_columns(record["table_name"])),
            record["action"],
            record["user_id"],
            record["before"],
            record["after"],
        )
        for record in records
    ]


async def empty(database: Pool) -> None:
    """Empty every mirrored table and the history, between two examples of a property."""
    await database.execute(
        "TRUNCATE guilds, users, members, roles, channels, threads, changes, user_changes, sync_runs"
    )


def member_record(user_id: int, stamp: int, *, guild_id: int = GUILD, **values: Any) -> Record:
    """Return the record of a listed member."""
    given = {"roles": [], "joined_at": when(0), "pending": False, "flags": 0} | values
    return (guild_id, user_id, *(given.get(name) for name in LISTED_MEMBER_COLUMNS), stamp)


def user_record(user_id: int, stamp: int, **values: Any) -> Record:
    """Return the record of a listed user."""
    given = {"username": f"user {user_id}", "discriminator": "0", "bot": False, "system": False, "public_flags": 0}
    given |= values
    return (user_id, *(given.get(name) for name in LISTED_USER_COLUMNS), stamp)


def page(members: Iterable[Record], users: Iterable[Record] | None = None) -> Page:
    """Return a page of members and, unless others are given, their users."""
    listed = list(members)
    return Page(
        users=[user_record(record[1], record[-1]) for record in listed] if users is None else list(users),
        members=listed,
        seen=len(listed),
    )


class Received(Listing):
    """A listing whose pages have all been received; with `breaks`, one that fails after the last of them."""

    def __init__(
        self,
        database: Pool,
        pages: Iterable[Page],
        stamp: int,
        *,
        overlay: LiveOverlay,
        guild_id: int = GUILD,
        source: str = "gateway",
        breaks: SyncError | None = None,
    ) -> None:
        super().__init__(
            guild_id, stamp=stamp, source=source, reason="request", started_at=database.now(),
            overlay=overlay, on_malformed=_refuse,
        )  # fmt: skip
        self._received = deque(pages)
        self._breaks = breaks

    async def next_page(self, timeout: float) -> Page | None:
        if not self._received:
            if self._breaks is not None:
                raise self._breaks
            return None
        page = self._received.popleft()
        self.pages += 1
        self.seen += page.seen
        self.unreadable += page.unreadable
        return page


def complete_run(stamp: int, guild_id: int = GUILD) -> Run:
    """Return the run of a complete listing."""
    return Run(guild_id, when(0), "rest", "request", stamp)


def _refuse(error: ValidationError) -> None:
    raise error
