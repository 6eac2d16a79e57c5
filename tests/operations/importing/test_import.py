"""Imports as a whole: copies of the originals, dry run, atomicity, import at start."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.database.cache.conftest import started
from tests.database.cache.test_channel import becomes, cached
from tests.operations.importing.files import (
    GUILD,
    USER,
    export_text,
    files_in,
    import_content,
    member,
    settings,
    stored_rows,
)
from utils.database import ConnectTarget, Pool
from utils.database.embedded import EmbeddedServer
from utils.exceptions import DatabaseError, DatabaseUnavailable, GuildbookError, ValidationError
from utils.operations.action import Outcome, Step
from utils.operations.importing import merging, originals
from utils.operations.importing.entries import REPLACED, SAME_KEY
from utils.operations.importing.importer import NOTHING_USED, import_files, import_new_files

MEMBERS = {f"{GUILD}_{USER + i}": member() for i in range(5)}


async def test_importing_the_same_file_again_changes_nothing(database: Pool, tmp_path: Path) -> None:
    await import_content(database, tmp_path, "members.json", MEMBERS)
    before = await stored_rows(database), await database.fetch("SELECT xmin FROM documents ORDER BY key")
    again = await import_content(database, tmp_path, "members.json", MEMBERS)
    assert "nothing to change" in again.text
    assert (await stored_rows(database), await database.fetch("SELECT xmin FROM documents ORDER BY key")) == before


async def test_changed_entry_gets_a_greater_version(database: Pool, tmp_path: Path) -> None:
    await import_content(database, tmp_path, "shop.json", {"a": {"n": 1}, "b": {"n": 1}})
    before = {row[2]: row for row in (await stored_rows(database))[0]}
    await import_content(database, tmp_path, "shop.json", {"a": {"n": 1}, "b": {"n": 2}, "c": {}})
    after = {row[2]: row for row in (await stored_rows(database))[0]}
    assert after["a"] == before["a"]
    assert after["b"][3] == {"n": 2}
    assert after["b"][4] > before["b"][4]


async def test_dry_run_counts_the_same_and_writes_nothing(database: Pool, tmp_path: Path) -> None:
    await import_content(database, tmp_path, "members.json", dict(list(MEMBERS.items())[:2]))
    before = await stored_rows(database), sorted((tmp_path / "data").rglob("*"))
    whole = {**MEMBERS, "x": member(), f"{GUILD}_{USER}": member(statistics={"message_count": "99"})}
    dry = await import_content(database, tmp_path, "members.json", whole, dry_run=True)
    assert (await stored_rows(database), sorted((tmp_path / "data").rglob("*"))) == before
    real = await import_content(database, tmp_path, "members.json", whole)
    counted = [
        {k: v for k, v in item.data["files"][0].items() if k not in ("rejects", "seconds")} for item in (dry, real)
    ]
    assert counted[0] == counted[1]
    assert counted[0]["documents_new"] == 4
    assert counted[0]["documents_changed"] == counted[0]["stats_changed"] == 1
    assert dry.text.startswith("members.json → legacy.members: 6 entries, would be written: ")


async def test_writes_originals_report_and_rejects(database: Pool, tmp_path: Path) -> None:
    content = '\ufeff{"a": {"x": 1},\n "b": NaN, "": 1, "a": {"x": 2}}'
    outcome = await import_content(database, tmp_path, "emojis.json", content)
    directory = Path(outcome.data["directory"])
    assert directory.parent == tmp_path / "data" / "imports"
    assert (directory / "emojis.json").read_text() == content
    assert json.loads((directory / "report.json").read_text()) == outcome.data
    rows = [json.loads(line) for line in (directory / "emojis.json.rejected.jsonl").read_text().splitlines()]
    assert [(row["line"], row["key"], row["stored"], row["text"]) for row in rows] == [
        (2, "b", False, "NaN"), (2, "", False, "1"), (1, "a", False, '{"x": 1}')
    ]  # fmt: skip
    assert {path.stat().st_mode & 0o077 for path in (directory, *files_in(directory))} == {0}
    file = outcome.data["files"][0]
    assert list(file["repaired"]) == ["byte order mark"]
    assert file["rejected"][SAME_KEY]["examples"] == [{"line": 1, "key": "a", "value": None}]
    assert json.loads(await export_text(database, tmp_path, "emojis")) == {"a": {"x": 2}}


async def test_invalid_file_is_skipped_and_others_are_imported(database: Pool, tmp_path: Path) -> None:
    files = tmp_path / "old"
    files.mkdir()
    (files / "a.json").write_text(json.dumps({str(i): {"n": i} for i in range(5_000)})[:-1] + ",\n}")
    (files / "b.json").write_text('{"x": {}}')
    (files / "readme.txt").write_text("not mine")
    outcome = await import_files(database, settings(tmp_path), [files])
    assert not outcome.ok
    assert [failed["file"] for failed in outcome.data["failed"]] == ["a.json"]
    assert "remove the comma before the closing }" in outcome.text
    assert [row[1:3] for row in (await stored_rows(database))[0]] == [("legacy.b", "x")]


async def test_names_that_are_not_utf8_are_imported(database: Pool, tmp_path: Path) -> None:
    files = tmp_path / "old"
    files.mkdir()
    (files / os.fsdecode(b"caf\xe9.json")).write_text('{"a": {}, "": {}}')
    (files / os.fsdecode(b"broken\xe9.json")).write_text("{")
    (files / "tags.json").write_text('{"b": {}}')
    outcome = await import_files(database, settings(tmp_path), [files])
    assert [file["file"] for file in outcome.data["files"]] == ["caf\\xe9.json", "tags.json"]
    assert [file["file"] for file in outcome.data["failed"]] == ["broken\\xe9.json"]
    assert [row[2] for row in (await stored_rows(database))[0]] == ["a", "b"]
    assert outcome.text.encode()
    assert json.loads((Path(outcome.data["directory"]) / "report.json").read_text()) == outcome.data
    new = await import_new_files(database, files, data_dir=tmp_path / "data")
    assert new is not None
    assert new.data["files"] == []


async def test_failed_and_skipped_files_are_logged_as_warnings(
    database: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = tmp_path / "old"
    files.mkdir()
    (files / "broken.json").write_text("no JSON")
    (files / "lost.json").write_text('[{"name": "x"}]')
    (files / "notes.txt").write_text("")
    (files / "folder.json").mkdir()
    (files / "link.json").symlink_to(files / "gone")
    (files / "tags.json").write_text('{"a": {}}')
    outcome = await import_files(database, settings(tmp_path), [files])
    assert not outcome.ok
    assert [row[2] for row in (await stored_rows(database))[0]] == ["a"]
    logged = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for name, reason in (
        ("broken.json", "line 1, column 1"), ("lost.json", NOTHING_USED), ("notes.txt", "not named"),
        ("folder.json", "directories"), ("link.json", "cannot be read"),
    ):  # fmt: skip
        assert [reason in line for line in logged if name in line] == [True], name
    assert len(logged) == 5


async def test_vanished_file_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    _, copies = originals.copy_files([tmp_path / "gone.json", tmp_path / "a.json"], tmp_path / "data")
    assert isinstance(copies[0], ValidationError)
    assert isinstance(copies[1], originals.Original)


@pytest.mark.parametrize("dry_run", [False, True])
async def test_run_that_left_everything_out_is_not_ok(database: Pool, tmp_path: Path, dry_run: bool) -> None:
    (tmp_path / "a.json").write_text('{"a": {}}')
    (tmp_path / "lost.json").write_text('[{"name": "x"}, {"name": "y"}]')
    outcome = await import_files(
        database, settings(tmp_path), [tmp_path / "lost.json", tmp_path / "a.json"], dry_run=dry_run
    )  # fmt: skip
    assert not outcome.ok
    assert NOTHING_USED in outcome.text
    assert [file["documents_new"] for file in outcome.data["files"]] == [0, 1]
    empty = await import_content(database, tmp_path, "empty.json", {})
    assert empty.ok


async def test_file_that_was_left_out_is_tried_again(database: Pool, tmp_path: Path) -> None:
    files = tmp_path / "old"
    files.mkdir()
    (files / "lost.json").write_text('[{"name": "x"}]')
    for _ in range(2):
        outcome = await import_new_files(database, files, data_dir=tmp_path / "data")
        assert outcome is not None
        assert not outcome.ok


async def test_database_of_another_encoding_is_refused(server: EmbeddedServer, tmp_path: Path) -> None:
    name = f"latin_{os.getpid()}"
    admin = Pool(server.target("postgres"), pool_max=1)
    await admin.connect()
    await admin.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    pool = Pool(server.target(name), pool_max=1)

    async def connect_and_import() -> None:
        await pool.connect()  # it may refuse such a database itself
        await import_content(pool, tmp_path, "shop.json", {"a": {}})

    try:
        with pytest.raises(DatabaseError, match="LATIN1"):
            await connect_and_import()
    finally:
        await pool.close()
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"k" * 256: {}}, "the key must have 1 to 255 characters"),
        ({"big": "x" * 2**20}, "the value is larger than 1,048,576 bytes: split it over several keys"),
        ('{"n": 1e99999}', "a number has more than 16,000 digits"),
        ([{"name": "x"}], "the entry has no key, id, _id or user_id"),
    ],
)
async def test_rejects_entries_that_documents_cannot_store(
    database: Pool, tmp_path: Path, content: Any, reason: str
) -> None:
    outcome = await import_content(database, tmp_path, "things.json", content)
    assert list(outcome.data["files"][0]["rejected"]) == [reason]
    assert outcome.data["files"][0]["lost_entries"] == 1
    assert (await stored_rows(database))[0] == []


async def test_invalid_arguments_are_rejected_before_any_work(database: Pool, tmp_path: Path) -> None:
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


async def test_import_stops_if_originals_cannot_be_copied(database: Pool, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("in the way")
    with pytest.raises(GuildbookError, match="nothing was imported"):
        await import_content(database, tmp_path, "shop.json", {"a": {}})
    assert (await stored_rows(database))[0] == []


async def test_concurrent_import_is_rejected(database: Pool, tmp_path: Path) -> None:
    async with database.transaction() as connection:
        await merging.Merge(connection, "legacy.a").begin()
        with pytest.raises(DatabaseUnavailable, match="another import is running"):
            await import_content(database, tmp_path, "shop.json", {"a": {}})


async def test_verification_detects_lost_rows(database: Pool, tmp_path: Path) -> None:
    await database.execute(
        "CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        " CREATE TRIGGER lose BEFORE INSERT ON member_stats FOR EACH ROW EXECUTE FUNCTION lose()"
    )
    outcome = await import_content(database, tmp_path, "members.json", MEMBERS)
    assert not outcome.ok
    assert "5 rows differ" in outcome.data["failed"][0]["error"]
    assert (await stored_rows(database))[0] == []


async def test_import_new_files_imports_each_file_once(database: Pool, tmp_path: Path) -> None:
    files, data = tmp_path / "old", tmp_path / "data"
    files.mkdir()
    assert await import_new_files(database, files, data_dir=data) is None
    (files / "members.json").write_text(json.dumps(MEMBERS))
    first = await import_new_files(database, files, data_dir=data)
    assert first is not None
    assert first.ok
    assert await import_new_files(database, files, data_dir=data) is None
    digest = hashlib.sha256((files / "members.json").read_bytes()).hexdigest()
    about = await database.fetchval(
        "SELECT value FROM documents WHERE namespace = 'legacy' AND key = $1", f"import:{digest}"
    )
    assert about == {"file": "members.json", "namespace": "legacy.members", "entries": 5}
    (files / "shop.json").write_text("{}")
    second = await import_new_files(database, files, data_dir=data)
    assert second is not None
    assert [file["file"] for file in second.data["files"]] == ["shop.json"]


async def test_progress_reports_bytes_and_rows(database: Pool, tmp_path: Path) -> None:
    steps: list[Step] = []
    await import_content(database, tmp_path, "members.json", MEMBERS, progress=steps.append)
    size = (tmp_path / "members.json").stat().st_size
    assert Step("copying the originals", size, None, "bytes") in steps
    assert Step("reading members.json", size, size, "bytes") in steps
    assert steps[-1] == Step("writing members.json", 15, 15)


async def test_failed_copy_leaves_no_directory(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")

    def fail(copied: int) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        originals.copy_files([tmp_path / "a.json"], tmp_path / "data", fail)
    assert list((tmp_path / "data" / "imports").iterdir()) == []


async def test_cancelled_import_leaves_nothing(database: Pool, tmp_path: Path) -> None:
    (tmp_path / "shop.json").write_text(json.dumps({str(number): {} for number in range(20_000)}))

    def cancel_while_reading(step: Step) -> None:
        if step.text.startswith("reading"):
            task.cancel()

    task = asyncio.ensure_future(
        import_files(database, settings(tmp_path), [tmp_path / "shop.json"], progress=cancel_while_reading)
    )  # fmt: skip
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await stored_rows(database))[0] == []
    again = await import_files(database, settings(tmp_path), [tmp_path / "shop.json"])
    assert again.data["files"][0]["documents_new"] == 20_000


async def test_import_invalidates_caches_of_other_processes(
    database: Pool, target: ConnectTarget, tmp_path: Path
) -> None:
    query = "SELECT count(*) FROM documents WHERE namespace = 'legacy.shop'"
    async with started(target) as process:
        assert await cached(process, query) == 0
        await import_content(database, tmp_path, "shop.json", {"a": {}})
        await becomes(process, 1, query)


@pytest.mark.parametrize("dry_run", [False, True])
async def test_left_out_entries_are_counted_by_reason(database: Pool, tmp_path: Path, dry_run: bool) -> None:
    (tmp_path / "a.json").write_text('{"a": {}, "b": {"n": NaN}, "c": {"n": NaN}, "": {}}')
    (tmp_path / "members.json").write_text(
        json.dumps({f"{GUILD}_{USER}": member(statistics={"message_count": 10**13}), "nobody": member()})
    )
    files = [tmp_path / "a.json", tmp_path / "members.json"]
    outcome = await import_files(database, settings(tmp_path), files, dry_run)
    assert (outcome.ok, outcome.exit_code, outcome.data["failed"]) == (False, 3, [])
    assert outcome.data["left_out"] == {
        "NaN and Infinity are not valid JSON": 2,
        "the key must have 1 to 255 characters": 1,
        "message_count: the count is above 10^12": 1,
        "the key is not guild_user": 1,
    }
    assert [file["lost_entries"] for file in outcome.data["files"]] == [3, 0]
    assert "left out: 2 (NaN and Infinity are not valid JSON), 1 (" in outcome.text
    assert "3 entries not stored at all" in outcome.text
    (tmp_path / "b.json").write_text("{")
    failed = await import_files(database, settings(tmp_path), [*files, tmp_path / "b.json"], dry_run)
    assert (failed.ok, failed.exit_code) == (False, None)
    whole = await import_content(database, tmp_path, "tags.json", {"a": {}}, dry_run=dry_run)
    assert (whole.ok, whole.exit_code, whole.data["left_out"]) == (True, None, {})


async def test_files_of_one_name_do_not_merge(database: Pool, tmp_path: Path) -> None:
    places = ("new/bot", "old/bot", "other")
    for number, place in enumerate(places):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "shop.json").write_text(json.dumps({"sword": {"price": number}}))
    (tmp_path / "other" / "shop.jsonl").write_text('{"key": "sword", "price": 9}')
    paths = [tmp_path / place for place in places]
    outcome = await import_files(database, settings(tmp_path), [*paths, tmp_path / "new" / ".." / "other"])
    assert [file["namespace"] for file in outcome.data["files"]] == [
        "legacy.new.bot.shop", "legacy.old.bot.shop", "legacy.other.shop", "legacy.other.shop-2",
    ]  # fmt: skip
    rows = (await stored_rows(database))[0]
    assert {(row[1], row[3]["price"]) for row in rows} == {
        ("legacy.new.bot.shop", 0), ("legacy.old.bot.shop", 1), ("legacy.other.shop", 2), ("legacy.other.shop-2", 9),
    }  # fmt: skip
    names = [path.name for path in files_in(Path(outcome.data["directory"]))]
    assert names == ["report.json", "shop-2.json", "shop-3.json", "shop.json", "shop.jsonl"]


async def test_files_of_one_name_do_not_merge_in_later_runs(database: Pool, tmp_path: Path) -> None:
    for number, place in enumerate(("old", "new")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "shop.json").write_text(json.dumps({"sword": {"price": number}}))
    old, new = tmp_path / "old" / "shop.json", tmp_path / "new" / "shop.json"

    async def run(path: Path, **options: Any) -> Outcome:
        return await import_files(database, settings(tmp_path), [path], **options)

    assert (await run(old)).ok
    for dry_run in (True, False):
        outcome = await run(new, dry_run=dry_run)
        assert outcome.exit_code is None
        assert not outcome.ok
        for part in ("--namespace legacy.new.shop to keep both", f"--namespace legacy.shop to update those of {old}"):
            assert part in outcome.text
    assert [row[3]["price"] for row in (await stored_rows(database))[0]] == [0]
    assert (await run(new, namespace="legacy.new.shop")).ok
    new.write_text('{"sword": {"price": 2}}')
    old.write_text('{"sword": {"price": 3}}')
    for path, namespace in ((new, "legacy.new.shop"), (old, "legacy.shop")):  # where each was before
        outcome = await run(path)
        assert (outcome.ok, outcome.data["files"][0]["namespace"]) == (True, namespace)
    assert {(row[1], row[3]["price"]) for row in (await stored_rows(database))[0]} == {
        ("legacy.new.shop", 2), ("legacy.shop", 3),
    }  # fmt: skip


async def test_file_keeps_the_namespace_that_a_run_with_others_gave_it(database: Pool, tmp_path: Path) -> None:
    paths = [tmp_path / place / "shop.json" for place in ("old", "new")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(json.dumps({"from": {"place": path.parent.name}}))
    await import_files(database, settings(tmp_path), paths)
    outcome = await import_files(database, settings(tmp_path), paths[:1])
    assert (outcome.ok, outcome.data["files"][0]["namespace"]) == (True, "legacy.old.shop")


async def test_moved_file_is_still_the_same_file(database: Pool, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    first = await import_content(database, tmp_path, "shop.json", {"sword": {"price": 1}})
    again = await import_content(database, tmp_path / "moved", "shop.json", {"sword": {"price": 1}})
    changed = await import_content(database, tmp_path / "moved", "shop.json", {"sword": {"price": 2}})
    assert [one.data["files"][0]["namespace"] for one in (first, again, changed)] == ["legacy.shop"] * 3


async def test_kind_that_an_operator_names_later_changes_the_namespace(database: Pool, tmp_path: Path) -> None:
    content = {f"{GUILD}_{USER}": {"xp": 4}}
    first = await import_content(database, tmp_path, "levels.json", content)
    second = await import_content(database, tmp_path, "levels.json", content, kind="members")
    assert [one.data["files"][0]["namespace"] for one in (first, second)] == ["legacy.levels", "legacy.members"]


@pytest.mark.parametrize(
    ("name", "text", "left_out", "stored"),
    [
        ("shop.json", '{"a": {"x": 1}, "b": {}, "a": {"x": 2}}', {SAME_KEY: 1}, {"a": {"x": 2}, "b": {}}),
        ("shop.json", '{"a": {"x": 1}, "a": {"x": 1}}', {}, {"a": {"x": 1}}),
        ("shop.json", '{"a": {"x": 1, "x": 2, "x": 2}}', {REPLACED: 1}, {"a": {"x": 2}}),
        ("shop.json", '{"a": {"in": [{"x": 1, "x": true}], "in": []}}', {REPLACED: 2}, {"a": {"in": []}}),
        ("shop.jsonl", '{"key": "a", "x": 1, "x": 2}\n', {REPLACED: 1}, {"a": {"key": "a", "x": 2}}),
        ("config.json", '{"prefix": "!", "prefix": "?", "on": true}', {REPLACED: 1},
         {"config": {"prefix": "?", "on": True}}),
        ("data.json", f'{{"{GUILD}": {{"prefix": "!", "prefix": "?", "users": {{"{USER}": {{"xp": 1, "xp": 2}}}}}}}}',
         {REPLACED: 2}, {f"{GUILD}": {"prefix": "?"}, f"{GUILD}_{USER}": {"xp": 2}}),
        ("data.json", f'{{"{GUILD}": {{"{USER}": {{"xp": 1}}}}, "{GUILD}": {{"{USER}": {{"xp": 2}}}}}}',
         {SAME_KEY: 1}, {f"{GUILD}_{USER}": {"xp": 2}}),
    ],
)  # fmt: skip
async def test_duplicate_keys_are_counted_as_left_out(
    database: Pool, tmp_path: Path, name: str, text: str, left_out: dict[str, int], stored: dict[str, Any]
) -> None:
    outcome = await import_content(database, tmp_path, name, text)
    assert outcome.data["left_out"] == left_out
    assert (outcome.ok, outcome.exit_code) == ((False, 3) if left_out else (True, None))
    assert {row[2]: row[3] for row in (await stored_rows(database))[0]} == stored


@pytest.mark.parametrize("encoding", ["utf-16", "UTF_16", "utf-32"])
async def test_named_encoding_without_byte_order_mark_is_recognized(
    database: Pool, tmp_path: Path, encoding: str
) -> None:
    for order in ("-le", "-be"):
        content = '{"a": {"n": "é"}}'.encode(encoding.lower().replace("_", "-") + order)
        outcome = await import_content(database, tmp_path, "shop.json", content, encoding=encoding)
        assert outcome.ok, outcome.text
    refused = await import_content(database, tmp_path, "shop.json", '{"a": {"n": "é"}}', encoding=encoding)
    assert f"it is not {encoding}: it begins neither with a byte order mark" in refused.text
    assert (await stored_rows(database))[0][0][3] == {"n": "é"}


@pytest.mark.parametrize("encoding", ["punycode", "idna", "rot13", "undefined", "hex", "\0"])
async def test_codec_that_is_no_encoding_of_files_is_refused(database: Pool, tmp_path: Path, encoding: str) -> None:
    with pytest.raises(ValidationError, match="is not an encoding"):
        await import_content(database, tmp_path, "shop.json", "{}", encoding=encoding)


TEXT = '{"caf\u00e9": {"note": "\u00dcber \u2013 \u00df"}, "b": {"note": "x"}}'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("has_mark", [False, True])
async def test_unicode_encodings_are_recognized(database: Pool, tmp_path: Path, encoding: str, has_mark: bool) -> None:
    content = ("\ufeff" * has_mark + TEXT).encode(encoding)
    outcome = await import_content(database, tmp_path, "shop.json", content)
    assert (outcome.ok, outcome.data["files"][0]["encoding"]) == (True, encoding)
    assert {row[2]: row[3] for row in (await stored_rows(database))[0]} == json.loads(TEXT)


@pytest.mark.parametrize(
    ("encoding", "letters"),
    [
        ("windows-1252", "caf\u00e9"),
        ("iso-8859-15", "\u20ac"),
        ("cp437", "\u00fcber"),
        ("koi8-r", "\u041f\u0440\u0438"),
        ("shift_jis", "\u65e5\u672c\u8a9e"),
        ("gb18030", "\u4e2d\u6587"),
    ],
)
async def test_8_bit_encodings_are_refused_until_they_are_named(
    database: Pool, tmp_path: Path, encoding: str, letters: str
) -> None:
    content = json.dumps({letters: {"note": letters}, "b": {}}, ensure_ascii=False).encode(encoding)
    refused = await import_content(database, tmp_path, "shop.json", content)
    assert (refused.ok, (await stored_rows(database))[0]) == (False, [])
    assert "it is not UTF-8 but has an 8-bit encoding, such as windows-1252" in refused.data["failed"][0]["error"]
    outcome = await import_content(database, tmp_path, "shop.json", content, encoding=encoding)
    assert (outcome.ok, outcome.data["files"][0]["encoding"]) == (True, encoding)
    assert {row[2]: row[3] for row in (await stored_rows(database))[0]} == {letters: {"note": letters}, "b": {}}


async def test_damaged_bytes_cost_one_entry(database: Pool, tmp_path: Path) -> None:
    whole = json.dumps({f"n{n}": "\u00e4" for n in range(5)}, ensure_ascii=False)
    for content, encoding in (
        (whole.encode().replace(b"\xc3\xa4", b"\xff", 1), None),
        (whole.encode("utf-16-le").replace("\u00e4".encode("utf-16-le"), b"\x00\xd8", 1), None),
        (whole.encode("utf-32-le").replace("\u00e4".encode("utf-32-le"), b"\xff\xff\xff\xff", 1), None),
        (whole.encode("cp1252").replace(b"\xe4", b"\x81", 1), "cp1252"),
        (b'{"n0": "\xff", "n1": "x"}', "utf-8"),
    ):
        await database.execute("DELETE FROM documents")
        outcome = await import_content(database, tmp_path, "shop.json", content, encoding=encoding)
        reason = "it contains bytes that are invalid in the file's encoding"
        assert (outcome.exit_code, outcome.data["left_out"]) == (3, {reason: 1})
        assert "n0" not in {row[2] for row in (await stored_rows(database))[0]}


@pytest.mark.parametrize("encoding", ["utf-9", "rot13", "base64", "", "\x00", "undefined"])
async def test_unknown_encodings_are_refused(database: Pool, tmp_path: Path, encoding: str) -> None:
    with pytest.raises(ValidationError, match="is not an encoding"):
        await import_content(database, tmp_path, "shop.json", {"a": {}}, encoding=encoding)


async def test_a_file_keeps_its_namespace_when_others_of_its_name_were_imported_before(
    tmp_path: Path, database: Pool
) -> None:
    directory = tmp_path / "old"
    directory.mkdir()
    (directory / "shop.json").write_text('{"hat": {"price": 1}}')
    for price in (2, 3):
        assert await import_new_files(database, directory, data_dir=tmp_path) is not None
        (directory / "shop.jsonl").write_text(f'{{"id": "hat", "price": {price}}}\n')
    await import_new_files(database, directory, data_dir=tmp_path)
    rows = await database.fetch(
        "SELECT namespace, value->>'price' AS price FROM documents WHERE key = 'hat' ORDER BY 1"
    )
    assert [tuple(row) for row in rows] == [("legacy.shop", "1"), ("legacy.shop-2", "3")]
