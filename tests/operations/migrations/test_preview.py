"""The SQL of a migration: annotated, and the same that the migration runs."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bot.running import run_cli
from tests.operations.migrations.support import HEAD, KNOWN, with_revision
from utils.database import ConnectTarget, Pool
from utils.database.embedded import EmbeddedServer
from utils.exceptions import MigrationError
from utils.operations import migrations
from utils.operations.migrations import schema_catalog, statements
from utils.operations.migrations.preview import preview

ON_OLD = "ALTER TABLE members "


@pytest.mark.parametrize(
    ("sql", "kinds"),
    [
        ("CREATE TABLE a (id bigint PRIMARY KEY)", ["safe"]),
        ("CREATE TABLE a (id bigint REFERENCES members)", ["locks"]),
        ("CREATE TABLE a PARTITION OF changes FOR VALUES FROM (1) TO (2)", ["locks"]),
        (ON_OLD + "ADD COLUMN x int", ["locks"]),
        (ON_OLD + "ADD COLUMN x int DEFAULT 5 NOT NULL", ["locks"]),
        (ON_OLD + "ADD x jsonb DEFAULT '{}'::jsonb NOT NULL", ["locks"]),
        (ON_OLD + "ADD x timestamptz DEFAULT now()", ["locks"]),
        (ON_OLD + "ADD x uuid DEFAULT gen_random_uuid()", ["rewrites"]),
        (ON_OLD + "ADD x timestamptz DEFAULT clock_timestamp()", ["rewrites"]),
        (ON_OLD + "ADD x bigserial", ["rewrites"]),
        (ON_OLD + "ADD x int GENERATED ALWAYS AS (flags + 1) STORED", ["rewrites"]),
        (ON_OLD + "ADD x int CHECK (x > 0)", ["scans"]),
        (ON_OLD + "ALTER COLUMN flags TYPE bigint", ["rewrites"]),
        (ON_OLD + 'ALTER "my flags" SET DATA TYPE bigint', ["rewrites"]),
        (ON_OLD + "ALTER COLUMN flags SET NOT NULL", ["scans"]),
        (ON_OLD + "ALTER COLUMN type DROP NOT NULL", ["locks"]),
        (ON_OLD + "ADD CONSTRAINT c CHECK (flags > 0)", ["scans"]),
        (ON_OLD + "ADD CONSTRAINT c CHECK (flags > 0) NOT VALID", ["locks"]),
        (ON_OLD + "ADD CONSTRAINT c FOREIGN KEY (user_id) REFERENCES users", ["scans"]),
        (ON_OLD + "ADD CONSTRAINT c UNIQUE USING INDEX i", ["locks"]),
        (ON_OLD + "VALIDATE CONSTRAINT c", ["safe"]),
        (ON_OLD + "DROP COLUMN nick", ["drops"]),
        (ON_OLD + "DROP CONSTRAINT c", ["drops"]),
        (ON_OLD + "ADD x int, DROP COLUMN nick, ALTER flags TYPE bigint", ["locks", "drops", "rewrites"]),
        (ON_OLD + "RENAME COLUMN nick TO name", ["locks"]),
        (ON_OLD + "SET (fillfactor = 70)", ["safe"]),
        (ON_OLD + "FROBNICATE", ["unknown"]),
        ("ALTER TABLE IF EXISTS ONLY public.members DROP nick", ["drops"]),
        ("CREATE UNIQUE INDEX i ON members (nick)", ["blocks writes"]),
        ("CREATE INDEX CONCURRENTLY i ON members (nick)", ["safe"]),
        ("DROP INDEX i", ["drops"]),
        ("drop table members", ["drops"]),
        ("DROP TYPE mood", ["drops"]),
        ("TRUNCATE members", ["drops"]),
        ("DELETE FROM members WHERE flags = 1", ["drops"]),
        ("UPDATE members SET flags = 1", ["changes rows"]),
        ("UPDATE alembic_version SET version_num='0004' WHERE true", ["safe"]),
        ("WITH gone AS (DELETE FROM members RETURNING 1) SELECT 1", ["unknown"]),
        ("VACUUM FULL members", ["rewrites"]),
        ("DO $$ BEGIN DROP TABLE members; END $$", ["unknown"]),
        ("SELECT drop_everything()", ["unknown"]),
        ("CALL f('a; b')", ["unknown"]),
    ],
)
def test_classifies_statements(sql: str, kinds: list[str]) -> None:
    found = [statement for statement in statements.parse(sql + ";\n") if statement.sql]
    assert [[effect.kind for effect in statement.effects] for statement in found] == [kinds]


def test_statements_on_a_new_table_are_safe() -> None:
    sql = "CREATE TABLE ops.a (id int); CREATE INDEX i ON ops.a (id); ALTER TABLE ops.a ALTER id TYPE bigint;"
    assert [s.effects[0].kind for s in statements.parse(sql)] == ["safe"] * 3
    assert statements.parse("CREATE TABLE a (id int); CREATE INDEX i ON b (id)")[1].effects[0].kind == "blocks writes"


@given(st.text(alphabet="a';\"$- \n/*x1EeUu&\\()DROPTABLE,é", max_size=60))
def test_parsing_loses_no_sql(sql: str) -> None:
    found = statements.parse(sql)
    assert "".join(statement.before + statement.sql for statement in found) == sql


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
    await database.execute("UPDATE alembic_version SET version_num = '9999'")
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
    assert (code, "choose another with --out" in output) == (1, True)
