"""Backups elsewhere: uploaded in pieces, read back before they count, and found there when only they are left."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from pydantic import SecretStr

from tests.operations.backup.making import filled, settings_for, vault_in
from tests.operations.backup.restoring import cleaned, sums
from tests.operations.backup.s3 import SECRET_KEY, StandIn
from utils.database import Pool
from utils.exceptions import BackupError
from utils.operations.action import ignore_progress
from utils.operations.backup import store
from utils.operations.backup.create import Wanted
from utils.operations.backup.manifest import SUFFIX
from utils.operations.backup.service import BackupService
from utils.operations.backup.store import PIECE, Remote

#: With what a password would look like; obstore does not use it.
URL = "s3://login:hush-5up3r@bucket/of/mine"
NAME = "s3://bucket/of/mine"
#: Rows whose bytes nothing can compress: an archive of more than ten megabytes.
LARGE = """
INSERT INTO documents (guild_id, namespace, key, value)
SELECT 1, 'large', n::text, to_jsonb((
    SELECT string_agg(md5(random()::text || i || n), '') FROM generate_series(1, 400) AS i))
FROM generate_series(1, 2200) AS n
"""


@pytest.fixture
async def s3(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StandIn]:
    """A store on loopback, which the environment leads to."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    async with StandIn() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(params=["s3", "file"])
async def both(request: pytest.FixtureRequest, tmp_path: Path, s3: StandIn) -> BackupService:
    """Backups here, and elsewhere of either kind."""
    url = URL if request.param == "s3" else (tmp_path / "else where").as_uri().replace("%20", " ")
    return vault_in(tmp_path / "here", backup_url=url)


def remote_of(vault: BackupService) -> Remote:
    assert isinstance(vault.stores[1], Remote)
    return vault.stores[1]


async def test_a_backup_goes_both_ways_and_is_the_same_in_both(database: Pool, both: BackupService) -> None:
    await filled(database)
    outcome = await both.create(database)
    made = (await both.find("latest")).manifest
    assert made is not None
    names = {made.file: made.size, f"{made.id}{SUFFIX}": len(made.packed())}
    assert await both.local.names() == await remote_of(both).names() == names
    assert outcome.text.endswith(f"stored in {both.local.name} and {remote_of(both).name}")
    assert len((await both.verify(made.id)).data["checks"]) == 2


async def test_when_only_the_other_place_has_it_it_comes_back_from_there(database: Pool, both: BackupService) -> None:
    await filled(database)
    wanted = await sums(database.target)
    made = await both.make(database, Wanted())
    shutil.rmtree(both.local.path)
    await database.execute("DELETE FROM members")
    entry = await both.find("latest")
    assert (entry.id, entry.places) == (made.id, (remote_of(both).name,))
    async with cleaned(database.target):
        assert (await both.restore(database, "latest")).ok
        assert await sums(database.target) == wanted
        assert (await both.drill(database, made.id)).ok
    assert list((both.local.path.parent / "opened").iterdir()) == []


async def test_a_listing_tells_what_is_where_and_survives_what_is_damaged(database: Pool, both: BackupService) -> None:
    here, there, everywhere, damaged = [(await both.make(database, Wanted(schema_only=True))).id for _ in range(4)]
    await remote_of(both).delete(f"{here}{SUFFIX}")
    await both.local.delete(f"{there}{SUFFIX}")
    await both.local.write(f"{damaged}{SUFFIX}", b"{}")
    local, remote = both.local.name, remote_of(both).name
    entries = {entry.id: entry for entry in await both.known()}
    places = {id: entry.places for id, entry in entries.items()}
    assert places == {here: (local,), there: (remote,), everywhere: (local, remote), damaged: (local, remote)}
    assert "is damaged" in entries[damaged].line
    assert len((await both.listing()).text.splitlines()) == 4


async def test_prune_deletes_in_both_places(tmp_path: Path, database: Pool, both: BackupService) -> None:
    made = [(await both.make(database, Wanted())).id for _ in range(3)]
    rules = {"backup_keep": 1, "backup_keep_daily": 0, "backup_keep_weekly": 0, "backup_keep_monthly": 0}
    strict = BackupService(both._settings.model_copy(update=rules))
    told = await strict.prune(dry_run=True)
    assert told.data["files"] == 8
    assert len(await both.known()) == 3, "that was only said"
    stays = made[-1]
    assert set((await strict.prune()).data["deleted"]) == {*made} - {stays}
    for place in (both.local, remote_of(both)):
        assert {name.split(".")[0] for name in await place.names()} == {stays}


@pytest.mark.slow
async def test_a_large_archive_goes_in_pieces_and_comes_in_pieces(tmp_path: Path, database: Pool, s3: StandIn) -> None:
    await database.execute(LARGE)
    vault = vault_in(tmp_path, backup_url=URL)
    made = await vault.make(database, Wanted())
    pieces = -(-made.size // PIECE)
    assert made.size > 10_000_000
    assert (s3.asked["CREATE"], s3.asked["PART"], s3.asked["COMPLETE"], s3.uploads) == (1, pieces, 1, 0)
    assert s3.asked["GET"] == pieces, "it was read back once"
    assert s3.largest == PIECE
    assert f"of/mine/{made.file}" in s3.objects
    shutil.rmtree(vault.local.path)
    async with vault.opened(made.id, 18, ignore_progress) as archive:
        assert archive.file.stat().st_size == made.size


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-1], lambda content: b"", lambda content: bytes([content[0] ^ 1]) + content[1:]],
    ids=["cut", "emptied", "flipped"],
)
async def test_what_the_store_damages_is_noticed_and_does_not_stay(
    tmp_path: Path, database: Pool, s3: StandIn, damage: Callable[[bytes], bytes]
) -> None:
    s3.damage = damage
    vault = vault_in(tmp_path, backup_url=URL)
    with pytest.raises(BackupError, match="holds something else than was sent"):
        await vault.make(database, Wanted(schema_only=True))
    assert s3.objects == {}
    assert [entry.places for entry in await vault.known()] == [(vault.local.name,)]
    assert not [path.name for path in vault.local.path.iterdir() if path.name.startswith(".unfinished")]


@pytest.mark.parametrize("how", ["away", "failing", "silent", "denied", "no bucket"])
async def test_a_store_that_does_not_serve_is_told_in_bounded_time_without_a_secret(
    tmp_path: Path, database: Pool, s3: StandIn, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(store, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(store, "RETRY_SECONDS", 1.0)
    url = URL.replace("bucket", "nobodys") if how == "no bucket" else URL
    if how == "denied":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another-key")
    if how == "away":
        await s3.stop()
    if how in ("failing", "silent"):
        (s3.failing if how == "failing" else s3.silent).update(("PUT", "CREATE", "LIST", "GET", "HEAD"))
    vault = vault_in(tmp_path, backup_url=url)
    said = []
    for work in (vault.make(database, Wanted(schema_only=True)), vault.prune()):
        with pytest.raises(BackupError) as told:
            await work
        said.append(str(told.value))
    listing = await vault.listing()
    said.append(listing.text)
    for words in said:
        assert remote_of(vault).name in words
        for secret in ("hush", "login", SECRET_KEY, "another-key", "stand-in-access"):
            assert secret not in words
    assert not listing.ok
    assert "without rows" in listing.text, "the one that was made is here all the same"


async def test_while_the_store_is_away_what_is_here_serves(tmp_path: Path, database: Pool, s3: StandIn) -> None:
    vault = vault_in(tmp_path, backup_url=URL)
    made = await vault.make(database, Wanted())
    await s3.stop()
    assert (await vault.drill(database)).ok
    async with vault.opened(made.id, 18, ignore_progress) as archive:
        assert archive.id == made.id
    saved = await vault.save(database, "before restore", ignore_progress)
    assert saved in {entry.id for entry in await vault.known()}, "a restore need not wait for the store"


async def test_a_damaged_copy_here_gives_way_to_the_one_elsewhere(database: Pool, both: BackupService) -> None:
    older = await both.make(database, Wanted())
    made = await both.make(database, Wanted())
    for damage in ("archive", "manifest"):
        path = both.local.path / (made.file if damage == "archive" else f"{made.id}.json")
        path.unlink() if damage == "archive" else path.write_bytes(b"{}")
        for which in ("latest", made.id):
            async with both.opened(which, 18, ignore_progress) as archive:
                assert archive.id == made.id != older.id
                assert archive.file.name == "fetched"


async def test_a_large_object_may_take_longer_than_one_request(
    tmp_path: Path, s3: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "REQUEST_SECONDS", 1.5)
    monkeypatch.setattr(store, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(store, "PIECE", 1_000)
    remote, content = Remote(SecretStr(URL)), os.urandom(3_500)
    s3.objects["of/mine/x"] = content
    s3.drips = 3
    passed = await remote.fetch("x", tmp_path / "x", ignore_progress)
    assert (tmp_path / "x").read_bytes() == content
    assert passed.size == len(content)
    assert s3.asked["GET"] == 4


async def test_an_archive_that_is_gone_elsewhere_is_told(tmp_path: Path, database: Pool, both: BackupService) -> None:
    made = await both.make(database, Wanted())
    shutil.rmtree(both.local.path)
    await remote_of(both).delete(made.file)
    with pytest.raises(BackupError, match=f"{made.file} is not there"):
        async with both.opened(made.id, 18, ignore_progress):
            pass
    with pytest.raises(BackupError, match=f"{made.file} is not in"):
        await both.verify(made.id)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s4://me:hush@bucket/x", "s4://bucket/x cannot be used"),
        ("az://box?sig=hush", "az://box cannot be used"),
        ("file:hush/relative", "no address of a store"),
        ("file://hush/relative", "no address of a store"),
        ("hush", "no address of a store"),
        ("s3:///hush", "no address of a store"),
    ],
)
def test_an_address_that_leads_nowhere_is_told_without_what_it_hides(tmp_path: Path, url: str, told: str) -> None:
    with pytest.raises(BackupError, match=told) as refused:
        BackupService(settings_for(tmp_path, backup_url=url))
    assert "hush" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


async def test_what_an_upload_left_that_was_cut_off_goes_after_a_day(
    tmp_path: Path, database: Pool, both: BackupService
) -> None:
    made = await both.make(database, Wanted())
    remote = remote_of(both)
    young, old = made.id[:-6] + "ffffff.dump", "20250101T000000Z-abcdef.dump"
    for name in (young, old, "notes-of-mine.txt"):
        await remote.write(name, b"half")
    await both.prune()
    assert set(await remote.names()) == {made.file, f"{made.id}{SUFFIX}", young, "notes-of-mine.txt"}
