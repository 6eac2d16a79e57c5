"""Backups in a remote store: uploaded in parts, read back before they count, and used when the local copy is lost."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from pydantic import SecretStr

from tests.operations.backup.fake_s3 import SECRET_KEY, FakeS3
from tests.operations.backup.helpers import (
    EVERYONE,
    GUILD,
    ROOT,
    dropping_scratch_databases,
    fill,
    make_backup,
    make_service,
    make_settings,
    table_checksums,
)
from utils.database import Pool
from utils.exceptions import BackupError, SettingsError, UnknownBackup, UploadFailed
from utils.operations.action import Step
from utils.operations.backup.archive.manifest import MANIFEST_SUFFIX
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.create import BackupRequest
from utils.operations.backup.service import BackupService
from utils.operations.backup.store import Directory, Remote
from utils.operations.backup.store.backends import PART_BYTES
from utils.operations.backup.store.remote import READS_AT_ONCE

#: With something that looks like a password; obstore ignores it.
URL = "s3://login:hush-5up3r@bucket/of/mine"
SCHEMA_ONLY = BackupRequest(schema_only=True)
#: Rows that cannot be compressed, for an archive of more than ten megabytes.
LARGE = """
INSERT INTO documents (guild_id, namespace, key, value)
SELECT 1, 'large', n::text, to_jsonb((
    SELECT string_agg(md5(random()::text || i || n), '') FROM generate_series(1, 400) AS i))
FROM generate_series(1, 2200) AS n
"""


@pytest.fixture
async def s3(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeS3]:
    """A fake S3 server that the environment points to."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    async with FakeS3() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(params=["s3", "file"])
async def service(request: pytest.FixtureRequest, tmp_path: Path, s3: FakeS3) -> BackupService:
    """A service with a remote store of either kind."""
    url = URL if request.param == "s3" else (tmp_path / "else where").as_uri().replace("%20", " ")
    return make_service(tmp_path / "local", backup_url=url)


def remote_of(service: BackupService) -> Remote:
    assert service.catalog.remote is not None
    return service.catalog.remote


async def test_stores_the_same_files_in_both_stores(database: Pool, service: BackupService) -> None:
    await fill(database)
    outcome = await service.create(database)
    manifest = (await service.catalog.find("latest")).manifest
    assert manifest is not None
    names = {manifest.file: manifest.size, f"{manifest.id}{MANIFEST_SUFFIX}": len(manifest.serialize())}
    assert await service.catalog.local.names() == await remote_of(service).names() == names
    assert outcome.text.endswith(f"stored in {service.catalog.local.name} and {remote_of(service).name}")
    assert len((await service.verify(manifest.id)).data["checks"]) == 2


async def test_restores_from_the_remote_store(database: Pool, service: BackupService) -> None:
    await fill(database)
    expected = await table_checksums(database.target)
    backup = await make_backup(service, database)
    shutil.rmtree(service.catalog.local.path)
    await database.execute("DELETE FROM members")
    entry = await service.catalog.find("latest")
    assert (entry.id, entry.places) == (backup.id, (remote_of(service).name,))
    async with dropping_scratch_databases(database.target):
        assert (await service.restore(database, "latest")).ok
        assert await table_checksums(database.target) == expected
        assert (await service.drill(database, backup.id)).ok
    assert list((service.catalog.local.path.parent / "opened").iterdir()) == []


async def test_lists_which_store_has_what(database: Pool, service: BackupService) -> None:
    backups = [await make_backup(service, database, SCHEMA_ONLY) for _ in range(4)]
    remote_only, local_only, both, damaged = [backup.id for backup in backups]
    await remote_of(service).delete(f"{local_only}{MANIFEST_SUFFIX}")
    await service.catalog.local.delete(f"{remote_only}{MANIFEST_SUFFIX}")
    await service.catalog.local.write(f"{damaged}{MANIFEST_SUFFIX}", b"{}")
    local, remote = service.catalog.local.name, remote_of(service).name
    entries = {entry.id: entry for entry in await service.catalog.entries()}
    assert {id: entry.places for id, entry in entries.items()} == {
        remote_only: (remote,),
        local_only: (local,),
        both: (local, remote),
        damaged: (local, remote),
    }
    assert "is damaged" in entries[damaged].line
    lines = (await service.list()).text.splitlines()
    assert [line.split(":")[0] for line in lines[4:]] == [
        f"backup {damaged} is damaged",
        f"backup {local_only} is not in the remote store yet",
    ]


@pytest.mark.slow
async def test_transfers_large_archives_in_parts(tmp_path: Path, database: Pool, s3: FakeS3) -> None:
    await database.execute(LARGE)
    service = make_service(tmp_path, backup_url=URL)
    backup = await make_backup(service, database)
    parts = -(-backup.size // PART_BYTES)
    assert backup.size > 10_000_000
    assert (s3.requests["CREATE"], s3.requests["PART"], s3.requests["COMPLETE"], s3.open_uploads) == (1, parts, 1, 0)
    assert s3.requests["GET"] == parts, "it was read back once"
    assert s3.largest_body == PART_BYTES
    assert f"of/mine/{backup.file}" in s3.objects
    shutil.rmtree(service.catalog.local.path)
    async with service.catalog.open(backup.id, 18) as archive:
        assert archive.file.stat().st_size == backup.size


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-1], lambda content: b"", lambda content: bytes([content[0] ^ 1]) + content[1:]],
    ids=["truncated", "emptied", "flipped"],
)
async def test_deletes_an_upload_that_the_store_damaged(
    tmp_path: Path, database: Pool, s3: FakeS3, damage: Callable[[bytes], bytes]
) -> None:
    s3.damage = damage
    service = make_service(tmp_path, backup_url=URL)
    with pytest.raises(BackupError, match="stored something other than was sent"):
        await make_backup(service, database, SCHEMA_ONLY)
    assert s3.objects == {}
    assert [entry.places for entry in await service.catalog.entries()] == [(service.catalog.local.name,)]
    assert not [path for path in service.catalog.local.path.iterdir() if path.name.startswith(".unfinished")]


@pytest.mark.parametrize("fault", ["stopped", "failing", "silent", "denied", "no bucket"])
async def test_store_faults_are_bounded_and_reveal_no_secret(
    tmp_path: Path, database: Pool, s3: FakeS3, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "denied":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another-key")
    if fault == "stopped":
        await s3.stop()
    if fault in ("failing", "silent"):
        (s3.failing if fault == "failing" else s3.silent).update(("PUT", "CREATE", "LIST", "GET", "HEAD"))
    url = SecretStr(URL.replace("bucket", "nobodys") if fault == "no bucket" else URL)
    remote = Remote(url, answer_seconds=1.0, stall_seconds=1.0)
    settings = make_settings(tmp_path)
    service = BackupService(settings, catalog=BackupCatalog(settings, remote=remote))
    with pytest.raises(UploadFailed) as error:
        await make_backup(service, database, SCHEMA_ONLY)
    pruned = await service.prune()
    assert not pruned.ok
    listing = await service.list()
    messages = [str(error.value), pruned.text, listing.text]
    for message in messages:
        assert remote.name in message
        for secret in ("hush", "login", SECRET_KEY, "another-key", "fake-access"):
            assert secret not in message
    assert not listing.ok
    assert "without rows" in listing.text, "the local copy is listed all the same"


async def test_local_backups_work_while_the_store_is_down(tmp_path: Path, database: Pool, s3: FakeS3) -> None:
    service = make_service(tmp_path, backup_url=URL)
    await database.execute(GUILD)
    backup = await make_backup(service, database)
    await s3.stop()
    assert (await service.drill(database)).ok
    async with service.catalog.open(backup.id, 18) as archive:
        assert archive.id == backup.id
    safety_copy = await make_backup(service, database, BackupRequest("before restore"))
    assert safety_copy.id in {entry.id for entry in await service.catalog.entries()}


async def test_uses_the_remote_copy_if_the_local_one_is_damaged(database: Pool, service: BackupService) -> None:
    await database.execute(GUILD)
    older = await make_backup(service, database)
    backup = await make_backup(service, database)
    for damaged in ("archive", "manifest"):
        path = service.catalog.local.path / (backup.file if damaged == "archive" else f"{backup.id}.json")
        path.unlink() if damaged == "archive" else path.write_bytes(b"{}")
        for id in ("latest", backup.id):
            async with service.catalog.open(id, 18) as archive:
                assert archive.id == backup.id != older.id
                assert archive.file.name == "downloaded"


async def test_a_download_may_take_longer_than_one_request(tmp_path: Path, s3: FakeS3) -> None:
    remote = Remote(SecretStr(URL), stall_seconds=2.0, part_bytes=1_000)
    content = os.urandom(3_500)
    s3.objects["of/mine/x"] = content
    s3.drips = 3
    digest = await remote.download("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == content
    assert digest.size == len(content)
    assert s3.requests["GET"] == 4


async def test_reports_an_archive_missing_from_the_store(database: Pool, service: BackupService) -> None:
    backup = await make_backup(service, database)
    shutil.rmtree(service.catalog.local.path)
    await remote_of(service).delete(backup.file)
    with pytest.raises(BackupError, match=f"{backup.file} is not in"):
        async with service.catalog.open(backup.id, 18):
            pass
    with pytest.raises(BackupError, match=f"{backup.file} is not in"):
        await service.verify(backup.id)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s4://me:hush@bucket/x", "s4://bucket/x cannot be used"),
        ("az://box?sig=hush", "az://box cannot be used"),
        ("file:hush/relative", "not the URL of a store"),
        ("file://hush/relative", "not the URL of a store"),
        ("hush", "not the URL of a store"),
        ("s3:///hush", "not the URL of a store"),
    ],
)
def test_rejects_invalid_urls_without_their_secrets(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(BackupError, match=message) as error:
        BackupService(make_settings(tmp_path, backup_url=url))
    assert isinstance(error.value, SettingsError), "exit code 2"
    assert "hush" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_local_directory_is_no_second_store(tmp_path: Path) -> None:
    """It would be said to have two copies of each backup."""
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    for path in (tmp_path / "backups", tmp_path / "link" / "backups"):
        with pytest.raises(SettingsError, match="a second store must be elsewhere"):
            BackupService(make_settings(tmp_path, backup_url=path.as_uri()))
    BackupService(make_settings(tmp_path, backup_url=(tmp_path / "backups" / "second").as_uri()))


async def test_prune_deletes_in_both_stores(database: Pool, service: BackupService) -> None:
    await database.execute(GUILD)
    ids = [(await make_backup(service, database)).id for _ in range(3)]
    rules = {"backup_keep": 1, "backup_keep_daily": 0, "backup_keep_weekly": 0, "backup_keep_monthly": 0}
    settings = service.catalog.settings.model_copy(update=rules)
    strict = BackupService(settings, catalog=BackupCatalog(settings, identity=EVERYONE))
    assert (await strict.prune(dry_run=True)).data["files"] == 8
    assert len(await service.catalog.entries()) == 3
    assert set((await strict.prune()).data["deleted"]) == {*ids[:-1]}
    for store in service.catalog.stores:
        assert {name.split(".")[0] for name in await store.names()} == {ids[-1]}


async def test_prune_deletes_interrupted_uploads_after_a_day(database: Pool, service: BackupService) -> None:
    backup = await make_backup(service, database)
    remote = remote_of(service)
    recent, old = backup.id[:-6] + "ffffff.dump", "20250101T000000Z-abcdef.dump"
    for name in (recent, old, "notes-of-mine.txt"):
        await remote.write(name, b"half")
    await service.prune()
    names = {backup.file, f"{backup.id}{MANIFEST_SUFFIX}", recent, "notes-of-mine.txt"}
    assert set(await remote.names()) == names


# --- stores that do not answer


@pytest.fixture
async def silent_url() -> AsyncIterator[str]:
    """The address of a server that accepts connections and never answers."""

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # until the client gives up
        writer.close()

    server = await asyncio.start_server(wait, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


@pytest.mark.parametrize("verb", ["names", "read", "write", "delete", "digest", "upload"])
async def test_each_answer_of_a_silent_store_is_bounded(
    s3: FakeS3, silent_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", silent_url)
    remote = Remote(SecretStr(URL), answer_seconds=0.5, stall_seconds=0.5, away_seconds=0)
    (tmp_path / "file").write_bytes(b"content")
    work: dict[str, Callable[[], Awaitable[object]]] = {
        "names": remote.names,
        "read": lambda: remote.read("x", 10),
        "write": lambda: remote.write("x", b"content"),
        "delete": lambda: remote.delete("x"),
        "digest": lambda: remote.digest("x"),
        "upload": lambda: remote.upload(tmp_path / "file", "x"),
    }
    async with asyncio.timeout(10):
        with pytest.raises(BackupError, match=r"s3://bucket/of/mine: could not \w+ "):
            await work[verb]()


async def test_a_store_that_did_not_answer_is_not_asked_again_for_a_while(s3: FakeS3) -> None:
    remote = Remote(SecretStr(URL), answer_seconds=0.5, away_seconds=300)
    s3.silent.add("GET")
    with pytest.raises(BackupError, match="could not read a: "):
        await remote.read("a", 10)
    asked = s3.requests.total()
    found = await remote.read_many([f"{number}.json" for number in range(100)], 10)
    assert {type(result) for result in found.values()} == {BackupError}
    for work in (remote.names(), remote.digest("a"), remote.write("a", b"")):
        with pytest.raises(BackupError, match=r"it did not answer \d+ s ago: try again in \d+ s"):
            await work
    assert s3.requests.total() == asked
    s3.silent.clear()
    again = Remote(SecretStr(URL), away_seconds=0)
    assert await again.read("a", 10) is None


async def test_a_refusal_is_an_answer(s3: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another-key")
    remote = Remote(SecretStr(URL))
    for _ in range(2):
        with pytest.raises(BackupError) as error:
            await remote.names()
        assert "did not answer" not in str(error.value)


async def test_an_upload_without_progress_ends(s3: FakeS3, tmp_path: Path) -> None:
    remote = Remote(SecretStr(URL), stall_seconds=0.5, part_bytes=5 << 20)
    (tmp_path / "file").write_bytes(bytes(11 << 20))
    s3.silent.add("PART")
    async with asyncio.timeout(10):
        with pytest.raises(BackupError, match="could not write large: "):
            await remote.upload(tmp_path / "file", "large")
    assert s3.objects == {}


async def test_a_slow_upload_goes_on_while_it_makes_progress(s3: FakeS3, tmp_path: Path) -> None:
    remote = Remote(SecretStr(URL), stall_seconds=2.0, part_bytes=5 << 20)
    (tmp_path / "file").write_bytes(os.urandom(26 << 20))
    s3.pause = 0.8  # for each of six parts, two at a time: longer than a stall in all
    started = time.monotonic()
    await remote.upload(tmp_path / "file", "large")
    assert time.monotonic() - started > 2.0
    assert s3.objects["of/mine/large"] == (tmp_path / "file").read_bytes()


async def test_a_refusal_at_the_end_of_a_long_upload_is_shown(s3: FakeS3, tmp_path: Path) -> None:
    remote = Remote(SecretStr(URL), stall_seconds=2.0, part_bytes=5 << 20)
    (tmp_path / "file").write_bytes(bytes(26 << 20))
    s3.pause = 0.6
    s3.refusing.add("COMPLETE")
    with pytest.raises(BackupError, match="403 Forbidden"):
        await remote.upload(tmp_path / "file", "large")
    assert await remote.names() == {}, "it did answer"


async def test_an_upload_shows_its_progress(service: BackupService, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(2 * PART_BYTES + 1))
    steps: list[Step] = []
    await remote_of(service).upload(tmp_path / "file", "large", steps.append)
    done = [step.done for step in steps]
    assert done == sorted(done)
    assert len(done) > 2
    assert (done[-1], {step.total for step in steps}) == (2 * PART_BYTES + 1, {2 * PART_BYTES + 1})


async def test_a_process_ends_cleanly_after_a_store_did_not_answer(silent_url: str, tmp_path: Path) -> None:
    program = """
import asyncio, sys
from pydantic import SecretStr
from utils.exceptions import BackupError
from utils.operations.action import Step
from utils.operations.backup.store import Remote

async def main():
    remote = Remote(SecretStr("s3://bucket/x"), answer_seconds=float(sys.argv[1]), stall_seconds=float(sys.argv[1]))
    for work in (remote.names(), remote.upload(__import__("pathlib").Path(sys.argv[2]), "x")):
        try:
            async with asyncio.timeout(float(sys.argv[3])):
                await work
        except (BackupError, TimeoutError) as error:
            print(type(error).__name__)

asyncio.run(main())
"""
    environment = {
        "AWS_ENDPOINT_URL": silent_url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "PYTHONPATH": str(ROOT),
    }
    (tmp_path / "file").write_bytes(b"content")
    # The second one is cancelled while a request is under way, as by Ctrl-C.
    for answer, cancelled, printed in (("0.5", "60", ["BackupError"] * 2), ("60", "0.5", ["TimeoutError"] * 2)):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, answer, str(tmp_path / "file"), cancelled, env=environment,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        async with asyncio.timeout(60):
            out, err = await process.communicate()
        assert (process.returncode, out.decode().split(), err.decode()) == (0, printed, "")


# --- what callers rely on


async def test_reads_many_at_once_but_not_all(s3: FakeS3, tmp_path: Path) -> None:
    names = [f"{number}.json" for number in range(30)]
    s3.objects |= {f"of/mine/{name}": name.encode() for name in names}
    s3.pause = 0.05
    expected = {**{name: name.encode() for name in names}, "absent.json": None}
    assert await Remote(SecretStr(URL)).read_many([*names, "absent.json"], 100) == expected
    assert 1 < s3.most_running <= READS_AT_ONCE
    directory = Directory(tmp_path)
    for name in names:
        await directory.write(name, name.encode())
    assert await directory.read_many([*names, "absent.json"], 100) == expected


async def test_one_unreadable_file_does_not_spoil_the_others(s3: FakeS3, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"a")
    (tmp_path / "b.json").mkdir()
    for store in (Directory(tmp_path), Remote(SecretStr(tmp_path.as_uri()))):
        found = await store.read_many(["a.json", "b.json"], 10)
        assert found["a.json"] == b"a"
        assert isinstance(found["b.json"], BackupError)
        assert "Is a directory" in str(found["b.json"])


async def test_reads_at_most_the_limit_and_empty_files(service: BackupService) -> None:
    for store in service.catalog.stores:
        await store.write("x", b"0123456789")
        await store.write("empty", b"")
        assert await store.read("x", 4) == b"0123"
        assert await store.read("empty", 4) == b""


async def test_lists_no_other_directories(s3: FakeS3) -> None:
    s3.objects |= {"of/mine/a.json": b"a", "of/mine/deeper/b.json": b"b", "of/mine-too/c.json": b"c"}
    assert await Remote(SecretStr(URL)).names() == {"a.json": 1}


async def test_files_of_a_directory_are_private(database: Pool, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir(mode=0o755)
    place = tmp_path / "shared" / "new" / "deeper"
    service = make_service(tmp_path / "local", backup_url=place.as_uri())
    previous = os.umask(0)
    try:
        assert await remote_of(service).names() == {}
        assert not place.exists(), "only a write creates it"
        await make_backup(service, database, SCHEMA_ONLY)
    finally:
        os.umask(previous)
    directories, files = find_modes(tmp_path)
    assert directories.pop(tmp_path / "shared") == 0o755, "what exists is left as it is"
    assert {*directories} >= {place, place.parent, service.catalog.local.path}
    assert {*directories.values()} == {0o700}
    assert len(files) >= 4
    assert {*files.values()} == {0o600}


def find_modes(directory: Path) -> tuple[dict[Path, int], dict[Path, int]]:
    """Return the modes of the directories and of the files below a directory."""
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in directory.rglob("*")}
    directories = {path: mode for path, mode in modes.items() if path.is_dir()}
    return directories, {path: mode for path, mode in modes.items() if path.is_file()}


async def test_a_read_only_directory_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"a")
    directory = Directory(tmp_path, is_read_only=True)
    assert await directory.names() == {"a.json": 1}
    assert await directory.read("a.json", 10) == b"a"
    for work in (directory.write("b", b""), directory.delete("a.json")):
        with pytest.raises(BackupError, match="is only read"):
            await work
    with pytest.raises(BackupError, match="is only read"):
        directory.prepare()
    assert os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(UnknownBackup, match="does not exist: expected a directory"):
        await Directory(tmp_path / "absent", is_read_only=True).names()
    with pytest.raises(UnknownBackup, match="Not a directory: expected one with backups"):
        await Directory(tmp_path / "a.json", is_read_only=True).names()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/x", "could not list backups: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set"),
        ("gs://bucket/x", "could not list backups: GOOGLE_APPLICATION_CREDENTIALS is not set"),
        ("az://box/x", "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY are not set"),
    ],
)
async def test_names_missing_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, message: str) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    async with asyncio.timeout(30):
        with pytest.raises(BackupError) as error:
            await Remote(SecretStr(url), answer_seconds=1.0).names()
    assert message in str(error.value)
    assert "169.254" not in str(error.value)
