"""`python bot.py db …`, for operators."""

from __future__ import annotations

import json
import os
from pathlib import Path

import asyncpg
import pytest

from tests.bot.running import run_cli
from utils.database import ConnectTarget
from utils.database.embedded import EmbeddedServer
from utils.operations import migrations

pytestmark = pytest.mark.slow


async def db(directory: Path, *arguments: str, **settings: str) -> tuple[int, str]:
    """Run `python bot.py db …` and return its exit code and all that it prints."""
    return await run_cli(directory, "db", *arguments, **settings)


async def test_status_and_upgrade(tmp_path: Path, empty_target: ConnectTarget) -> None:
    url, pending = empty_target.libpq_url(), await migrations.pending(empty_target)
    code, output = await db(tmp_path, "status", "--json", DATABASE_URL=url)
    status = json.loads(output)
    assert (code, status["ok"], status["revision"], status["drift"]) == (1, False, None, None)
    assert [revision["revision"] for revision in status["pending"]] == pending
    assert await db(tmp_path, "upgrade", DATABASE_URL=url) == (0, f"applied: {', '.join(pending)}\n")
    assert await db(tmp_path, "upgrade", DATABASE_URL=url) == (0, "the schema is up to date\n")
    code, output = await db(tmp_path, "status", "--json", DATABASE_URL=url)
    status = json.loads(output)
    assert (code, status["ok"], status["revision"]) == (0, True, pending[-1])
    assert (status["pending"], status["drift"]) == ([], [])
    connection = await asyncpg.connect(url)
    await connection.execute("ALTER TABLE roles ADD COLUMN surprise text")
    await connection.close()
    code, output = await db(tmp_path, "status", DATABASE_URL=url)
    assert (code, "drift from the models:\n- unexpected column: roles.surprise" in output) == (1, True), output


async def test_downgrade_to_where_it_is_does_not_ask(tmp_path: Path, database_url: str) -> None:
    head = migrations.known_revisions()[-1].id
    code, output = await db(tmp_path, "downgrade", head, DATABASE_URL=database_url)
    assert (code, output) == (0, f"the schema is at {head} already: nothing to do\n")
    assert not (tmp_path / ".data" / "backups").exists()


async def test_psql_uses_the_settings(tmp_path: Path, database_url: str) -> None:
    code, output = await db(tmp_path, "psql", "-Atc", "SELECT count(*) FROM guilds", DATABASE_URL=database_url)
    assert (code, output) == (0, "0\n")
    assert (await db(tmp_path, "psql", "-Atc", "SELECT wrong", DATABASE_URL=database_url))[0] == 1


async def test_psql_starts_and_stops_the_embedded_server(tmp_path: Path) -> None:
    code, output = await db(tmp_path, "upgrade", "--data-dir", "data")
    assert code == 0
    assert output.splitlines()[-1].startswith("applied: 0001, ")
    foreign = "postgresql://someone@/elsewhere?host=/nowhere"  # an explicit directory wins over it
    arguments = ("psql", "--data-dir", "data", "-Atc", "SELECT count(*) FROM members")
    assert await db(tmp_path, *arguments, DATABASE_URL=foreign) == (0, "0\n")
    assert not (EmbeddedServer(tmp_path / "data").cluster / "postmaster.pid").exists()


async def test_psql_creates_no_database(tmp_path: Path) -> None:
    code, output = await db(tmp_path, "psql", "--data-dir", "data")
    assert code == 1
    assert output.count("\n") == 1
    assert "make demo" in output
    assert os.listdir(tmp_path) == []


async def test_invalid_settings_are_one_line(tmp_path: Path) -> None:
    code, output = await db(tmp_path, "status", DATABASE_URL="mysql://here/db")
    assert (code, output.count("\n")) == (2, 1)
    assert output.startswith("DATABASE_URL: ")
