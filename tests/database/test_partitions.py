"""Monthly partitions are created once, in UTC, and take over rows of the default partition."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta, timezone

import pytest

from utils.database import Pool
from utils.database.partitions import ensure_partitions, id_at, month_start, partitioned_tables
from utils.exceptions import DatabaseUnavailable
from utils.operations import migrations

NOVEMBER = datetime(2026, 11, 20, tzinfo=UTC)


async def ensure(
    database: Pool, now: datetime = NOVEMBER, months_ahead: int = 2, lock_seconds: float = 5.0
) -> list[str]:
    async with database.acquire() as conn:
        return await ensure_partitions(conn, now, months_ahead, lock_seconds=lock_seconds)


async def note(database: Pool, *moments: datetime) -> None:
    async with database.acquire() as conn:
        await conn.executemany(
            "INSERT INTO changes (guild_id, id, table_name, key, action) VALUES (1, $1, 'members', $2, 'update')",
            [(id_at(moment), {"n": number}) for number, moment in enumerate(moments)],
        )


async def where(database: Pool) -> dict[str, int]:
    rows = await database.fetch("SELECT tableoid::regclass::text AS place, count(*) AS n FROM changes GROUP BY 1")
    return {row["place"]: row["n"] for row in rows}


def test_partitioned_tables() -> None:
    assert partitioned_tables() == ["changes", "user_changes"]


def test_ids_count_from_discords_epoch() -> None:
    example = 175928847299117063  # Discord API reference, "Snowflakes": 2016-04-30 11:18:25.796 UTC
    assert id_at(datetime(2016, 4, 30, 11, 18, 25, 796_000, tzinfo=UTC)) == example >> 22 << 22


async def test_creates_months_across_the_turn_of_the_year(database: Pool) -> None:
    made = await ensure(database)
    assert made == [f"{t}_{m}" for t in ("changes", "user_changes") for m in ("y2026m11", "y2026m12", "y2027m01")]
    assert await migrations.check_drift(database) == []


async def test_is_idempotent(database: Pool) -> None:
    await ensure(database)
    assert await ensure(database) == []
    assert await ensure(database, month_start(2026, 12)) == ["changes_y2027m02", "user_changes_y2027m02"]


async def test_rows_are_routed_to_the_month_of_their_id(database: Pool) -> None:
    await ensure(database)
    start, instant = month_start(2026, 12), timedelta(milliseconds=1)
    await note(database, start - instant, start, month_start(2027, 1) - instant, month_start(2027, 2))
    assert await where(database) == {"changes_y2026m11": 1, "changes_y2026m12": 2, "changes_default": 1}


async def test_months_are_utc(database: Pool) -> None:
    eve = datetime(2026, 12, 31, 20, tzinfo=timezone(timedelta(hours=-5)))
    assert (await ensure(database, eve, 0))[0] == "changes_y2027m01"


async def test_moves_rows_out_of_the_default_partition(database: Pool) -> None:
    await note(database, month_start(2026, 10), NOVEMBER, NOVEMBER + timedelta(days=1), month_start(2026, 12))
    await ensure(database, months_ahead=0)
    assert await where(database) == {"changes_y2026m11": 2, "changes_default": 2}
    assert await database.fetchval("SELECT count(DISTINCT key) FROM changes") == 4
    assert await migrations.check_drift(database) == []


async def test_later_rows_go_to_the_new_partition(database: Pool) -> None:
    await note(database, NOVEMBER)
    await ensure(database, months_ahead=0)
    with pytest.raises(Exception, match="duplicate key"):
        await note(database, NOVEMBER)
    await note(database, NOVEMBER + timedelta(seconds=1))
    assert await where(database) == {"changes_y2026m11": 2}


async def test_concurrent_calls_create_each_month_once(database: Pool) -> None:
    await note(database, NOVEMBER)
    results = await asyncio.gather(*(ensure(database) for _ in range(4)))
    assert sorted(name for made in results for name in made) == sorted(set(await names(database)))
    assert await where(database) == {"changes_y2026m11": 1}


async def test_gives_up_on_a_locked_table(database: Pool) -> None:
    async with database.transaction() as holder:
        await holder.execute("LOCK TABLE changes_default IN ROW EXCLUSIVE MODE")
        with pytest.raises(DatabaseUnavailable, match="lock"):
            await ensure(database, lock_seconds=0.1)
        assert await names(database) == []
    assert len(await ensure(database)) == 6


async def names(database: Pool) -> list[str]:
    rows = await database.fetch(
        "SELECT relname FROM pg_class WHERE relispartition AND relname ~ '_y[0-9]{4}m[0-9]{2}$'"
    )
    return [row["relname"] for row in rows if not row["relname"].endswith("_pkey")]
