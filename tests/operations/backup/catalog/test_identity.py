"""Whose a backup is: of which application, and of which database on which server."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path

import pytest

from tests.operations.backup.catalog.test_prune import hours_ago, write_backup
from tests.operations.backup.helpers import GUILD, execute, make_backup, make_service, make_settings, open_pool
from utils.database import ConnectTarget, Pool
from utils.exceptions import BackupError
from utils.operations import migrations
from utils.operations.backup.archive.manifest import Manifest
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.catalog.identity import Identity, identity_in_settings, identity_of
from utils.operations.backup.catalog.keeping import find_alerts, prune
from utils.operations.backup.catalog.retention import RetentionRules
from utils.operations.backup.service import BackupService
from utils.service import application

OURS, THEIRS = 80_001_185_463_165_845, 80_001_185_463_165_846


def made_by(application_id: int | None, hours: float = 1, host: str | None = "db:5432") -> Manifest:
    return hours_ago(hours, application_id=application_id, host=host)


@pytest.mark.parametrize(
    ("identity", "backup", "is_local", "is_own"),
    [
        (Identity(OURS, "db:5432", "guildbook"), made_by(OURS), False, True),
        (Identity(OURS, "db:5432", "guildbook"), made_by(THEIRS), True, False),
        (Identity(OURS, "other:5432", "guildbook"), made_by(OURS), True, False),
        (Identity(OURS, "db:5432", "other"), made_by(OURS), True, False),
        (Identity(None, "db:5432", "guildbook"), made_by(OURS), False, True),
        (Identity(OURS, "db:5432", "guildbook"), made_by(None), False, True),
        (Identity(OURS, "db:5432", "guildbook"), made_by(None, host=None), True, True),
        (Identity(OURS, "db:5432", "guildbook"), made_by(None, host=None), False, False),
        (Identity(OURS, "db:5432", "other"), made_by(None, host=None), True, False),
        (Identity(OURS, "embedded", "guildbook"), made_by(OURS, host="embedded"), True, True),
        (Identity(OURS, "embedded", "guildbook"), made_by(OURS, host="embedded"), False, False),
        (Identity(None, "embedded", "guildbook"), made_by(None, host="embedded"), False, False),
    ],
    ids=[
        "the same", "another application", "another server", "another database", "of a lost database",
        "made before the first login", "of 0.1.0, in DATA_DIR", "of 0.1.0, in a bucket", "of 0.1.0, another database",
        "of the embedded server", "of some embedded server", "of an embedded server before the first login",
    ],
)  # fmt: skip
def test_a_backup_is_own_if_application_server_and_database_are(
    identity: Identity, backup: Manifest, is_local: bool, is_own: bool
) -> None:
    assert identity.resolve([backup]).owns(backup, is_local=is_local) is is_own


@pytest.mark.parametrize(
    ("token_id", "named", "own"),
    [
        (None, {OURS}, {OURS}),
        (OURS, {OURS, THEIRS}, {OURS}),
        (None, {OURS, THEIRS}, set()),
        (OURS, {THEIRS}, set()),
    ],
    ids=["one application", "that of the token", "two applications", "only another one's"],
)
def test_a_lost_database_takes_no_backup_of_another_application(
    token_id: int | None, named: set[int], own: set[int]
) -> None:
    """Two servers may have the same address in two networks, as `postgres.railway.internal`."""
    backups = [made_by(application_id) for application_id in sorted(named)]
    identity = Identity(None, "db:5432", "guildbook", token_id=token_id).resolve(backups)
    assert {one.application_id for one in backups if identity.owns(one, is_local=False)} == own


def test_the_settings_name_the_database_and_the_token_the_application(tmp_path: Path) -> None:
    token = base64.urlsafe_b64encode(str(OURS).encode()).decode().rstrip("=") + ".x.y"
    settings = make_settings(tmp_path, database_url="postgresql://me@DB.example/bot", discord_token=token)
    assert identity_in_settings(settings) == Identity(None, "db.example:5432", "bot", token_id=OURS)
    assert identity_in_settings(make_settings(tmp_path)) == Identity(None, "embedded", "guildbook", token_id=None)


async def test_the_database_says_which_application_it_belongs_to(tmp_path: Path, database: Pool) -> None:
    await application.claim(database, OURS)
    found = await identity_of(database, make_settings(tmp_path))
    assert (found.application_id, found.database) == (OURS, database.target.database)


async def test_two_bots_in_one_store(tmp_path: Path) -> None:
    """Each restores its own latest backup, and deletes its own old ones."""
    url = (tmp_path / "bucket").as_uri()
    ours, theirs = (
        make_service(tmp_path / name, Identity(id, "db:5432", "guildbook"), backup_url=url)
        for name, id in (("ours", OURS), ("theirs", THEIRS))
    )
    old, own, foreign = made_by(OURS, 3), made_by(OURS, 2), made_by(THEIRS, 1)
    remote = ours.catalog.remote
    assert remote is not None
    for backup in (old, own, foreign):
        await write_backup(remote, backup)
    assert (await ours.catalog.find("latest")).id == own.id
    assert (await theirs.catalog.find("latest")).id == foreign.id
    listed = (await ours.list()).text.splitlines()
    assert [line.endswith("; FOREIGN") for line in listed] == [True, False, False]
    assert f"of application {THEIRS}" in listed[0]
    assert (await prune(ours.catalog, RetentionRules(1))).ids == [old.id]
    assert (await prune(theirs.catalog, RetentionRules(1))).ids == []
    with pytest.raises(BackupError, match=f"is of database guildbook at db:5432 of application {THEIRS}, not of"):
        async with ours.catalog.open(foreign.id, 18):
            pass
    with pytest.raises(BackupError, match="is not of database guildbook"):
        await ours.accept(foreign.id)


async def test_restores_a_foreign_backup_only_if_told_to(
    tmp_path: Path, database: Pool, empty_target: ConnectTarget
) -> None:
    service = make_service(tmp_path)
    await database.execute(GUILD)
    backup = await make_backup(service, database)
    await migrations.upgrade(empty_target)
    async with open_pool(empty_target) as other:
        with pytest.raises(BackupError, match=f"there is no full backup of .*{backup.id} .of database"):
            await service.restore(other, "latest")
        with pytest.raises(BackupError, match="To restore it here all the same, add --from-other"):
            await service.restore(other, backup.id)
        assert await other.fetchval("SELECT count(*) FROM guilds") == 0
        assert (await service.restore(other, backup.id, from_other=True)).ok
        assert await other.fetchval("SELECT count(*) FROM guilds") == 1


async def test_latest_is_the_newest_good_one(tmp_path: Path) -> None:
    """No safety copy, no empty, partial, damaged or foreign one, and none that a wrong clock made look new."""
    identity = Identity(OURS, "db:5432", "guildbook")
    catalog = make_service(tmp_path, identity).catalog
    good = made_by(OURS, 10)
    future = replace(made_by(OURS, -24 * 365), ordered_at=made_by(OURS, 11).created_at)
    others = [
        future,
        replace(made_by(OURS, 9), reason="before restore"),
        replace(made_by(OURS, 8), kind="empty"),
        replace(made_by(OURS, 7), kind="tables"),
        made_by(THEIRS, 6),
    ]
    for backup in (good, *others):
        await write_backup(catalog.local, backup)
    damaged = made_by(OURS, 1)
    await write_backup(catalog.local, damaged, b"cut")
    assert (await catalog.find("latest")).id == good.id
    alerts = " ".join(alert.text for alert in find_alerts(catalog, await catalog.entries()))
    assert f"backup {future.id} is dated 36" in alerts
    assert f"backup {damaged.id} is damaged" in alerts


async def test_orders_backups_although_the_clock_is_set_back(tmp_path: Path, database: Pool) -> None:
    service = make_service(tmp_path)
    await execute(database.target, GUILD)
    first = await make_backup(service, database)
    ahead = replace(first, created_at="2031-01-01T00:00:00.000+00:00", ordered_at="2031-01-01T00:00:00.000+00:00")
    await service.catalog.local.write(f"{first.id}.json", ahead.serialize())
    second = await make_backup(service, database)
    assert second.order > ahead.order
    assert (await service.catalog.find("latest")).id == second.id


async def test_a_signing_key_reveals_forged_manifests(tmp_path: Path, database: Pool) -> None:
    await database.execute(GUILD)
    signed = make_service(tmp_path, backup_signing_key="hush")
    backup = await make_backup(signed, database)
    assert (await signed.verify("latest")).ok
    assert (await make_service(tmp_path).verify("latest")).ok, "without the key nothing is compared"
    path = signed.catalog.local.path / f"{backup.id}.json"
    original = path.read_bytes()
    for forged, message in (
        (replace(backup, rows={"public.guilds": 9}).serialize(), "is not signed, and BACKUP_SIGNING_KEY is set"),
        (original.replace(b'"manual"', b'"before"'), "does not match its checksum"),
        (make_signed(backup, "another"), "is not signed with BACKUP_SIGNING_KEY"),
    ):
        path.write_bytes(forged)
        with pytest.raises(BackupError, match=message) as error:
            await signed.verify(backup.id)
        assert "hush" not in str(error.value)
    [entry] = await signed.catalog.entries()
    assert not entry.is_good
    assert entry.manifest is not None, "what it says of itself is shown all the same"


def make_signed(backup: Manifest, key: str) -> bytes:
    from pydantic import SecretStr

    return backup.serialize(SecretStr(key))


async def test_verify_counts_rows_if_told_to(tmp_path: Path, database: Pool) -> None:
    await database.execute(GUILD)
    service = make_service(tmp_path)
    backup = await make_backup(service, database)
    assert "table of contents matches the manifest; rows not counted" in (await service.verify("latest")).text
    assert "rows counted as in the manifest" in (await service.verify("latest", is_deep=True)).text
    wrong = replace(backup, rows=backup.rows | {"public.guilds": 2})
    await service.catalog.local.write(f"{backup.id}.json", wrong.serialize())
    assert (await service.verify("latest")).ok
    with pytest.raises(BackupError, match=r"public\.guilds: 1 row, expected 2"):
        await service.verify("latest", is_deep=True)


async def test_reads_backups_from_a_directory_without_writing_there(tmp_path: Path, database: Pool) -> None:
    await database.execute(GUILD)
    backup = await make_backup(make_service(tmp_path / "there"), database)
    directory = tmp_path / "there" / "backups"
    before = sorted(path.name for path in directory.iterdir())
    directory.chmod(0o500)
    service = BackupService(make_settings(tmp_path / "here"), directory=directory)
    assert backup.id in (await service.list()).text
    assert (await service.verify(backup.id)).ok
    assert (await service.drill(database, backup.id)).ok
    await database.execute("DELETE FROM guilds")
    outcome = await service.restore(database, backup.id)
    assert outcome.ok
    assert await database.fetchval("SELECT count(*) FROM guilds") == 1
    assert sorted(path.name for path in directory.iterdir()) == before


async def test_a_restore_is_described_with_what_is_there_now(tmp_path: Path, database: Pool) -> None:
    await database.execute("INSERT INTO guilds (id, name) SELECT n, 'x' FROM generate_series(1, 1500) AS n")
    service = make_service(tmp_path)
    backup = await make_backup(service, database)
    await database.execute("DELETE FROM guilds WHERE id > 10")
    entry, text = await service.describe_restore(database, "latest")
    assert entry.id == backup.id
    assert " s old" in text
    assert text.endswith("the database has 10 rows, 1,490 fewer than the backup")


async def test_a_local_and_a_remote_backup_are_not_each_others_replacement(tmp_path: Path) -> None:
    service = make_service(tmp_path / "local", backup_url=(tmp_path / "remote").as_uri())
    old, new = hours_ago(5), hours_ago(1)
    remote = service.catalog.remote
    assert remote is not None
    await write_backup(remote, old)
    for backup in (old, new):
        await write_backup(service.catalog.local, backup)
    pruned = await prune(service.catalog, RetentionRules(1))
    assert pruned.ids == [old.id]
    entries = {entry.id: entry.places for entry in await service.catalog.entries()}
    assert entries == {new.id: (service.catalog.local.name,), old.id: (remote.name,)}
    assert (await service.push()).data["uploaded"] == [new.id]
    assert (await service.push()).text == "nothing to upload"
    await prune(service.catalog, RetentionRules(1))
    assert [entry.id for entry in await service.catalog.entries()] == [new.id]


async def test_a_rotten_local_copy_is_neither_restored_nor_uploaded(tmp_path: Path, database: Pool) -> None:
    await database.execute(GUILD)
    service = make_service(tmp_path / "local", backup_url=(tmp_path / "remote").as_uri())
    backup = await make_backup(service, database)
    remote = tmp_path / "remote" / backup.file
    good = remote.read_bytes()
    path = service.catalog.local.path / backup.file
    path.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    assert (await service.push(backup.id)).text == "nothing to upload", "it is there"
    (tmp_path / "remote" / f"{backup.id}.json").unlink()
    with pytest.raises(BackupError, match=f"{backup.file} in {service.catalog.local.name} is damaged"):
        await service.push(backup.id)
    assert remote.read_bytes() == good
    await write_manifest(tmp_path / "remote", backup)
    with pytest.raises(BackupError, match=r"is damaged.*; intact in file:") as error:
        await service.verify(backup.id)
    assert service.catalog.local.name in str(error.value)
    await database.execute("DELETE FROM guilds")
    assert (await service.restore(database, "latest")).ok
    assert await database.fetchval("SELECT count(*) FROM guilds") == 1


async def write_manifest(directory: Path, backup: Manifest) -> None:
    (directory / f"{backup.id}.json").write_bytes(backup.serialize())


async def test_the_local_disk_is_pruned_while_the_store_is_away(tmp_path: Path) -> None:
    (tmp_path / "remote").write_text("a file where the directory should be")
    settings = make_settings(tmp_path / "local", backup_url=(tmp_path / "remote").as_uri())
    catalog = BackupCatalog(settings, identity=make_service(tmp_path).catalog.identity)
    old, new = hours_ago(5), hours_ago(1)
    for backup in (old, new):
        await write_backup(catalog.local, backup)
    pruned = await prune(catalog, RetentionRules(1))
    assert pruned.ids == [old.id]
    assert len(pruned.errors) == 1


async def test_nothing_is_accepted_that_is_no_drop(tmp_path: Path) -> None:
    service = make_service(tmp_path, Identity(OURS, "db:5432", "guildbook"))
    before = replace(made_by(OURS, 3), rows={"public.guilds": 10, "public.members": 5_000})
    after = replace(made_by(OURS, 1), rows={"public.guilds": 10, "public.members": 100})
    await write_backup(service.catalog.local, before)
    assert (await service.accept()).text.startswith(f"nothing to accept: backup {before.id} does not have much less")
    await write_backup(service.catalog.local, after)
    assert (await service.accept()).data == {"accepted": after.id}
    assert (await service.accept()).text == f"nothing to accept: backup {after.id} is accepted already"
