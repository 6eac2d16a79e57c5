"""Upkeep: what it would do, and what it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_command_line import db
from utils.database import Pool
from utils.exceptions import MigrationError
from utils.operations.upkeep import maintain

BLOAT = """
INSERT INTO member_stats (guild_id, user_id) SELECT 1, n FROM generate_series(1, 120000) AS n;
DELETE FROM member_stats WHERE user_id > 3000;
"""


async def bloated(database: Pool) -> None:
    """Leave indexes behind that are far too large for their rows."""
    async with database.acquire() as connection:
        await connection.execute(BLOAT)
        await connection.execute("VACUUM ANALYZE member_stats")


async def kinds(database: Pool) -> set[tuple[str, str]]:
    return {(job.kind, job.name) for job in await maintain.plan(database)}


async def test_a_bloated_index_is_found_and_built_anew_and_a_sound_one_left_alone(database: Pool) -> None:
    await bloated(database)
    wanted = ("reindex", "public.pk_member_stats")
    assert wanted in await kinds(database)
    before = await database.fetchval("SELECT pg_relation_size('pk_member_stats')")
    outcome = await maintain.maintain(database)
    assert outcome.ok
    assert await database.fetchval("SELECT pg_relation_size('pk_member_stats')") < before / 4
    assert wanted not in await kinds(database)


async def test_a_sound_index_of_many_rows_is_not_taken_for_bloated(database: Pool) -> None:
    await database.execute(
        "INSERT INTO member_stats (guild_id, user_id) SELECT n % 50, n FROM generate_series(1, 100000) AS n"
    )
    await database.execute("ANALYZE member_stats")
    assert not [job for job in await maintain.plan(database) if job.kind == "reindex"]


async def test_what_changed_is_analysed_once(database: Pool) -> None:
    await database.execute("INSERT INTO documents (guild_id, namespace, key, value) VALUES (0, 'a', 'b', '{}')")
    assert ("analyze", "public.documents") in await kinds(database)
    await maintain.maintain(database)
    assert ("analyze", "public.documents") not in await kinds(database)


async def test_views_are_refreshed_beside_their_readers_where_that_is_possible(database: Pool) -> None:
    await database.execute("CREATE MATERIALIZED VIEW everybody AS SELECT count(*) AS n FROM users WITH NO DATA")
    assert "its readers wait" in next(j.why for j in await maintain.plan(database) if j.kind == "refresh")
    await maintain.maintain(database)
    await database.execute("CREATE UNIQUE INDEX everybody_n ON everybody (n)")
    await database.execute("INSERT INTO users (id, username) VALUES (5, 'one')")
    assert next(j.why for j in await maintain.plan(database) if j.kind == "refresh") == "beside its readers"
    assert (await maintain.maintain(database)).ok
    assert await database.fetchval("SELECT n FROM everybody") == 1


async def test_what_fails_is_told_and_the_rest_is_done(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintain, "LOCK_TIMEOUT", "50ms")
    await database.execute("INSERT INTO documents (guild_id, namespace, key, value) VALUES (0, 'a', 'b', '{}')")
    await database.execute("INSERT INTO guilds (id, name) VALUES (1, 'one')")
    async with database.transaction() as connection:
        await connection.execute("LOCK TABLE documents IN SHARE UPDATE EXCLUSIVE MODE")
        outcome = await maintain.maintain(database)
    assert not outcome.ok
    assert "FAILED: analyze documents" in outcome.text
    assert "done: analyze guilds" in outcome.text


async def test_two_do_not_maintain_at_once(database: Pool) -> None:
    async with database.acquire() as connection:
        await connection.execute("SELECT pg_advisory_lock($1)", maintain.LOCK_KEY)
        try:
            with pytest.raises(MigrationError, match="already"):
                await maintain.maintain(database)
        finally:
            await connection.execute("SELECT pg_advisory_unlock($1)", maintain.LOCK_KEY)


async def test_the_command_line_does_nothing_without_yes(tmp_path: Path, database: Pool, database_url: str) -> None:
    await database.execute("INSERT INTO documents (guild_id, namespace, key, value) VALUES (0, 'a', 'b', '{}')")
    code, output = await db(tmp_path, "maintain", DATABASE_URL=database_url)
    assert (code, "analyze documents: never analysed" in output) == (0, True)
    assert ("analyze", "public.documents") in await kinds(database)
    assert (await db(tmp_path, "maintain", "--yes", DATABASE_URL=database_url))[0] == 0
    assert ("analyze", "public.documents") not in await kinds(database)
    rows = await database.fetch("SELECT command, arguments FROM ops.admin_actions ORDER BY id")
    assert [tuple(row) for row in rows] == [("db maintain", {"yes": False}), ("db maintain", {"yes": True})]
