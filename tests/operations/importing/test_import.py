"""An import as a whole: copied away first, tried without writing, all of a file or nothing, once at the start."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.database.cache.conftest import started
from tests.database.cache.test_channel import becomes, kept
from tests.operations.importing.files import (
    GUILD,
    USER,
    brought_in,
    everything,
    files_in,
    member,
    settings,
    written_out,
)
from utils.database import ConnectTarget, Pool
from utils.exceptions import DatabaseError, GuildbookError, ValidationError
from utils.operations.action import Step
from utils.operations.importing import merging, originals
from utils.operations.importing.importer import at_start, import_files

MEMBERS = {f"{GUILD}_{USER + i}": member() for i in range(5)}


async def test_nothing_is_changed_by_the_same_file_again(database: Pool, tmp_path: Path) -> None:
    await brought_in(database, tmp_path, "members.json", MEMBERS)
    before = await everything(database), await database.fetch("SELECT xmin FROM documents ORDER BY key")
    again = await brought_in(database, tmp_path, "members.json", MEMBERS)
    assert "nothing to change" in again.text
    assert (await everything(database), await database.fetch("SELECT xmin FROM documents ORDER BY key")) == before


async def test_a_changed_entry_gets_a_greater_version_and_others_stay(database: Pool, tmp_path: Path) -> None:
    await brought_in(database, tmp_path, "shop.json", {"a": {"n": 1}, "b": {"n": 1}})
    before = {row[2]: row for row in (await everything(database))[0]}
    await brought_in(database, tmp_path, "shop.json", {"a": {"n": 1}, "b": {"n": 2}, "c": {}})
    after = {row[2]: row for row in (await everything(database))[0]}
    assert after["a"] == before["a"]
    assert after["b"][3] == {"n": 2}
    assert after["b"][4] > before["b"][4]


async def test_a_dry_run_counts_the_same_and_writes_nothing(database: Pool, tmp_path: Path) -> None:
    await brought_in(database, tmp_path, "members.json", dict(list(MEMBERS.items())[:2]))
    before = await everything(database), sorted((tmp_path / "data").rglob("*"))
    whole = {**MEMBERS, "x": member(), f"{GUILD}_{USER}": member(statistics={"message_count": "99"})}
    dry = await brought_in(database, tmp_path, "members.json", whole, dry_run=True)
    assert (await everything(database), sorted((tmp_path / "data").rglob("*"))) == before
    real = await brought_in(database, tmp_path, "members.json", whole)
    counted = [
        {k: v for k, v in item.data["files"][0].items() if k not in ("rejects", "seconds")} for item in (dry, real)
    ]
    assert counted[0] == counted[1]
    assert counted[0]["documents_new"] == 4
    assert counted[0]["documents_changed"] == counted[0]["stats_changed"] == 1
    assert dry.text.startswith("members.json → legacy.members: 6 entries, would be written: ")


async def test_the_originals_are_copied_with_the_report_and_what_was_left_out(database: Pool, tmp_path: Path) -> None:
    content = '\ufeff{"a": {"x": 1},\n "b": NaN, "": 1, "a": {"x": 2}}'
    outcome = await brought_in(database, tmp_path, "emojis.json", content)
    directory = Path(outcome.data["directory"])
    assert directory.parent == tmp_path / "data" / "imports"
    assert (directory / "emojis.json").read_text() == content
    assert json.loads((directory / "report.json").read_text()) == outcome.data
    rows = [json.loads(line) for line in (directory / "emojis.json.rejected.jsonl").read_text().splitlines()]
    assert [(row["line"], row["key"], row["stored"], row["text"]) for row in rows] == [
        (2, "b", False, "NaN"), (2, "", False, "1")
    ]  # fmt: skip
    assert {path.stat().st_mode & 0o077 for path in (directory, *files_in(directory))} == {0}
    file = outcome.data["files"][0]
    assert list(file["repaired"]) == ["byte order mark", "key twice, the last one taken"]
    assert file["repaired"]["key twice, the last one taken"]["examples"] == [{"line": 1, "key": "a", "value": None}]
    assert json.loads(await written_out(database, tmp_path, "emojis")) == {"a": {"x": 2}}


async def test_a_file_that_is_no_json_leaves_nothing_and_the_others_go_in(database: Pool, tmp_path: Path) -> None:
    files = tmp_path / "old"
    files.mkdir()
    (files / "a.json").write_text(json.dumps({str(i): {"n": i} for i in range(5_000)})[:-1] + ",\n}")
    (files / "b.json").write_text('{"x": {}}')
    (files / "readme.txt").write_text("not mine")
    outcome = await import_files(database, settings(tmp_path), [files])
    assert not outcome.ok
    assert [failed["file"] for failed in outcome.data["failed"]] == ["a.json"]
    assert "a comma stands in front of the closing }: take it out" in outcome.text
    assert [row[1:3] for row in (await everything(database))[0]] == [("legacy.b", "x")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"k" * 256: {}}, "the key has not 1 to 255 characters"),
        ({"big": "x" * 2**20}, "it has more than 1,048,576 bytes: split it over several keys"),
        ('{"n": 1e99999}', "there is a number in it of more than 16,000 digits"),
        ([{"name": "x"}], "nothing in it says its key: none of key, id, _id, user_id"),
    ],
)
async def test_what_documents_cannot_hold_is_left_out(
    database: Pool, tmp_path: Path, content: Any, reason: str
) -> None:
    outcome = await brought_in(database, tmp_path, "things.json", content)
    assert list(outcome.data["files"][0]["rejected"]) == [reason]
    assert outcome.data["files"][0]["lost_entries"] == 1
    assert (await everything(database))[0] == []


async def test_what_is_no_import_is_refused_before_anything_is_done(database: Pool, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text("{}")
    own = settings(tmp_path)
    for paths, options in (
        ([tmp_path / "nowhere"], {}),
        ([tmp_path / "a.json"], {"kind": "guilds"}),
        ([tmp_path / "a.json"], {"namespace": "ä"}),
        ([tmp_path], {"namespace": "both"}),
        ([], {}),
    ):
        with pytest.raises(ValidationError):
            await import_files(database, own, paths, **options)  # type: ignore[arg-type]
    assert not own.data_dir.exists()


async def test_originals_that_cannot_be_copied_stop_the_import(database: Pool, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("in the way")
    with pytest.raises(GuildbookError, match="nothing was imported"):
        await brought_in(database, tmp_path, "shop.json", {"a": {}})
    assert (await everything(database))[0] == []


async def test_two_imports_at_once_are_refused(database: Pool, tmp_path: Path) -> None:
    async with database.transaction() as connection:
        await merging.Merge(connection, "legacy.a").begin()
        with pytest.raises(DatabaseError, match="another import is under way"):
            await brought_in(database, tmp_path, "shop.json", {"a": {}})


async def test_what_the_database_does_not_keep_is_noticed(database: Pool, tmp_path: Path) -> None:
    await database.execute(
        "CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        " CREATE TRIGGER lose BEFORE INSERT ON member_stats FOR EACH ROW EXECUTE FUNCTION lose()"
    )
    with pytest.raises(DatabaseError, match="5 rows differ"):
        await brought_in(database, tmp_path, "members.json", MEMBERS)
    assert (await everything(database))[0] == []


async def test_at_the_start_each_file_is_imported_once(database: Pool, tmp_path: Path) -> None:
    files, data = tmp_path / "old", tmp_path / "data"
    files.mkdir()
    assert await at_start(database, files, data_dir=data) is None
    (files / "members.json").write_text(json.dumps(MEMBERS))
    first = await at_start(database, files, data_dir=data)
    assert first is not None
    assert first.ok
    assert await at_start(database, files, data_dir=data) is None
    digest = hashlib.sha256((files / "members.json").read_bytes()).hexdigest()
    about = await database.fetchval(
        "SELECT value FROM documents WHERE namespace = 'legacy' AND key = $1", f"import:{digest}"
    )
    assert about == {"file": "members.json", "namespace": "legacy.members", "entries": 5}
    (files / "shop.json").write_text("{}")
    second = await at_start(database, files, data_dir=data)
    assert second is not None
    assert [file["file"] for file in second.data["files"]] == ["shop.json"]


async def test_progress_is_told_in_bytes_and_rows(database: Pool, tmp_path: Path) -> None:
    steps: list[Step] = []
    await brought_in(database, tmp_path, "members.json", MEMBERS, progress=steps.append)
    size = (tmp_path / "members.json").stat().st_size
    assert Step("copying the originals", size, None, "bytes") in steps
    assert Step("reading members.json", size, size, "bytes") in steps
    assert steps[-1] == Step("writing members.json", 15, 15)


async def test_a_copy_that_was_cut_off_leaves_no_directory_that_looks_whole(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValidationError):
        originals.copied([tmp_path / "a.json", tmp_path / "gone.json"], tmp_path / "data")
    assert list((tmp_path / "data" / "imports").iterdir()) == []


async def test_an_import_that_is_called_off_leaves_nothing(database: Pool, tmp_path: Path) -> None:
    (tmp_path / "shop.json").write_text(json.dumps({str(number): {} for number in range(20_000)}))

    def told(step: Step) -> None:
        if step.text.startswith("reading"):
            task.cancel()

    task = asyncio.ensure_future(
        import_files(database, settings(tmp_path), [tmp_path / "shop.json"], progress=told)
    )  # fmt: skip
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await everything(database))[0] == []
    again = await import_files(database, settings(tmp_path), [tmp_path / "shop.json"])
    assert again.data["files"][0]["documents_new"] == 20_000


async def test_the_caches_of_processes_that_run_are_told(database: Pool, target: ConnectTarget, tmp_path: Path) -> None:
    query = "SELECT count(*) FROM documents WHERE namespace = 'legacy.shop'"
    async with started(target) as process:
        assert await kept(process, query) == 0
        await brought_in(database, tmp_path, "shop.json", {"a": {}})
        await becomes(process, 1, query)
