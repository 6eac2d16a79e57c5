"""Maintenance: what is due, and doing it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_command_line import db
from tests.operations.migrations.support import with_revision
from utils.database import Pool, ownership
from utils.database.access import Database
from utils.exceptions import MigrationError
from utils.operations import migrations
from utils.operations.action import Step
from utils.operations.backup.scratch.load import refresh_views
from utils.operations.upkeep import maintain

BLOAT = """
INSERT INTO member_stats (guild_id, user_id) SELECT 1, n FROM generate_series(1, 120000) AS n;
DELETE FROM member_stats WHERE user_id > 3000;
"""


async def bloat_indexes(database: Pool) -> None:
    """Make the indexes of member_stats far too large for their rows."""
    async with database.acquire() as connection:
        await connection.execute(BLOAT)
        await connection.execute("VACUUM ANALYZE member_stats")


async def due_jobs(database: Pool) -> set[tuple[str, str]]:
    return {(job.kind, job.name) for job in await maintain.plan(database)}


async def partitions(database: Pool) -> list[str]:
    """Return the partitions of the table `changes`."""
    rows = await database.fetch("SELECT relid::text AS name FROM pg_partition_tree('changes') WHERE isleaf ORDER BY 1")
    return [row["name"] for row in rows]


async def test_rebuilds_a_bloated_index(database: Pool) -> None:
    await bloat_indexes(database)
    job = ("reindex", "public.pk_member_stats")
    assert job in await due_jobs(database)
    before = await database.fetchval("SELECT pg_relation_size('pk_member_stats')")
    outcome = await maintain.maintain(database)
    assert outcome.ok
    assert await database.fetchval("SELECT pg_relation_size('pk_member_stats')") < before / 4
    assert job not in await due_jobs(database)


async def test_leaves_a_large_index_without_bloat(database: Pool) -> None:
    await database.execute(
        "INSERT INTO member_stats (guild_id, user_id) SELECT n % 50, n FROM generate_series(1, 100000) AS n"
    )
    await database.execute("ANALYZE member_stats")
    assert not [job for job in await maintain.plan(database) if job.kind == "reindex"]


async def test_analyzes_changed_tables_once(database: Pool) -> None:
    await database.execute("INSERT INTO documents (guild_id, namespace, key, value) VALUES (0, 'a', 'b', '{}')")
    assert ("analyze", "public.documents") in await due_jobs(database)
    await maintain.maintain(database)
    assert ("analyze", "public.documents") not in await due_jobs(database)


async def test_refreshes_views_concurrently_if_possible(database: Pool, tmp_path: Path) -> None:
    view = "CREATE MATERIALIZED VIEW everybody AS SELECT count(*) AS n FROM users WITH NO DATA"
    options = with_revision(tmp_path, f'def upgrade():\n    op.execute("{view}")')
    await migrations.upgrade(database, options=options)

    async def is_concurrent() -> bool:
        jobs = await maintain.plan(database, scripts=options.scripts, view_seconds=0)
        return next(job.concurrently for job in jobs if job.kind == "refresh")

    assert not await is_concurrent()
    await maintain.maintain(database, scripts=options.scripts, view_seconds=0)
    await database.execute("CREATE UNIQUE INDEX everybody_n ON everybody (n)")
    await database.execute("INSERT INTO users (id, username) VALUES (5, 'one')")
    assert await is_concurrent()
    assert (await maintain.maintain(database, scripts=options.scripts, view_seconds=0)).ok
    assert await database.fetchval("SELECT n FROM everybody") == 1
    assert await maintain.plan(database, scripts=options.scripts) == [], "it is due again after a while"


async def test_a_view_is_as_fresh_as_its_last_refresh(
    database: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ANALYZE does not refresh it, and a refresh by a cog or a restore does."""
    view = "CREATE MATERIALIZED VIEW everybody AS SELECT count(*) AS n FROM users"
    options = with_revision(tmp_path, f'def upgrade():\n    op.execute("{view}")')
    await migrations.upgrade(database, options=options)
    owned = ownership.owned(options.scripts)
    monkeypatch.setattr(ownership, "owned", lambda *_: owned)

    async def is_due() -> bool:
        return ("refresh", "public.everybody") in await due_jobs(database)

    await database.execute("ANALYZE everybody")
    assert await is_due()
    access = Database(database)
    try:
        await access.refresh_materialized_views()
        assert not await is_due()
        await database.execute("UPDATE ops.positions SET updated_at = updated_at - interval '2 hours'")
        await database.execute("ANALYZE everybody")
        assert await is_due()
        await refresh_views(database.direct, database.placement)
        assert not await is_due()
        await database.execute("UPDATE ops.positions SET updated_at = now() + interval '1 day'")
        assert await is_due(), "the clock was wrong"
    finally:
        await access.close(1.0)


async def test_nothing_is_due_after_maintenance(database: Pool) -> None:
    steps: list[Step] = []
    await database.execute("INSERT INTO documents (guild_id, namespace, key, value) VALUES (0, 'a', 'b', '{}')")
    assert {kind for kind, _ in await due_jobs(database)} == {"analyze", "partitions"}
    assert (await maintain.maintain(database, progress=steps.append)).ok
    assert steps[-1].done == steps[-1].total
    assert await maintain.plan(database) == []
    assert (await maintain.preview(database)).text.startswith("Nothing is due")
    outcome = await maintain.maintain(database)
    assert (outcome.ok, outcome.data["done"]) == (True, [])
    (month, *_) = [name for name in await partitions(database) if "_y2" in name]
    await database.execute(f"DROP TABLE {month}")
    assert [job.why for job in await maintain.plan(database)] == ["create 1 partition for the coming months"]


async def test_leaves_what_no_revision_made(database: Pool) -> None:
    await database.execute(
        "CREATE TABLE theirs AS SELECT 1 AS n; CREATE MATERIALIZED VIEW their_view AS SELECT count(*) FROM theirs"
    )
    await bloat_indexes(database)
    await database.execute("CREATE TABLE their_stats AS TABLE member_stats; CREATE INDEX their_index ON theirs (n)")
    names = {name for _, name in await due_jobs(database)}
    assert "public.pk_member_stats" in names
    assert not [name for name in names if "their" in name]


async def test_a_failed_job_does_not_stop_the_others(database: Pool) -> None:
    await database.execute("INSERT INTO documents (guild_id, namespace, key, value) VALUES (0, 'a', 'b', '{}')")
    await database.execute("INSERT INTO guilds (id, name) VALUES (1, 'one')")
    async with database.transaction() as connection:
        pid = await connection.fetchval("SELECT pg_backend_pid()")
        await connection.execute("LOCK TABLE documents IN SHARE UPDATE EXCLUSIVE MODE")
        outcome = await maintain.maintain(database, lock_timeout="50ms")
    assert not outcome.ok
    assert "FAILED: analyze documents" in outcome.text
    assert f"documents is locked by process {pid}" in outcome.text
    assert "done: analyze guilds" in outcome.text


async def test_one_process_maintains_at_a_time(database: Pool) -> None:
    async with database.acquire() as connection:
        pid = await connection.fetchval("SELECT pg_backend_pid() FROM pg_advisory_lock($1)", maintain.LOCK_KEY)
        try:
            with pytest.raises(MigrationError, match=f"another process maintains this database: process {pid} "):
                await maintain.maintain(database)
        finally:
            await connection.execute("SELECT pg_advisory_unlock($1)", maintain.LOCK_KEY)


async def test_command_line_does_nothing_without_yes(tmp_path: Path, database: Pool, database_url: str) -> None:
    await database.execute("INSERT INTO documents (guild_id, namespace, key, value) VALUES (0, 'a', 'b', '{}')")
    code, output = await db(tmp_path, "maintain", DATABASE_URL=database_url)
    assert (code, "analyze documents: never analyzed" in output) == (0, True)
    assert ("analyze", "public.documents") in await due_jobs(database)
    assert (await db(tmp_path, "maintain", "--yes", DATABASE_URL=database_url))[0] == 0
    assert ("analyze", "public.documents") not in await due_jobs(database)
    rows = await database.fetch("SELECT command, arguments FROM ops.admin_actions ORDER BY id")
    assert [tuple(row) for row in rows] == [("db maintain", {"yes": False}), ("db maintain", {"yes": True})]
