"""A backup comes back as it was made, or everything stays as it is."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
from pathlib import Path

import pytest

from tests.operations.backup.restoring import (
    Shelf,
    ask,
    asking,
    cleaned,
    databases,
    dumped,
    pooled,
    put_down,
    sums,
    tell,
    typed,
)
from utils.cli import restore as cli
from utils.database import ConnectTarget, Pool
from utils.database.embedded import EmbeddedServer
from utils.exceptions import BackupError, DatabaseUnavailable, ForbiddenHere, ValidationError
from utils.operations import migrations
from utils.operations.action import Progress, Step
from utils.operations.backup import loading, scratch
from utils.operations.backup.restore import bring_back, restore
from utils.operations.backup.source import Archive
from utils.operations.development import seed
from utils.settings import Settings

pytestmark = pytest.mark.slow


async def none() -> tuple[None, str]:
    return None, "There was nothing to back up."


@pytest.fixture
async def archive(tmp_path: Path, server: EmbeddedServer, database: Pool) -> Archive:
    """A backup of two guilds; since then people have joined, and left no trace of them in it."""
    await seed.seed(database, guilds=2, members=120, seed=3)
    made = await dumped(server, database.target, tmp_path / "it's a dump")
    await seed.seed(database, guilds=1, members=30, seed=4, more=True)
    await tell(database.target, "INSERT INTO ops.suppressions (user_id) VALUES (9)")
    return made


async def test_a_restore_brings_every_row_back_and_keeps_ops_and_the_old_database(
    server: EmbeddedServer, database: Pool, archive: Archive
) -> None:
    async with cleaned(database.target):
        wanted = await sums(database.target)
        first = await bring_back(database, archive, safety=none)
        assert first.ok, first.text
        assert await database.fetchval("SELECT count(*) FROM guilds") == 2
        assert await database.fetchval("SELECT user_id FROM ops.suppressions") == 9
        assert await database.fetchval("SELECT count(*) FROM pg_stats WHERE tablename = 'members'") > 0
        kept = await databases(database.target, scratch.BEFORE)
        assert await sums(database.target.with_database(kept[0])) == wanted
        assert kept[0] in first.text
        assert await databases(database.target, scratch.RESTORE) == []
        second = await bring_back(database, archive, safety=none)
        assert await databases(database.target, scratch.BEFORE) == [second.data["before"]]
        await bring_back(database, archive, safety=none, drop_old=True)
        assert await databases(database.target, scratch.BEFORE) == []


async def test_what_is_restored_has_the_rows_of_the_backup_checksum_for_checksum(
    tmp_path: Path, server: EmbeddedServer, database: Pool
) -> None:
    await seed.seed(database, guilds=2, members=50)
    wanted = await sums(database.target)
    made = await dumped(server, database.target, tmp_path / "dump")
    await database.execute("DELETE FROM members")
    async with cleaned(database.target):
        await bring_back(database, made, safety=none)
        assert await sums(database.target) == wanted
        assert await migrations.check_drift(database) == []


async def test_every_step_is_told(database: Pool, archive: Archive) -> None:
    steps: list[Step] = []
    async with cleaned(database.target):
        await bring_back(database, archive, safety=none, progress=steps.append)
    told = list(dict.fromkeys(step.text for step in steps))
    assert told == ["safety backup", "restoring", "counting rows", "swapping"]
    assert max(step.done for step in steps if step.text == "restoring") > 5
    assert next(step for step in reversed(steps) if step.text == "counting rows").done == len(archive.counts)


async def test_an_older_backup_is_migrated_before_it_goes_live(
    tmp_path: Path, server: EmbeddedServer, empty_target: ConnectTarget
) -> None:
    revisions = await migrations.pending(empty_target)
    await migrations.upgrade(empty_target, revisions[0])
    await tell(empty_target, "INSERT INTO guilds (id, name) VALUES (1, 'old')")
    made = await dumped(server, empty_target, tmp_path / "dump")
    await migrations.upgrade(empty_target)
    async with cleaned(empty_target), pooled(empty_target) as database:
        done = await bring_back(database, made, safety=none)
        assert done.data["migrated"] == revisions[1:]
        assert await database.fetchval("SELECT name FROM guilds") == "old"
        assert await migrations.pending(database) == []
        assert await migrations.check_drift(database) == []


@pytest.mark.parametrize("change", ["revision", "counts", "no table", "truncated", "no revision"])
async def test_a_backup_that_is_not_what_it_says_is_refused_and_nothing_changes(
    database: Pool, archive: Archive, change: str
) -> None:
    wanted = await sums(database.target)
    said = "did not come back"
    if change == "revision":
        archive, said = dataclasses.replace(archive, revision="9999"), "newer Guildbook"
    elif change == "no revision":
        archive, said = dataclasses.replace(archive, revision=None), "no tables"
    elif change == "counts":
        counts = {**archive.counts, ("public", "members"): archive.counts["public", "members"] + 1}
        archive = dataclasses.replace(archive, counts=counts)
    elif change == "no table":
        archive = dataclasses.replace(archive, counts={**archive.counts, ("public", "nothing"): 0})
    else:
        archive.file.write_bytes(archive.file.read_bytes()[: archive.file.stat().st_size // 2])
        said = "pg_restore could not load"
    with pytest.raises(BackupError, match=said):
        await bring_back(database, archive, safety=none)
    assert await sums(database.target) == wanted
    for purpose in (scratch.RESTORE, scratch.BEFORE):
        assert await databases(database.target, purpose) == []


@pytest.mark.parametrize("when", ["restoring", "counting rows", "swapping"])
async def test_a_restore_that_is_called_off_leaves_nothing_behind(database: Pool, archive: Archive, when: str) -> None:
    wanted = await sums(database.target)
    reached = asyncio.Event()

    def told(step: Step) -> None:
        if step.text == when and (step.done or when == "swapping"):
            reached.set()

    task = asyncio.create_task(bring_back(database, archive, safety=none, progress=told))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await sums(database.target) == wanted
    assert await databases(database.target, scratch.RESTORE) == []


async def test_where_no_second_database_is_allowed_the_line_to_type_does_it(
    database: Pool, archive: Archive, empty_target: ConnectTarget
) -> None:
    """The line is run as it stands, by a user who may not make databases and owns everything in this one."""
    role = f"poor_{database.target.database}"
    home = database.target.with_database("postgres")
    members = await database.fetchval("SELECT count(*) FROM members")
    await tell(home, f"CREATE ROLE {role} LOGIN", f"ALTER DATABASE {database.target.database} OWNER TO {role}")
    try:
        ours = dataclasses.replace(database.target, user=role)
        await tell(database.target, f"ALTER SCHEMA public OWNER TO {role}", f"ALTER SCHEMA ops OWNER TO {role}")
        async with asking(database.target) as connection:
            owned = await connection.fetch(
                "SELECT oid::regclass::text FROM pg_class AS c WHERE relkind IN ('r', 'p', 'v', 'm', 'S')"
                " AND relnamespace IN ('public'::regnamespace, 'ops'::regnamespace)"
                " AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.objid = c.oid AND d.deptype = 'a'"
                " AND d.classid = 'pg_class'::regclass AND relkind = 'S')"
            )
        await tell(database.target, *(f"ALTER TABLE {row[0]} OWNER TO {role}" for row in owned))
        async with pooled(ours) as poor:
            with pytest.raises(ForbiddenHere, match="CREATEDB") as refused:
                await bring_back(poor, archive, safety=none)
        assert await database.fetchval("SELECT count(*) FROM members") == members
        line = str(refused.value).splitlines()[-1]
        process = await asyncio.create_subprocess_shell(f"set -o pipefail; {line}", executable="/bin/bash")
        assert await process.wait() == 0
        await database.renew()
        assert await database.fetchval("SELECT count(*) FROM members") == archive.counts["public", "members"]
        assert await database.fetchval("SELECT user_id FROM ops.suppressions") == 9
    finally:
        await tell(home, f"ALTER DATABASE {database.target.database} OWNER TO postgres")
        await tell(database.target, f"REASSIGN OWNED BY {role} TO postgres", f"DROP OWNED BY {role}")
        await tell(home, f"DROP ROLE {role}")


async def test_a_pooler_without_a_way_around_it_is_refused(database: Pool, archive: Archive) -> None:
    database.direct = dataclasses.replace(database.target, pooled=True)
    with pytest.raises(BackupError, match="DATABASE_UNPOOLED_URL"):
        await bring_back(database, archive, safety=none)


async def test_what_fails_after_the_swap_is_said_and_undoes_nothing(database: Pool, archive: Archive) -> None:
    async def after() -> None:
        raise BackupError("the guilds cannot be asked for")

    async with cleaned(database.target):
        done = await bring_back(database, archive, safety=none, after=after)
        assert not done.ok
        assert "the guilds cannot be asked for" in done.text
        assert await database.fetchval("SELECT count(*) FROM guilds") == 2
    assert await ask(database.target, "SELECT 1") == 1


async def test_what_is_there_is_backed_up_first_unless_it_is_nothing_or_damaged(
    database: Pool, archive: Archive, empty_target: ConnectTarget
) -> None:
    shelf = Shelf(archive)
    async with cleaned(database.target):
        done = await restore(database, shelf)
        assert shelf.saved == ["before restore"]
        assert "safe" in done.text
        await database.execute("DROP TABLE members CASCADE")
        done = await restore(database, shelf, archive.id, drop_old=True)
        assert shelf.saved == ["before restore"]
        assert "damaged" in done.text
        assert await databases(database.target, scratch.BEFORE) == [done.data["before"]], "there is no backup of it"
    async with cleaned(empty_target), pooled(empty_target) as empty:
        done = await restore(empty, shelf, drop_old=True)
        assert shelf.saved == ["before restore"]
        assert "nothing to back up" in done.text
        assert await databases(empty_target, scratch.BEFORE) == []
        assert await sums(empty_target) == await sums(database.target)


async def test_a_safety_backup_that_fails_stops_the_restore(database: Pool, archive: Archive) -> None:
    class Full(Shelf):
        async def save(self, database: Pool, reason: str, progress: Progress) -> str:
            raise BackupError("the disk is full")

    wanted = await sums(database.target)
    with pytest.raises(BackupError, match="disk is full"):
        await restore(database, Full(archive))
    assert await sums(database.target) == wanted


async def test_the_command_line_restores_says_so_in_the_books_and_asks_when_it_can(
    tmp_path: Path, database: Pool, archive: Archive
) -> None:
    put_down(tmp_path, archive)
    async with cleaned(database.target):
        unasked = await typed(tmp_path, database.target, "restore", "latest")
        assert unasked.code == 2
        assert f"{database.target.database}" in unasked.err
        assert "--yes" in unasked.err
        assert await database.fetchval("SELECT count(*) FROM guilds") == 3
        missing = await typed(tmp_path, database.target, "restore", "nothing", "--yes", "--json")
        assert (missing.code, json.loads(missing.out)["ok"]) == (1, False)
        done = await typed(tmp_path, database.target, "restore", archive.id, "--yes")
        assert (done.code, done.err) == (0, "")
        assert archive.id in done.out
        assert await database.fetchval("SELECT count(*) FROM guilds") == 2
        drilled = await typed(tmp_path, database.target, "drill", "--json")
        assert json.loads(drilled.out)["where"] == "beside the live database"
    books = await database.fetch("SELECT command, left(result, 6) AS result FROM ops.admin_actions ORDER BY id")
    assert [tuple(row) for row in books] == [
        ("backup restore", "Failed"),
        ("backup restore", "Backup"),
        ("backup drill", "Backup"),
    ]


@pytest.mark.parametrize(("answer", "is_right"), [("{}\n", True), ("nope\n", False), ("\n", False)])
def test_on_a_terminal_the_name_of_the_database_is_asked_for(
    database_url: str, monkeypatch: pytest.MonkeyPatch, answer: str, is_right: bool
) -> None:
    settings = Settings(_env_file=None, database_url=database_url)  # type: ignore[call-arg,arg-type]
    name = database_url.partition("?")[0].rpartition("/")[2]
    stdin = io.StringIO(answer.format(name))
    monkeypatch.setattr(stdin, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", stdin)
    with contextlib.nullcontext() if is_right else pytest.raises(ValidationError, match="nothing was done"):
        cli._confirm(settings, None)


async def test_a_table_that_cannot_be_counted_or_analysed_is_one_line_not_a_group(
    database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "COUNT_SECONDS", 0.2)
    async with database.transaction() as connection:
        await connection.execute("LOCK TABLE guilds")
        for work in (loading.count(database.target, [("public", "guilds")]), loading.analyse(database.target)):
            with pytest.raises(DatabaseUnavailable, match="did not answer in time"):
                await work
