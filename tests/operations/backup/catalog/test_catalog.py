"""Finding, opening and verifying backups in two stores."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.operations.backup.helpers import (
    GUILD,
    dropping_scratch_databases,
    fill,
    make_backup,
    make_service,
    table_checksums,
)
from utils.database import Pool
from utils.exceptions import BackupError
from utils.operations.action import Step
from utils.operations.backup.archive.client_tools import find_directory
from utils.operations.backup.archive.reading import check_contents
from utils.operations.backup.create import BackupRequest
from utils.operations.backup.service import BackupService
from utils.operations.development import seed

pyrage = pytest.importorskip("pyrage")


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """The directory of the remote store."""
    return tmp_path / "remote"


@pytest.fixture
def service(tmp_path: Path, remote: Path) -> BackupService:
    """A service with a local and a remote store."""
    return make_service(tmp_path / "local", backup_url=remote.as_uri())


# --- opening


@pytest.fixture
async def backup_id(tmp_path: Path, database: Pool) -> str:
    """The id of a local backup of two guilds."""
    await seed.seed(database, guilds=2, members=60)
    return (await make_backup(make_service(tmp_path), database)).id


async def test_restores_and_drills_a_backup(tmp_path: Path, database: Pool, backup_id: str) -> None:
    service = make_service(tmp_path)
    expected = await table_checksums(database.target)
    await database.execute("DELETE FROM members")
    newest = await service.catalog.newest()
    assert newest is not None
    assert newest.id == backup_id
    async with dropping_scratch_databases(database.target):
        drilled = await service.drill(database)
        assert drilled.ok, drilled.text
        assert (await service.catalog.find(backup_id)).drill is not None
        restored = await service.restore(database, backup_id)
        assert restored.ok, restored.text
        assert await table_checksums(database.target) == expected
        assert await service.catalog.newest() == newest, "a safety copy is not the latest"
        assert len(await service.catalog.entries()) == 2
    assert list((tmp_path / "opened").iterdir()) == []


@pytest.mark.parametrize("damage", ["flipped", "truncated", "deleted"])
async def test_refuses_a_damaged_archive(tmp_path: Path, database: Pool, backup_id: str, damage: str) -> None:
    file = tmp_path / "backups" / f"{backup_id}.dump"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flipped" else content[:-10])
    before = await table_checksums(database.target)
    with pytest.raises(BackupError, match="is not in" if damage == "deleted" else "is damaged"):
        await make_service(tmp_path).restore(database, backup_id)
    assert await table_checksums(database.target) == before


async def test_refuses_partial_unknown_and_too_new_backups(tmp_path: Path, database: Pool, backup_id: str) -> None:
    service = make_service(tmp_path)
    partial = await make_backup(service, database, BackupRequest(tables=("guilds",)))
    with pytest.raises(BackupError, match="partial"):
        await service.restore(database, partial.id, whole_database=True)
    with pytest.raises(BackupError, match="partial"):
        await service.drill(database, partial.id)
    with pytest.raises(BackupError, match="newer"):
        async with service.catalog.open(backup_id, 15):
            pass
    with pytest.raises(BackupError, match="no backup nothing"):
        await service.restore(database, "nothing")


async def test_opens_an_encrypted_backup_with_the_identity(tmp_path: Path, database: Pool) -> None:
    await seed.seed(database, guilds=1, members=20)
    identity = pyrage.x25519.Identity.generate()
    (tmp_path / "key").write_text(f"# mine\n{identity}\n")
    recipient = str(identity.to_public())
    without_identity = make_service(tmp_path, backup_age_recipient=recipient)
    backup = await make_backup(without_identity, database)
    with pytest.raises(BackupError, match="BACKUP_AGE_IDENTITY_FILE"):
        await without_identity.drill(database, backup.id)
    with_identity = make_service(tmp_path, backup_age_recipient=recipient, backup_age_identity_file=tmp_path / "key")
    outcome = await with_identity.drill(database, backup.id)
    assert outcome.ok, outcome.text
    assert list((tmp_path / "opened").iterdir()) == []


# --- verifying


async def test_verifies_the_copy_in_each_store(database: Pool, service: BackupService, remote: Path) -> None:
    await fill(database)
    backup = await make_backup(service, database)
    steps: list[Step] = []
    outcome = await service.verify("latest", progress=steps.append)
    checks = f"{backup.size:,} bytes, SHA-256 correct, table of contents matches the manifest"
    assert len(outcome.data["checks"]) == 2
    for store, check in zip((service.catalog.local.name, remote.as_uri()), outcome.data["checks"], strict=True):
        assert check.startswith(f"{store}: {checks}")
    assert outcome.text.splitlines()[0] == f"backup {backup.id} is intact"
    assert {step.text for step in steps} >= {"verifying", "downloading", "reading the contents"}


async def test_verify_names_the_damaged_copy(
    tmp_path: Path, database: Pool, service: BackupService, remote: Path
) -> None:
    backup = await make_backup(service, database)
    os.truncate(remote / backup.file, backup.size - 1)
    with pytest.raises(BackupError, match=f"is damaged: it has {backup.size - 1:,} bytes") as error:
        await service.verify(backup.id)
    assert remote.as_uri() in str(error.value)
    assert (await make_service(tmp_path / "local").verify(backup.id)).ok
    (service.catalog.local.path / backup.file).unlink()
    with pytest.raises(BackupError, match=f"{backup.file} is not in {service.catalog.local.path}"):
        await service.verify(backup.id)


async def test_verify_skips_a_store_without_the_backup(database: Pool, service: BackupService, remote: Path) -> None:
    backup = await make_backup(service, database)
    (remote / f"{backup.id}.json").unlink()
    [check] = (await service.verify(backup.id)).data["checks"]
    assert check.startswith(f"{service.catalog.local.name}: ")
    (service.catalog.local.path / f"{backup.id}.json").unlink()
    with pytest.raises(BackupError, match=f"there is no backup {backup.id}: there are no backups"):
        await service.verify(backup.id)


async def test_verify_says_what_it_could_not_decrypt(tmp_path: Path, database: Pool) -> None:
    identity = pyrage.x25519.Identity.generate()
    (tmp_path / "key").write_text(f"{identity}\n")
    without_identity = make_service(tmp_path, backup_age_recipient=str(identity.to_public()))
    await database.execute(GUILD)
    await make_backup(without_identity, database)
    assert (
        "not decrypted, because BACKUP_AGE_IDENTITY_FILE is not set" in (await without_identity.verify("latest")).text
    )
    deep = await without_identity.verify("latest", is_deep=True)
    assert (deep.ok, "could not be counted" in deep.text) == (False, True)
    with_identity = make_service(tmp_path, backup_age_identity_file=tmp_path / "key")
    assert "decrypted, table of contents matches the manifest" in (await with_identity.verify("latest")).text
    assert list((tmp_path / "opened").iterdir()) == []


@pytest.mark.parametrize(
    "request_",
    [BackupRequest(tables=("members", "changes")), BackupRequest(schema_only=True)],
    ids=["tables", "schema"],
)
async def test_verifies_partial_backups(tmp_path: Path, database: Pool, request_: BackupRequest) -> None:
    await fill(database)
    service = make_service(tmp_path)
    backup = await make_backup(service, database, request_)
    assert "table of contents matches the manifest" in (await service.verify(backup.id)).text


async def test_notices_a_table_missing_from_the_archive(tmp_path: Path, database: Pool) -> None:
    await fill(database)
    service = make_service(tmp_path)
    backup = await make_backup(service, database, BackupRequest(tables=("users",)))
    forged = replace(backup, rows={**backup.rows, "public.members": 5, "public.changes": 0})
    tools = await find_directory(backup.major)
    with pytest.raises(BackupError, match=r"has no rows of public\.members, which the manifest counts"):
        await check_contents(forged, service.catalog.local.path / backup.file, tools)


async def test_counts_rows_of_partitions_for_their_table(tmp_path: Path, database: Pool) -> None:
    await database.execute(
        "INSERT INTO changes (guild_id, table_name, key, action) SELECT 1, 'members', '{}', 'update'"
        " FROM generate_series(1, 40)"
    )
    service = make_service(tmp_path)
    backup = await make_backup(service, database, BackupRequest(tables=("changes",)))
    assert backup.rows == {"public.changes": 40}
    assert (await service.verify(backup.id)).ok


async def test_kills_a_pg_restore_that_hangs(tmp_path: Path, database: Pool) -> None:
    service = make_service(tmp_path)
    backup = await make_backup(service, database, BackupRequest(schema_only=True))
    program = tmp_path / "pg_restore"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o700)
    with pytest.raises(BackupError, match=r"did not list .* within 0\.2 s"):
        await check_contents(backup, service.catalog.local.path / backup.file, tmp_path, timeout=0.2)
