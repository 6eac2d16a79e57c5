"""The two sessions of a backup: on one snapshot, without limits of the server's, and neither outlives the other."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.operations.backup.making import filled, vault_in
from tests.waiting import until
from utils.database import ConnectTarget, Pool
from utils.exceptions import BackupError, DatabaseError
from utils.operations.backup import create
from utils.operations.backup.create import Wanted
from utils.operations.backup.pipeline import Command

#: What a server may be set to end, and a backup of an hour would run into.
LIMITS = ("statement_timeout", "idle_in_transaction_session_timeout", "transaction_timeout")
_SESSIONS = """
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND (application_name = 'pg_dump' OR query LIKE '%count(*) FROM public%')
"""


def nothing(directory: Path) -> bool:
    """Return whether nothing lies among the backups, hidden files included."""
    return [path.name for path in (directory / "backups").iterdir()] == [".lock"]


async def gone(database: Pool) -> None:
    """Wait until no session of a backup is left."""
    async with asyncio.timeout(20):
        while await database.fetchval(_SESSIONS):  # noqa: ASYNC110 - it is another process
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("limit", LIMITS)
async def test_limits_of_the_server_do_not_cut_it_short(
    tmp_path: Path, database: Pool, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    if not await database.fetchval("SELECT count(*) FROM pg_settings WHERE name = $1", limit):
        pytest.skip(f"this server has no {limit}")
    await filled(database)
    await database.execute(
        await database.fetchval(
            "SELECT format('ALTER DATABASE %I SET %I = ''300ms''', current_database(), $1::text)", limit
        )
    )
    counted = create._counted

    async def slowly(connection: Any, tables: Any) -> dict[str, int]:
        if limit == "idle_in_transaction_session_timeout":
            await asyncio.sleep(0.5)  # it is idleness that the server would end
        else:
            await connection.execute("SELECT pg_sleep(0.5)")
        return await counted(connection, tables)

    monkeypatch.setattr(create, "_counted", slowly)
    assert (await vault_in(tmp_path).make(database, Wanted())).rows["public.members"] == 3_000


async def test_when_pg_dump_fails_nothing_is_counted_any_more(
    tmp_path: Path, database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = asyncio.Event()

    async def for_ever(connection: Any, tables: Any) -> dict[str, int]:
        try:
            await connection.execute("SELECT pg_sleep(3600) /* count(*) FROM public */", timeout=3_600)
        finally:
            ended.set()
        raise AssertionError("an hour is over")

    monkeypatch.setattr(create, "_counted", for_ever)
    monkeypatch.setattr(create, "_dump", lambda *_, **__: Command(["/bin/sh", "-c", "echo no room >&2; exit 3"], {}))
    with pytest.raises(BackupError, match="sh failed: no room"):
        async with asyncio.timeout(20):
            await vault_in(tmp_path).create(database)
    assert ended.is_set()
    await gone(database)
    assert nothing(tmp_path)


async def test_when_counting_fails_pg_dump_is_ended(
    tmp_path: Path, database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(connection: Any, tables: Any) -> dict[str, int]:
        await until(lambda: database.fetchval(_SESSIONS))
        raise asyncpg.DataCorruptedError("invalid page in block 7 of relation members")

    monkeypatch.setattr(create, "_counted", fails)
    async with database.transaction() as connection:
        await connection.execute("LOCK TABLE guilds")  # pg_dump waits for it
        with pytest.raises(DatabaseError, match="invalid page in block 7"):
            await vault_in(tmp_path).create(database)
        await gone(database)
    assert nothing(tmp_path)


def test_pg_dump_goes_where_we_go_and_nowhere_else(
    empty_target: ConnectTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("PGPASSFILE", "/p"), ("PGSSLROOTCERT", "/r"), ("PGHOSTADDR", "1.2.3.4"), ("PGSERVICE", "x")):
        monkeypatch.setenv(name, value)
    command = create._dump(Path("/bin"), empty_target, "snap", [], Wanted())
    assert {"PGPASSFILE", "PGSSLROOTCERT", "PGOPTIONS"} <= command.environment.keys()
    assert not {"PGHOSTADDR", "PGSERVICE"} & command.environment.keys()


def test_a_server_of_13_is_not_asked_for_what_14_has(empty_target: ConnectTarget) -> None:
    command = create._dump(Path("/bin"), empty_target, "snap", [], Wanted(), checks_client=False)
    assert "PGOPTIONS" not in command.environment
