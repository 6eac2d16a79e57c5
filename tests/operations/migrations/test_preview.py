"""The SQL of a migration: annotated, and the same that the migration runs."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from tests.bot.running import run_cli
from tests.operations.migrations.support import HEAD, KNOWN, with_revision
from utils.database import ConnectTarget, Pool
from utils.database.embedded import EmbeddedServer
from utils.exceptions import MigrationError
from utils.operations import migrations
from utils.operations.migrations import schema_catalog
from utils.operations.migrations.preview import preview

ON_OLD = "ALTER TABLE members "


async def run_psql(server: EmbeddedServer, target: ConnectTarget, path: Path) -> None:
    command = [str(server.psql), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", str(path), target.libpq_url()]
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, check=False, timeout=60, cwd="/"
    )
    assert done.returncode == 0, done.stderr


async def save_preview(directory: Path, target: ConnectTarget, revision: str | None, *, down: bool = False) -> Path:
    outcome = await preview(target, revision, down=down)
    assert outcome.file is not None
    path = directory / outcome.file[0]
    path.write_text(outcome.file[1])
    return path


async def test_psql_runs_the_file_like_the_migration(
    server: EmbeddedServer, empty_target: ConnectTarget, target: ConnectTarget, tmp_path: Path
) -> None:
    expected = await schema_catalog.read(target)
    await run_psql(server, empty_target, await save_preview(tmp_path, empty_target, KNOWN[1]))
    assert await migrations.current(empty_target) == KNOWN[1]
    await run_psql(server, empty_target, await save_preview(tmp_path, empty_target, None))
    assert await migrations.current(empty_target) == HEAD
    assert await schema_catalog.read(empty_target) == expected
    await run_psql(server, empty_target, await save_preview(tmp_path, empty_target, "base", down=True))
    assert await schema_catalog.read(empty_target) == {}
    assert str(await migrations.find_pause(empty_target)) == "the schema was downgraded to base by hand"
    await run_psql(server, empty_target, await save_preview(tmp_path, empty_target, None))
    assert await schema_catalog.read(empty_target) == expected
    assert await migrations.find_pause(empty_target) is None
    assert list(await migrations.applied(empty_target)) == KNOWN


async def test_lists_statements_that_fail_on_a_filled_table(database: Pool, tmp_path: Path) -> None:
    options = with_revision(tmp_path, f'def upgrade():\n    op.execute("{ON_OLD}ADD COLUMN extra text NOT NULL")')
    outcome = await preview(database, options=options)
    assert outcome.text.splitlines()[1:] == [
        "These statements fail unless the table is empty:",
        f"- {ON_OLD}ADD COLUMN extra text NOT NULL",
    ]
    assert outcome.data["failing"] == [f"{ON_OLD}ADD COLUMN extra text NOT NULL"]
    assert outcome.file is not None
    assert "-- fails: if the table has rows" in outcome.file[1]


async def test_lists_destructive_statements(database: Pool) -> None:
    outcome = await preview(database, KNOWN[0], down=True)
    assert "- DROP TABLE documents" in outcome.text
    assert "ALTER TABLE changes DROP COLUMN inferred" in outcome.data["destructive"]
    assert outcome.file is not None
    assert outcome.file[0] == f"downgrade-{HEAD}-{KNOWN[0]}.sql"
    assert outcome.file[1].count("-- drops") >= len(outcome.data["destructive"])
    assert len((await preview(database, "base", down=True)).text) <= 1_900
    assert await migrations.current(database) == HEAD


async def test_downgrade_defaults_to_one_revision(database: Pool) -> None:
    assert (await preview(database, down=True)).data["to"] == KNOWN[-2]
    assert (await preview(database)).file is None
    with pytest.raises(MigrationError, match="no revision 'nonsense'"):
        await preview(database, "nonsense")
    await database.execute("UPDATE guildbook_version SET version_num = '9999'")
    with pytest.raises(MigrationError, match="this version does not know"):
        await preview(database)


async def test_annotates_a_rewrite(database: Pool, tmp_path: Path) -> None:
    body = (
        "def upgrade():\n    op.alter_column('members', 'nick', new_column_name='name')\n"
        "    op.execute('ALTER TABLE members ALTER flags TYPE bigint')"
    )
    outcome = await preview(database, options=with_revision(tmp_path, body))
    assert outcome.file is not None
    assert "-- rewrites: with every index, under ACCESS EXCLUSIVE\nALTER TABLE members" in outcome.file[1]
    assert "rewrites: 1" in outcome.text


async def test_command_line_writes_the_file(tmp_path: Path, empty_target: ConnectTarget) -> None:
    code, output = await run_cli(tmp_path, "db", "preview", DATABASE_URL=empty_target.libpq_url())
    assert code == 0, output
    assert output.endswith(f"wrote upgrade-base-{HEAD}.sql\n")
    assert "CREATE TABLE guilds" in (tmp_path / f"upgrade-base-{HEAD}.sql").read_text()
    code, output = await run_cli(
        tmp_path, "db", "preview", "--out", "/nowhere/x", DATABASE_URL=empty_target.libpq_url()
    )
    assert (code, "choose another file with --out" in output) == (1, True)
