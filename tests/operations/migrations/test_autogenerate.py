"""`make migration`: what it upgrades, what it writes, and what it leaves alone."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import BigInteger, CheckConstraint, Column, Index, Table, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP

from models import Base
from tests.operations.migrations.support import HEAD, KNOWN, with_revision
from utils.database import ConnectTarget, Pool
from utils.exceptions import MigrationError
from utils.operations import migrations
from utils.operations.migrations import MigrationOptions
from utils.operations.migrations.comparison import import_models
from utils.operations.migrations.writing import find_failing, write_revision

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def options(tmp_path: Path) -> MigrationOptions:
    """A copy of the revisions, to write new ones into."""
    options = with_revision(tmp_path, "def upgrade():\n    pass")
    next((options.scripts / "versions").glob("9000_*.py")).unlink()
    return options


@pytest.fixture
def own_table() -> Iterator[Table]:
    """A table that a user's model declares."""
    table = Table(
        "own_notes",
        Base.metadata,
        Column("guild_id", Text, primary_key=True),
        Column("note", Text, nullable=False, server_default="x" * 130),
    )
    yield table
    if table.name in Base.metadata.tables:
        Base.metadata.remove(table)


async def test_make_migration_upgrades_first(
    empty_target: ConnectTarget, options: MigrationOptions, own_table: Table
) -> None:
    path = await write_revision(empty_target, "add notes", options=options)
    assert path is not None
    assert await migrations.current(empty_target) == HEAD
    text = path.read_text()
    assert text.startswith('"""add notes."""\n')
    assert "op.create_table" in text
    assert "own_notes" in text
    assert "drop_" not in text.partition("def downgrade")[0]
    await migrations.upgrade(empty_target, options=options)
    assert await migrations.check_drift(empty_target, scripts=options.scripts) == []


async def lint(path: Path) -> str:
    """Return what ruff has to say about a file, as `make lint` runs it; empty if nothing."""
    output = ""
    for command in (["check"], ["format", "--check"]):
        arguments = [sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml"), str(path)]
        done = await asyncio.to_thread(
            subprocess.run, arguments, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
        )
        output += done.stdout if done.returncode else ""
    return output


async def test_make_migration_writes_what_lint_accepts(
    empty_target: ConnectTarget, options: MigrationOptions, own_table: Table, capfd: pytest.CaptureFixture[str]
) -> None:
    message = 'it\'s a "quoted" \\path and ' + "a rather long message that goes on " * 5
    written = [await write_revision(empty_target, message, options=options)]
    await migrations.upgrade(empty_target, options=options)
    written.append(await write_revision(empty_target, "rows", is_empty=True, options=options))
    own_table.append_column(Column("at", TIMESTAMP(timezone=True), nullable=False, server_default=text("now()")))
    own_table.append_column(Column("tags", ARRAY(BigInteger), comment="y" * 130))
    own_table.append_constraint(UniqueConstraint("note", "guild_id", name="own_notes_unique"))
    own_table.append_constraint(CheckConstraint(" AND ".join(f"note <> '{n}'" for n in range(20)), name="short"))
    Index("own_notes_tags", own_table.c.tags, postgresql_using="gin", postgresql_where=text("note > 'a'"))
    await migrations.upgrade(empty_target, options=options)
    written.append(await write_revision(empty_target, "add columns", options=options))
    await migrations.upgrade(empty_target, options=options)
    Base.metadata.remove(own_table)
    written.append(await write_revision(empty_target, "drop the table", options=options))
    assert [path and await lint(path) for path in written] == ["", "", "", ""]
    assert capfd.readouterr().out == ""


async def test_make_migration_writes_nothing_if_there_is_nothing_to_do(
    empty_target: ConnectTarget, options: MigrationOptions
) -> None:
    before = sorted((options.scripts / "versions").glob("*.py"))
    assert await write_revision(empty_target, "nothing", options=options) is None
    assert sorted((options.scripts / "versions").glob("*.py")) == before
    assert await migrations.current(empty_target) == HEAD


async def test_the_number_of_a_new_revision_follows_ours_and_is_none_of_a_later_version(
    empty_target: ConnectTarget, options: MigrationOptions
) -> None:
    following = f"{int(HEAD) + 1:04}"
    path = await write_revision(empty_target, "of a fork", is_empty=True, options=options)
    assert path is not None
    assert re.fullmatch(rf"{following}_[0-9a-f]{{4}}_of_a_fork\.py", path.name)
    (options.scripts / "versions" / f"{following}_later.py").write_text(
        f'"""Later."""\n\nrevision = "{following}"\ndown_revision = "{HEAD}"\n\n\ndef upgrade():\n    pass\n'
    )
    revisions = migrations.Revisions(options.scripts)
    assert set(revisions.heads) == {following, path.name[:9]}
    assert revisions.next_id().startswith(f"{int(HEAD) + 2:04}_")


async def test_make_migration_names_what_fails_on_a_table_with_rows(
    empty_target: ConnectTarget, options: MigrationOptions, own_table: Table
) -> None:
    path = await write_revision(empty_target, "add notes", options=options)
    assert path is not None
    assert find_failing(path, options) == [], "its table is new"
    await migrations.upgrade(empty_target, options=options)
    own_table.append_column(Column("extra", Text, nullable=False))
    path = await write_revision(empty_target, "add a column", options=options)
    assert path is not None
    assert find_failing(path, options) == ["ALTER TABLE own_notes ADD COLUMN extra TEXT NOT NULL"]


async def test_make_migration_respects_auto_migrate(empty_target: ConnectTarget, options: MigrationOptions) -> None:
    with pytest.raises(MigrationError, match=f"AUTO_MIGRATE is off, and the database lacks revision {KNOWN[0]}"):
        await write_revision(empty_target, "x", auto_migrate=False, options=options)
    assert await migrations.current(empty_target) is None


async def test_make_migration_refuses_several_heads(empty_target: ConnectTarget, options: MigrationOptions) -> None:
    for name in ("aaaa", "bbbb"):
        (options.scripts / "versions" / f"{name}_x.py").write_text(
            f'"""X."""\nrevision = "{name}"\ndown_revision = "{HEAD}"\n\n\ndef upgrade():\n    pass\n'
        )
    with pytest.raises(MigrationError, match='alembic merge -m "merge" aaaa bbbb'):
        await write_revision(empty_target, "x", options=options)


async def test_autogenerate_drops_nothing_that_no_revision_made(database: Pool, options: MigrationOptions) -> None:
    await database.execute(
        "CREATE TYPE mood AS ENUM ('good', 'bad');"
        "CREATE TABLE legacy_bans (id int PRIMARY KEY, user_id bigint);"
        "CREATE TABLE ops.theirs (id int);"
        "ALTER TABLE members ADD COLUMN mood mood, ADD CONSTRAINT their_check UNIQUE (guild_id, user_id, flags);"
        "CREATE INDEX their_index ON members (joined_at); CREATE INDEX ON legacy_bans (user_id)"
    )
    assert await write_revision(database.direct, "nothing", options=options) is None
    # Doctor and status still name the column: COPY and restore do not know it.
    assert await migrations.check_drift(database) == ["unexpected column: members.mood"]


async def test_autogenerate_drops_what_a_revision_made(database: Pool, tmp_path: Path) -> None:
    body = (
        "def upgrade():\n    op.execute('CREATE TABLE ours_once (id int)')\n"
        "    op.execute('ALTER TABLE members ADD COLUMN ours_too int')\n"
        "    op.create_index('ours_index', 'members', ['joined_at'])"
    )
    options = with_revision(tmp_path, body)
    path = await write_revision(database.direct, "drop", options=options)
    assert path is not None
    text = path.read_text().partition("def downgrade")[0]
    assert 'op.drop_table("ours_once")' in text
    assert 'op.drop_column("members", "ours_too")' in text
    assert "ours_index" in text


@pytest.mark.parametrize("is_package", [True, False])
async def test_models_in_sub_packages_are_found(database: Pool, tmp_path: Path, is_package: bool) -> None:
    """Their tables exist already, and are neither created by a second name nor dropped."""
    name = f"models_{'package' if is_package else 'folder'}"
    tables = tmp_path / name / "tables"
    tables.mkdir(parents=True)
    if is_package:
        (tmp_path / name / "__init__.py").touch()
        (tables / "__init__.py").touch()
    (tables / "x.py").write_text(
        "from sqlalchemy import Column, Integer, Table\nfrom models import Base\n"
        f"TABLE = Table('{name}_x', Base.metadata, Column('id', Integer, primary_key=True))\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        import_models(folder=tmp_path / name)
        assert f"{name}_x" in Base.metadata.tables
        assert f"add_table: {name}_x" in await migrations.check_drift(database)
        await database.execute(f"CREATE TABLE {name}_x (id serial PRIMARY KEY)")
        assert await migrations.check_drift(database) == []
    finally:
        sys.path.remove(str(tmp_path))
        if f"{name}_x" in Base.metadata.tables:
            Base.metadata.remove(Base.metadata.tables[f"{name}_x"])


def test_make_migration_needs_a_message() -> None:
    command = [sys.executable, "-m", "utils.operations.migrations", "revision"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert 'make migration m="what it does"' in done.stderr
