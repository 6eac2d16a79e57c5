"""The database side of a sync: 100,000 members into PostgreSQL, against raw COPY and against what peers do."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.data import GUILD_ID, pages, records, writer_of
from benchmarks.report import Row
from models import Member, User
from utils.database import Pool
from utils.exceptions import ValidationError
from utils.mirror.reconcile.listing import Listing
from utils.mirror.reconcile.staging import StagedListing
from utils.mirror.records.rows import COUNTER_BITS, Run, key_columns
from utils.mirror.translate.objects import LISTED_MEMBER, LISTED_USER
from utils.mirror.translate.pages import Page, Record
from utils.mirror.write.overlay import LiveOverlay

MEMBERS = 100_000
#: The slow ways get a tenth of the rows; their times are per row.
PEER_MEMBERS = 10_000
USER_COLUMNS = (*key_columns("users"), *LISTED_USER, "stamp")
MEMBER_COLUMNS = (*key_columns("members"), *LISTED_MEMBER, "stamp")


class _Received(Listing):
    """A listing whose pages have all come."""

    def __init__(self, stamp: int, received: Sequence[Page], database: Pool, touched: LiveOverlay) -> None:
        super().__init__(
            GUILD_ID, stamp=stamp, source="gateway", reason="request", started_at=database.now(),
            touched=touched, refuse=_refuse,
        )  # fmt: skip
        self._received = deque(received)

    async def next(self, timeout: float) -> Page | None:
        return self._received.popleft() if self._received else None


def _refuse(error: ValidationError) -> None:
    raise error


async def _empty(database: Pool) -> None:
    await database.execute("TRUNCATE users, members, sync_runs, changes, user_changes")
    await database.execute("CHECKPOINT")


async def _raw_copy(database: Pool, users: Sequence[Record], members: Sequence[Record]) -> None:
    async with database.acquire() as connection:
        await connection.copy_records_to_table("users", records=users, columns=USER_COLUMNS)
        await connection.copy_records_to_table("members", records=members, columns=MEMBER_COLUMNS)


async def _ours(database: Pool, users: Sequence[Record], members: Sequence[Record], stamp: int) -> Run:
    writer = await writer_of(database)
    listing = _Received(stamp, list(pages(users, members)), database, writer.touched)
    return await StagedListing(writer, listing, page_timeout=60).write([])


async def _sqlalchemy(database: Pool, users: Sequence[Record], members: Sequence[Record]) -> None:
    """Upsert by INSERT … VALUES of 1,000 rows, as bots built on SQLAlchemy do."""
    engine = create_async_engine(
        database.target.sqlalchemy_url(), connect_args=database.target.sqlalchemy_connect_args()
    )
    try:
        for table, columns, rows in ((User, USER_COLUMNS, users), (Member, MEMBER_COLUMNS, members)):
            keys = key_columns(table.__tablename__)
            for start in range(0, len(rows), 1_000):
                values = [dict(zip(columns, row, strict=True)) for row in rows[start : start + 1_000]]
                statement = insert(table).values(values)
                statement = statement.on_conflict_do_update(
                    index_elements=keys, set_={name: statement.excluded[name] for name in columns if name not in keys}
                )
                async with engine.begin() as connection:
                    await connection.execute(statement)
    finally:
        await engine.dispose()


async def _executemany(database: Pool, users: Sequence[Record], members: Sequence[Record]) -> None:
    for table, columns, rows in (("users", USER_COLUMNS, users), ("members", MEMBER_COLUMNS, members)):
        keys = key_columns(table)
        places = ", ".join(f"${number}" for number in range(1, len(columns) + 1))
        changes = ", ".join(f"{name} = excluded.{name}" for name in columns if name not in keys)
        async with database.acquire() as connection:
            await connection.executemany(
                f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places}) "  # noqa: S608
                f"ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {changes}",
                rows,
            )


async def _timed(work: Callable[[], Awaitable[object]]) -> float:
    gc.collect()
    started = time.perf_counter()
    await work()
    return time.perf_counter() - started


async def _dead_tuples(database: Pool) -> int:
    await database.execute("SELECT pg_stat_force_next_flush()")
    await asyncio.sleep(0.5)
    dead: int = await database.fetchval(
        "SELECT sum(n_tup_upd + n_tup_del) FROM pg_stat_user_tables "
        "WHERE relname IN ('users', 'members', 'changes_default', 'user_changes_default')"
    )
    return dead


async def measure(database: Pool, rounds: int = 5) -> list[Row]:
    """Time everything in turn, `rounds` times, and compare medians."""
    epoch = 1 << COUNTER_BITS
    users, members = records(MEMBERS, epoch)
    changed_users, changed_members = records(MEMBERS, epoch, changed=0.01)
    times: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    written, dead = -1, -1
    for _ in range(rounds):
        await _empty(database)
        note("copy", await _timed(lambda: _raw_copy(database, users, members)))
        await _empty(database)
        note("first", await _timed(lambda: _ours(database, users, members, epoch)))
        await database.execute("VACUUM ANALYZE users, members")
        before = await _dead_tuples(database)
        runs: list[Run] = []

        async def again(into: list[Run] = runs) -> None:
            into.append(await _ours(database, users, members, epoch))

        note("unchanged", await _timed(again))
        written = max(written, runs[0].rows_inserted + runs[0].rows_updated + runs[0].rows_left)
        dead = max(dead, await _dead_tuples(database) - before)
        note("1 % changed", await _timed(lambda: _ours(database, changed_users, changed_members, epoch)))
    few_users, few_members = users[:PEER_MEMBERS], members[:PEER_MEMBERS]
    share = MEMBERS / PEER_MEMBERS
    await _empty(database)
    slow = await _timed(lambda: _sqlalchemy(database, few_users, few_members)) * share
    await _empty(database)
    many = await _timed(lambda: _executemany(database, few_users, few_members)) * share
    await _empty(database)
    median = {name: statistics.median(values) for name, values in times.items()}
    floor = median["copy"]
    return [
        Row("first sync of 100,000 members, speed against raw COPY", floor / median["first"], "≥", 0.85),
        Row("nothing changed, speed against that COPY", floor / median["unchanged"], "≥", 1.3),
        Row("1 % changed, speed against that COPY", floor / median["1 % changed"], "≥", 1.1),
        Row("rows written when nothing changed", written, "≤", 0),
        Row("dead tuples when nothing changed", dead, "≤", 0),
        Row("first sync, speed against SQLAlchemy's INSERT … VALUES … ON CONFLICT", slow / median["first"], "≥", 10),
        Row("first sync, speed against executemany", many / median["first"], "≥", 2),
    ]
