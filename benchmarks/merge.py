"""The database side of a sync: 100,000 members into PostgreSQL, against raw COPY and against what peers do."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.data import GUILD_ID, pages, records, writer_of
from benchmarks.figures import Figure, ratio
from benchmarks.rounds import ServerClock, Way, interleave
from models import Member, User
from utils.database import Pool
from utils.exceptions import ValidationError
from utils.mirror.reconcile.listing import Listing
from utils.mirror.reconcile.staging import StagedListing
from utils.mirror.records.rows import COUNTER_BITS, Run, key_columns
from utils.mirror.translate.objects import LISTED_MEMBER_COLUMNS, LISTED_USER_COLUMNS
from utils.mirror.translate.pages import Page, Record
from utils.mirror.write.overlay import LiveOverlay

MEMBERS = 100_000
#: The slow ways get a tenth of the rows; their times are per row.
PEER_MEMBERS = 10_000
USER_COLUMNS = (*key_columns("users"), *LISTED_USER_COLUMNS, "stamp")
MEMBER_COLUMNS = (*key_columns("members"), *LISTED_MEMBER_COLUMNS, "stamp")


class _Received(Listing):
    """A listing whose pages have all come."""

    def __init__(self, stamp: int, received: Sequence[Page], pool: Pool, touched: LiveOverlay) -> None:
        super().__init__(
            GUILD_ID, stamp=stamp, source="gateway", reason="request", started_at=pool.now(),
            overlay=touched, on_malformed=_refuse,
        )  # fmt: skip
        self._received = deque(received)

    async def next_page(self, timeout: float) -> Page | None:
        return self._received.popleft() if self._received else None


def _refuse(error: ValidationError) -> None:
    raise error


async def _empty(pool: Pool) -> None:
    await pool.execute("TRUNCATE users, members, sync_runs, changes, user_changes")
    await pool.execute("CHECKPOINT")


async def _raw_copy(pool: Pool, users: Sequence[Record], members: Sequence[Record]) -> None:
    async with pool.acquire() as connection:
        await connection.copy_records_to_table("users", records=users, columns=USER_COLUMNS)
        await connection.copy_records_to_table("members", records=members, columns=MEMBER_COLUMNS)


async def _ours(pool: Pool, users: Sequence[Record], members: Sequence[Record], stamp: int) -> Run:
    writer = await writer_of(pool)
    listing = _Received(stamp, list(pages(users, members)), pool, writer.overlay)
    return await StagedListing(writer, listing, page_timeout=60).write([])


async def _sqlalchemy(pool: Pool, users: Sequence[Record], members: Sequence[Record]) -> None:
    """Upsert by INSERT … VALUES of 1,000 rows, as bots built on SQLAlchemy do."""
    engine = create_async_engine(pool.target.sqlalchemy_url(), connect_args=pool.target.sqlalchemy_connect_args())
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


async def _executemany(pool: Pool, users: Sequence[Record], members: Sequence[Record]) -> None:
    for table, columns, rows in (("users", USER_COLUMNS, users), ("members", MEMBER_COLUMNS, members)):
        keys = key_columns(table)
        places = ", ".join(f"${number}" for number in range(1, len(columns) + 1))
        changes = ", ".join(f"{name} = excluded.{name}" for name in columns if name not in keys)
        async with pool.acquire() as connection:
            await connection.executemany(
                f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places}) "  # noqa: S608
                f"ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {changes}",
                rows,
            )


async def _dead_tuples(pool: Pool) -> int:
    await pool.execute("SELECT pg_stat_force_next_flush()")
    await asyncio.sleep(0.5)
    dead: int = await pool.fetchval(
        "SELECT sum(n_tup_upd + n_tup_del) FROM pg_stat_user_tables "
        "WHERE relname IN ('users', 'members', 'changes_default', 'user_changes_default')"
    )
    return dead


async def measure(pool: Pool, *, rounds: int = 7) -> list[Figure]:
    """Sync 100,000 members in every way, once a round."""
    epoch = 1 << COUNTER_BITS
    users, members = records(MEMBERS, epoch)
    changed_users, changed_members = records(MEMBERS, epoch, changed=0.01)
    few_users, few_members = users[:PEER_MEMBERS], members[:PEER_MEMBERS]
    share = MEMBERS / PEER_MEMBERS
    written: list[int] = []
    dead: list[int] = []
    dead_before = 0

    async def empty() -> None:
        await _empty(pool)

    async def synced() -> None:
        nonlocal dead_before
        await _empty(pool)
        await _ours(pool, users, members, epoch)
        await pool.execute("VACUUM ANALYZE users, members")
        dead_before = await _dead_tuples(pool)

    async def unchanged() -> None:
        run = await _ours(pool, users, members, epoch)
        written.append(run.rows_inserted + run.rows_updated + run.rows_left)

    async def count_dead() -> None:
        dead.append(await _dead_tuples(pool) - dead_before)

    ways = {
        "copy": Way(lambda: _raw_copy(pool, users, members), empty),
        "first": Way(lambda: _ours(pool, users, members, epoch), empty),
        "unchanged": Way(unchanged, synced, count_dead),
        "1 % changed": Way(lambda: _ours(pool, changed_users, changed_members, epoch), synced),
        "SQLAlchemy": Way(lambda: _sqlalchemy(pool, few_users, few_members), empty),
        "executemany": Way(lambda: _executemany(pool, few_users, few_members), empty),
    }
    samples = await interleave(ways, await ServerClock.of(pool), rounds=rounds)
    await _empty(pool)
    seconds = {name: found.seconds for name, found in samples.items()}
    cpu = {name: found.cpu for name, found in samples.items()}
    slow = [value * share for value in seconds["SQLAlchemy"]]
    many = [value * share for value in seconds["executemany"]]
    per_member = [value / MEMBERS * 1e6 for value in cpu["first"]]
    return [
        ratio("first sync of 100,000 members, speed against raw COPY", seconds["copy"], seconds["first"], "≥", 0.85),
        ratio("nothing changed, speed against that COPY", seconds["copy"], seconds["unchanged"], "≥", 1.3),
        ratio("1 % changed, speed against that COPY", seconds["copy"], seconds["1 % changed"], "≥", 1.1),
        ratio("first sync, processor time against raw COPY", cpu["first"], cpu["copy"]),
        ratio("nothing changed, processor time against raw COPY", cpu["unchanged"], cpu["copy"]),
        Figure("first sync, processor time per member, client and server", per_member, unit=" µs"),
        Figure("rows written when nothing changed", (max(written),), "≤", 0),
        Figure("dead tuples when nothing changed", (max(dead),), "≤", 0),
        ratio("first sync, speed against SQLAlchemy's INSERT … VALUES … ON CONFLICT", slow, seconds["first"], "≥", 10),
        ratio("first sync, speed against executemany", many, seconds["first"], "≥", 2),
    ]
