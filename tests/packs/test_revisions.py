"""Revisions of packs on a real database: version tables of their own, what they need, and what they leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.operations.migrations.support import HEAD, KNOWN, with_revision, without_newest
from tests.packs.support import add_revision, require, using, versions, write_pack
from utils import packs
from utils.database import Pool, ownership, recorded_packs
from utils.exceptions import MigrationError, UnknownRevision
from utils.operations import migrations
from utils.operations.backup.restore.assessment import assess
from utils.operations.doctor import CHECKS, DoctorContext, run_checks
from utils.operations.migrations import DEFAULTS, admin
from utils.operations.migrations.comparison import import_models
from utils.operations.migrations.pack_revisions import drop_pack
from utils.operations.migrations.writing import write_merge, write_revision


async def tables_of(pool: Pool) -> set[str]:
    """Return the tables that no Guildbook without packs has."""
    rows = await pool.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    plain = {name for schema, name in ownership.owned_by().tables if schema is None}
    return {row[0] for row in rows if row[0] not in plain and "_y20" not in row[0] and "_default" not in row[0]}


async def recorded(pool: Pool, name: str) -> list[str]:
    return [row[0] for row in await pool.fetch(f"SELECT version_num FROM {name}_version ORDER BY 1")]  # noqa: S608


async def test_each_pack_has_a_version_table_of_its_own(database: Pool, tmp_path: Path) -> None:
    roots = write_pack(tmp_path, "economy"), write_pack(tmp_path, "levels")
    with using(*roots):
        assert await migrations.upgrade_packs(database) == (["economy_0001", "levels_0001"], [])
        assert await migrations.upgrade_packs(database) == ([], [])
        assert await tables_of(database) == {
            "economy_entries", "economy_version", "levels_entries", "levels_version",
        }  # fmt: skip
        assert await recorded(database, "economy") == ["economy_0001"]
        assert await recorded(database, "guildbook") == [HEAD]
        status = await admin.status(database)
        assert status.ok, status.text
        assert "pack levels: revision levels_0001" in status.text
        history = await admin.history(database)
        assert [(row["revision"], row["pack"], row["by"]) for row in history.data["revisions"][-2:]] == [
            ("economy_0001", "economy", "bot"),
            ("levels_0001", "levels", "bot"),
        ]
        applied = await database.fetch("SELECT revision, action FROM ops.migrations ORDER BY id DESC LIMIT 2")
        assert {tuple(row) for row in applied} == {("economy_0001", "upgrade"), ("levels_0001", "upgrade")}


async def test_upgrade_of_guildbook_upgrades_packs_after_it(database: Pool, tmp_path: Path) -> None:
    newer = with_revision(tmp_path, "def upgrade(): pass\n\n\ndef downgrade(): pass")
    root = write_pack(tmp_path, "economy", requires="9000")
    with using(root):
        plan = await admin.plan_upgrade(database, options=newer)
        assert plan is not None
        assert "pack economy: revision none; pending (python bot.py db upgrade): economy_0001" in plan.text
        outcome = await admin.upgrade(database, options=newer)
        assert (outcome.ok, outcome.data["applied"]) == (True, ["9000", "economy_0001"])


async def test_autogenerate_sees_the_tables_of_its_pack_only(database: Pool, tmp_path: Path) -> None:
    economy, levels = write_pack(tmp_path, "economy"), write_pack(tmp_path, "levels")
    await database.execute("CREATE TABLE theirs (id int PRIMARY KEY)")
    model = economy / "economy/models.py"
    model.write_text(model.read_text() + "    reason: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)\n")
    model.write_text(model.read_text().replace("import BigInteger", "import BigInteger, Text"))
    with using(economy, levels) as (pack, other):
        path = await write_revision(database.direct, "add a reason", options=DEFAULTS.of_pack(pack))
        assert path is not None
        assert (path.parent, path.name[:13]) == (versions(economy), "economy_0002_")
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip().startswith("op.")]
        assert lines == [
            'op.add_column("economy_entries", sa.Column("reason", sa.Text(), nullable=True))',
            'op.drop_column("economy_entries", "reason")',
        ]
        assert await migrations.upgrade_packs(database) == ([path.name[:17], "levels_0001"], [])
        assert await write_revision(database.direct, "nothing", options=DEFAULTS.of_pack(other)) is None
        assert await write_revision(database.direct, "nothing of ours") is None
        assert await migrations.check_drift(database) == []
    assert await database.fetchval("SELECT to_regclass('theirs') IS NOT NULL")


async def test_a_pack_for_another_guildbook_says_what_is_missing_and_stops_no_other(
    database: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newer = write_pack(tmp_path, "economy", requires="0099")
    levels = write_pack(tmp_path, "levels")
    with using(newer, levels) as (pack, _):
        await migrations.prepare_packs(database, auto_migrate=True)
        line = (
            f"pack economy needs revision 0099 of Guildbook, which this version does not have (its newest is {HEAD}):"
            " use the Guildbook that has it, or a version of the pack for this one"
        )
        assert packs.problem(pack) == line
        assert f"pack not loaded: {line}" in caplog.messages
        assert await tables_of(database) == {"levels_entries", "levels_version"}
        status = await admin.status(database)
        assert not status.ok
        assert f"pack economy: {line}" in status.text
        require(newer, HEAD)
    with using(newer, levels) as (pack, _):
        await migrations.prepare_packs(database, auto_migrate=True)
        assert packs.problem(pack) is None


async def test_a_downgrade_below_what_a_pack_needs_is_refused(database: Pool, tmp_path: Path) -> None:
    root = write_pack(tmp_path, "economy", requires=KNOWN[-2])
    with using(root):
        await migrations.upgrade_packs(database)
    # Also when nothing but the database knows of the pack any more.
    line = f"pack economy needs revision {KNOWN[-2]} of Guildbook, which this would revert"
    with pytest.raises(MigrationError, match=line):
        await admin.downgrade(database, KNOWN[-3], backup=None)
    with pytest.raises(MigrationError, match=line):
        await admin.plan_downgrade(database, "base")
    assert (await admin.downgrade(database, KNOWN[-2], backup=None)).ok
    with using(root):
        older = without_newest(tmp_path / "older")
        assert await migrations.upgrade_packs(database, options=older) == ([], [])


async def test_a_removed_pack_keeps_its_tables_until_they_are_dropped(database: Pool, tmp_path: Path) -> None:
    root = write_pack(tmp_path, "economy")
    view = 'op.execute("CREATE VIEW economy_rich AS SELECT * FROM economy_entries WHERE count > 9")'
    add_revision(root, "economy_0002", "economy_0001", view)
    with using(root):
        await migrations.upgrade_packs(database)
        await database.execute("INSERT INTO economy_entries VALUES (1, 2, 3)")
        with pytest.raises(MigrationError, match="pack economy is in COGS"):
            await drop_pack(database, "economy", backup=None)
    status = await admin.status(database)
    assert status.ok, "its tables are no problem"
    assert (
        "pack economy: not in COGS; 2 tables kept (economy_entries, economy_rich); python bot.py pack drop economy"
        " removes them" in status.text
    )
    made: list[str] = []

    async def backup() -> str:
        made.append("made")
        assert await database.fetchval("SELECT count FROM economy_entries") == 3
        return "b1"

    with pytest.raises(UnknownRevision, match="expected one of economy"):
        await drop_pack(database, "economics", backup=backup)
    await database.execute("CREATE VIEW theirs AS SELECT count FROM economy_entries")
    with pytest.raises(MigrationError, match="view theirs"):
        await drop_pack(database, "economy", backup=backup)
    await database.execute("DROP VIEW theirs")
    outcome = await drop_pack(database, "economy", backup=backup)
    assert outcome.text == "dropped: economy_entries, economy_rich, economy_version\nbackup made before: b1"
    assert made == ["made"]
    assert await tables_of(database) == set()
    assert await recorded_packs.fetch_packs(database) == []


async def test_an_older_version_of_a_pack_says_that_the_database_is_newer(database: Pool, tmp_path: Path) -> None:
    root = write_pack(tmp_path, "economy")
    path = add_revision(
        root, "economy_0002", "economy_0001", 'op.add_column("economy_entries", sa.Column("x", sa.Text()))'
    )
    with using(root):
        await migrations.upgrade_packs(database)
    path.unlink()
    with using(root) as (pack,):
        await migrations.prepare_packs(database, auto_migrate=True)
        assert packs.problem(pack) == (
            "pack economy: the database is at revision economy_0002, which this version of the pack does not know: use"
            " the newer version that migrated it, or bring the revision's file back"
        )


@pytest.mark.parametrize("table", ["economy_entries", "economy_version"])
async def test_never_takes_a_table_that_exists(database: Pool, tmp_path: Path, table: str) -> None:
    await database.execute(f"CREATE TABLE {table} (theirs int)")
    root = write_pack(tmp_path, "economy")
    with using(root) as (pack,):
        _, (problem,) = await migrations.upgrade_packs(database)
        assert problem.startswith("pack economy would create tables that exist already, and are not its own: public.")
        assert await tables_of(database) == {table}
        assert not (await admin.status(database)).ok
        assert packs.problem(pack) is None


async def test_says_which_pack_has_the_table_already(database: Pool, tmp_path: Path) -> None:
    first, second = write_pack(tmp_path, "economy"), write_pack(tmp_path, "levels")
    for path in (second / "levels").rglob("*.py"):
        path.write_text(path.read_text().replace("levels_entries", "economy_entries"))
    with using(first, second):
        assert await migrations.upgrade_packs(database) == (
            ["economy_0001"],
            [
                "pack levels would create tables that exist already, and are not its own: public.economy_entries (of"
                " pack economy). Nothing was changed: rename the pack's tables"
            ],
        )


@pytest.mark.parametrize(
    ("id", "more", "line"),
    [
        ("0002", "", "the id must begin with economy_ and have at most 32 characters"),
        ("economy_" + "x" * 25, "", "the id must begin with economy_ and have at most 32 characters"),
        ("economy_0002", 'depends_on = "0001"', "revision economy_0002 has depends_on|do not fit together"),
    ],
)
async def test_refuses_revisions_that_reach_into_other_version_tables(
    database: Pool, tmp_path: Path, id: str, more: str, line: str
) -> None:
    root = write_pack(tmp_path, "economy")
    add_revision(root, id, "economy_0001", "pass", more=more)
    with using(root):
        _, (problem,) = await migrations.upgrade_packs(database)
        assert any(part in problem for part in line.split("|")), problem
        assert await tables_of(database) == set()


async def test_two_heads_are_merged_and_a_squashed_merge_is_recognised(database: Pool, tmp_path: Path) -> None:
    root = write_pack(tmp_path, "economy")
    column = 'op.add_column("economy_entries", sa.Column("{0}", sa.Text()))'.format
    undo = 'op.drop_column("economy_entries", "{0}")'.format
    anna = add_revision(root, "economy_0002_aaaa", "economy_0001", column("anna"), undo("anna"))
    ben = add_revision(root, "economy_0002_bbbb", "economy_0001", column("ben"), undo("ben"))
    with using(root) as (pack,):
        _, (problem,) = await migrations.upgrade_packs(database)
        assert problem == (
            "pack economy has 2 heads, economy_0002_aaaa and economy_0002_bbbb: its author merges them with python"
            " bot.py pack merge economy; then run python bot.py db upgrade"
        )
        merge = write_merge("merge", pack.scripts)
        applied, problems = await migrations.upgrade_packs(database)
        assert (sorted(applied[1:3]), problems) == (["economy_0002_aaaa", "economy_0002_bbbb"], [])
        assert await recorded(database, "economy") == [merge.name[:17]]
        with pytest.raises(MigrationError, match="there is one head"):
            write_merge("merge", pack.scripts)
    # The author squashes the branch: three files become one, which says what it replaces.
    for path in (anna, ben, merge):
        path.unlink()
    both = f"{column('anna')}\n    {column('ben')}"
    add_revision(root, "economy_0003_cccc", "economy_0001", both, more=f'replaces = ("{merge.name[:17]}",)\n')
    with using(root):
        assert await migrations.upgrade_packs(database) == ([], [])
        assert await recorded(database, "economy") == ["economy_0003_cccc"]
        assert (await admin.status(database)).ok is False, "the models do not have the columns"
        await database.execute("DROP TABLE economy_entries, economy_version")
        assert await migrations.upgrade_packs(database) == (["economy_0001", "economy_0003_cccc"], [])


async def test_a_failing_revision_keeps_that_pack_from_being_loaded(
    database: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken, fine = write_pack(tmp_path, "economy"), write_pack(tmp_path, "levels")
    add_revision(broken, "economy_0002", "economy_0001", 'op.execute("SELECT 1/0")')
    with using(broken, fine) as (pack, other):
        await migrations.prepare_packs(database, auto_migrate=True)
        assert "division by zero" in (packs.problem(pack) or "")
        assert packs.problem(other) is None
        assert await recorded(database, "economy") == ["economy_0001"]
        assert await recorded(database, "levels") == ["levels_0001"]
        path = versions(broken) / "economy_0002.py"
        path.write_text("def (")
        await migrations.prepare_packs(database, auto_migrate=True)
        assert "economy_0002.py does not parse" in (packs.problem(pack) or "")


async def test_a_database_without_the_tables_of_a_pack_is_not_damaged(database: Pool, tmp_path: Path) -> None:
    with using(write_pack(tmp_path, "economy")) as (pack,):
        import_models(scripts=pack.scripts)
        await database.execute("INSERT INTO guilds (id, name) VALUES (1, 'one')")
        assert (await assess(database)).is_fine


async def test_doctor_reports_packs(
    database: Pool, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def find() -> list[tuple[str, str, str]]:
        findings = await run_checks(DoctorContext(env_file=None), [check for check in CHECKS if check.name == "packs"])
        return [(finding.state, finding.name, finding.seen) for finding in findings]

    root = write_pack(tmp_path, "economy")
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("COGS", str(root))
    with using(root):
        assert await find() == [("warn", "pack economy", "pending: economy_0001")]
        await migrations.upgrade_packs(database)
        assert await find() == [("ok", "pack economy", "revision economy_0001, the newest")]
        monkeypatch.setenv("COGS", "")
        assert await find() == [("warn", "pack economy", "not in COGS; it left 1 table: economy_entries")]
        await database.execute("DROP TABLE economy_version")
        assert await find() == [("ok", "packs", "COGS is empty")]


async def test_waits_for_an_operator_with_auto_migrate_off(database: Pool, tmp_path: Path) -> None:
    with using(write_pack(tmp_path, "economy")) as (pack,):
        await migrations.prepare_packs(database, auto_migrate=False)
        assert packs.problem(pack) == (
            "pack economy lacks revision economy_0001, and AUTO_MIGRATE is off or paused; run python bot.py db upgrade"
        )
        assert (await admin.upgrade(database)).data["applied"] == ["economy_0001"]
        await migrations.prepare_packs(database, auto_migrate=False)
        assert packs.problem(pack) is None


async def test_a_downgrade_of_a_pack_is_not_undone_by_the_next_start(database: Pool, tmp_path: Path) -> None:
    root = write_pack(tmp_path, "economy")
    column = 'op.add_column("economy_entries", sa.Column("x", sa.Text()))'
    add_revision(root, "economy_0002", "economy_0001", column, 'op.drop_column("economy_entries", "x")')
    with using(root) as (pack,):
        own = DEFAULTS.of_pack(pack)
        await migrations.upgrade_packs(database)
        outcome = await admin.downgrade(database, "economy_0001", backup=None, options=own)
        assert outcome.data["taken_back"] == ["economy_0002"]
        await migrations.prepare_packs(database, auto_migrate=True)
        assert await recorded(database, "economy") == ["economy_0001"]
        assert "economy_0002" in (packs.problem(pack) or "")
        assert "AUTO_MIGRATE is resumed" in (await admin.upgrade(database)).text
        assert await recorded(database, "economy") == ["economy_0002"]


async def test_models_that_cannot_be_imported_stop_that_pack_alone(database: Pool, tmp_path: Path) -> None:
    fine, broken = write_pack(tmp_path, "economy"), write_pack(tmp_path, "levels")
    with (broken / "levels/models.py").open("a") as models:
        models.write("\nimport no_such_module\n")
    with using(fine, broken):
        await migrations.upgrade_packs(database)
        status = await admin.status(database)
        first, second = status.data["packs"]
        assert (status.data["drift"], first["problem"], status.ok) == ([], None, False)
        assert "No module named 'no_such_module'" in second["problem"]
