"""Two developers, two heads: unmerged branches, their merge, and every state the version table can be in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.operations.migrations.support import HEAD, KNOWN, with_revision
from utils.database import Pool
from utils.exceptions import MigrationError
from utils.operations import migrations
from utils.operations.migrations import MigrationOptions, Revisions, admin
from utils.operations.migrations.preview import preview

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
LINE = f'.venv/bin/alembic merge -m "merge" aaaa bbbb --rev-id {int(HEAD) + 1:04}_8fb0'


def add_revision(options: MigrationOptions, revision: str, parents: str | tuple[str, ...], **more: object) -> None:
    """Add a revision that creates the sequence `made_by_<revision>`; a merge creates nothing."""
    body = "pass"
    undo = "pass"
    if isinstance(parents, str):
        body, undo = (f'op.execute("{verb} SEQUENCE made_by_{revision}")' for verb in ("CREATE", "DROP"))
    (options.scripts / "versions" / f"{revision}_x.py").write_text(
        f'"""Made {revision}."""\nfrom alembic import op\n\nrevision = "{revision}"\ndown_revision = {parents!r}\n'
        f"branch_labels = {more.get('label')!r}\n\n\ndef upgrade():\n    {body}\n\n\ndef downgrade():\n    {undo}\n"
    )


@pytest.fixture
def forked(tmp_path: Path) -> MigrationOptions:
    """The revisions of a fork: `aaaa` and `bbbb` both follow the newest."""
    options = with_revision(tmp_path, "def upgrade():\n    pass")
    next((options.scripts / "versions").glob("9000_*.py")).unlink()
    add_revision(options, "aaaa", HEAD, label="upstream")
    add_revision(options, "bbbb", HEAD)
    return options


async def set_recorded(database: Pool, *revisions: str) -> None:
    await database.execute("DELETE FROM guildbook_version")
    for revision in revisions:
        await database.execute("INSERT INTO guildbook_version VALUES ($1)", revision)


async def test_status_and_history_show_both_heads(database: Pool, forked: MigrationOptions) -> None:
    outcome = await admin.status(database, options=forked)
    assert not outcome.ok
    assert LINE in outcome.text
    assert outcome.data["merge"] == LINE
    assert [row["revision"] for row in outcome.data["pending"]] == ["aaaa", "bbbb"]
    await migrations.upgrade(database, "aaaa", options=forked)
    outcome = await admin.history(database, options=forked)
    applied = {row["revision"]: row["applied"] for row in outcome.data["revisions"]}
    assert applied == {**dict.fromkeys(KNOWN, True), "aaaa": True, "bbbb": False}
    assert LINE in outcome.text


async def test_upgrade_refuses_with_the_merge_line(database: Pool, forked: MigrationOptions) -> None:
    for upgrade in (admin.upgrade, migrations.upgrade):
        with pytest.raises(MigrationError) as caught:
            await upgrade(database, options=forked)
        assert LINE in str(caught.value)
    with pytest.raises(MigrationError) as caught:
        await migrations.prepare_schema(database, auto_migrate=True, options=forked)
    assert LINE in str(caught.value)
    assert await migrations.current_heads(database) == (HEAD,)


async def test_upgrades_to_all_heads_and_to_a_branch(database: Pool, forked: MigrationOptions) -> None:
    assert (await admin.upgrade(database, "upstream@head", options=forked)).data["applied"] == ["aaaa"]
    assert (await admin.upgrade(database, "heads", options=forked)).data["applied"] == ["bbbb"]
    assert await migrations.current_heads(database) == ("aaaa", "bbbb")
    status = await admin.status(database, options=forked)
    assert status.ok, status.text
    assert (await admin.upgrade(database, options=forked)).text == "the schema is up to date"
    await migrations.prepare_schema(database, auto_migrate=True, options=forked)
    assert await migrations.find_pause(database) is None


@pytest.mark.parametrize("recorded", [(HEAD,), ("aaaa",), ("bbbb",), ("aaaa", "bbbb")])
async def test_a_merge_is_applied_from_every_state(
    database: Pool, forked: MigrationOptions, recorded: tuple[str, ...]
) -> None:
    for revision in recorded:
        await migrations.upgrade(database, revision, options=forked)
    add_revision(forked, "cccc", ("aaaa", "bbbb"))
    outcome = await admin.upgrade(database, options=forked)
    assert outcome.data["applied"][-1] == "cccc"
    assert await migrations.current_heads(database) == ("cccc",)
    assert await database.fetchval("SELECT count(*) FROM pg_class WHERE relname LIKE 'made\\_by\\_%'") == 2
    with pytest.raises(MigrationError, match="aaaa or bbbb"):
        await preview(database, down=True, options=forked)
    assert (await admin.downgrade(database, HEAD, backup=None, options=forked)).data["taken_back"][0] == "cccc"
    assert await migrations.current_heads(database) == (HEAD,)


async def test_downgrades_one_branch_or_both(database: Pool, forked: MigrationOptions) -> None:
    await migrations.upgrade(database, "heads", options=forked)
    with pytest.raises(MigrationError, match=f"bbbb@{HEAD}"):
        await preview(database, down=True, options=forked)
    outcome = await admin.downgrade(database, f"bbbb@{HEAD}", backup=None, options=forked)
    assert outcome.data["taken_back"] == ["bbbb"]
    assert await migrations.current_heads(database) == ("aaaa",)
    await migrations.upgrade(database, "heads", options=forked)
    outcome = await admin.downgrade(database, KNOWN[0], backup=None, options=forked)
    assert sorted(outcome.data["taken_back"]) == sorted([*KNOWN[1:], "aaaa", "bbbb"])
    assert await migrations.current_heads(database) == (KNOWN[0],)


async def test_a_failed_branch_leaves_the_other(database: Pool, forked: MigrationOptions) -> None:
    await admin.upgrade(database, "aaaa", options=forked)
    await database.execute("CREATE SEQUENCE made_by_bbbb")
    with pytest.raises(MigrationError, match="already exists"):
        await admin.upgrade(database, "heads", options=forked)
    assert await migrations.current_heads(database) == ("aaaa",)
    assert LINE in (await admin.status(database, options=forked)).text
    await database.execute("DROP SEQUENCE made_by_bbbb")
    await admin.upgrade(database, "heads", options=forked)


async def test_previews_branches(database: Pool, forked: MigrationOptions) -> None:
    outcome = await preview(database, "heads", options=forked)
    assert outcome.file is not None
    await database.execute(outcome.file[1])
    assert await migrations.current_heads(database) == ("aaaa", "bbbb")
    outcome = await preview(database, HEAD, down=True, options=forked)
    assert outcome.file is not None
    await database.execute(outcome.file[1])
    assert await migrations.current_heads(database) == (HEAD,)


@pytest.mark.parametrize(
    "recorded", [(KNOWN[0], HEAD), tuple(KNOWN), (HEAD, "aaaa"), ("aaaa", "bbbb", HEAD), ("aaaa", KNOWN[1], "bbbb")]
)
async def test_upgrade_removes_revisions_that_others_build_on(
    database: Pool, forked: MigrationOptions, recorded: tuple[str, ...]
) -> None:
    branches = [revision for revision in recorded if revision not in KNOWN]
    for revision in branches:
        await migrations.upgrade(database, revision, options=forked)
    await set_recorded(database, *recorded)
    assert "build on others" in (await admin.status(database, options=forked)).text
    await admin.upgrade(database, "heads", options=forked)
    assert await migrations.current_heads(database) == ("aaaa", "bbbb")


@pytest.mark.parametrize("recorded", [(), ("9999",), ("9999", HEAD), ("base",)])
async def test_stamp_gets_out_of_unknown_states(database: Pool, recorded: tuple[str, ...]) -> None:
    await set_recorded(database, *recorded)
    with pytest.raises(MigrationError, match=r"python bot\.py db stamp"):
        await admin.upgrade(database)
    await admin.stamp(database, "head")
    assert await migrations.current_heads(database) == (HEAD,)
    assert (await admin.status(database)).ok


async def test_stamps_all_heads(database: Pool, forked: MigrationOptions) -> None:
    await migrations.upgrade(database, "heads", options=forked)
    await set_recorded(database, "9999")
    with pytest.raises(MigrationError, match="aaaa or bbbb, or heads"):
        await admin.stamp(database, "head", options=forked)
    await admin.stamp(database, "heads", options=forked)
    assert await migrations.current_heads(database) == ("aaaa", "bbbb")


def test_the_merge_line_works(forked: MigrationOptions, tmp_path: Path) -> None:
    """The line as a user types it, with the project's alembic.ini on another directory of revisions."""
    config = tmp_path / "alembic.ini"
    config.write_text((ROOT / "alembic.ini").read_text().replace("%(here)s/migrations", str(forked.scripts)))
    arguments = [*LINE.replace('"', "").split()[1:]]
    command = [sys.executable, "-m", "alembic", "-c", str(config), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    merged = Revisions(forked.scripts)
    assert merged.heads == (f"{int(HEAD) + 1:04}_8fb0",), "numbered as the others"
    assert not merged.needs_merge([HEAD])
