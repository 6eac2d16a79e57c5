"""Signing backups from before BACKUP_SIGNING_KEY was set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.operations.backup.catalog.test_identity import OURS, THEIRS, made_by
from tests.operations.backup.catalog.test_prune import write_backup
from tests.operations.backup.helpers import GUILD, make_backup, make_service, make_settings, run_backup_command
from utils.database import ConnectTarget, Pool
from utils.exceptions import BackupError, SettingsError
from utils.operations.backup.archive.manifest import Manifest
from utils.operations.backup.catalog.identity import Identity
from utils.operations.backup.service import BackupService

KEY = "hush-5up3r"


def signature(directory: Path, backup: Manifest) -> str | None:
    found: str | None = orjson.loads((directory / f"{backup.id}.json").read_bytes()).get("signature")
    return found


def two_stores(tmp_path: Path, **values: Any) -> BackupService:
    return make_service(tmp_path / "local", backup_url=(tmp_path / "remote").as_uri(), **values)


async def test_signs_every_copy_of_whole_backups(tmp_path: Path, database: Pool) -> None:
    await database.execute(GUILD)
    backups = [await make_backup(two_stores(tmp_path), database) for _ in range(2)]
    signed = two_stores(tmp_path, backup_signing_key=KEY)
    with pytest.raises(BackupError, match=r"sign it with python bot\.py backup sign"):
        await signed.verify(backups[0].id)
    newest = await signed.sign("latest")
    assert [each["id"] for each in newest.data["signed"]] == [backups[1].id] * 2
    one = await signed.sign(backups[0].id)
    assert one.ok
    assert {(each["id"], each["store"]) for each in one.data["signed"]} == {
        (backups[0].id, store.name) for store in signed.catalog.stores
    }
    assert "rows counted as in the manifest" in one.text
    rest = await signed.sign()
    assert (rest.ok, len(rest.data["signed"]), len(rest.data["already_signed"])) == (True, 0, 4)
    for backup in backups:
        assert (await signed.verify(backup.id)).ok
        assert signature(tmp_path / "remote", backup) == signature(tmp_path / "local" / "backups", backup)
    assert "2 signed already" not in (again := await signed.sign()).text
    assert (again.ok, again.data["signed"]) == (True, [])
    assert (await signed.restore(database, "latest")).ok


async def test_signs_no_damaged_copy_and_none_of_another_key(tmp_path: Path, database: Pool) -> None:
    await database.execute(GUILD)
    damaged, foreign = [await make_backup(two_stores(tmp_path), database) for _ in range(2)]
    path = tmp_path / "local" / "backups" / damaged.file
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    await two_stores(tmp_path, backup_signing_key="another").sign(foreign.id)
    by_another = signature(tmp_path / "remote", foreign)
    outcome = await two_stores(tmp_path, backup_signing_key=KEY).sign()
    assert not outcome.ok
    assert [(each["id"], each["store"]) for each in outcome.data["signed"]] == [
        (damaged.id, (tmp_path / "remote").as_uri())
    ]
    assert len(outcome.data["refused"]) == 3
    assert "is damaged" in outcome.text
    assert "is not signed with BACKUP_SIGNING_KEY" in outcome.text
    assert signature(tmp_path / "local" / "backups", damaged) is None
    assert signature(tmp_path / "remote", foreign) == by_another
    assert KEY not in outcome.text


async def test_signs_only_own_backups(tmp_path: Path) -> None:
    service = make_service(tmp_path, Identity(OURS, "db:5432", "guildbook"), backup_signing_key=KEY)
    theirs = made_by(THEIRS)
    await write_backup(service.catalog.local, theirs)
    outcome = await service.sign()
    assert (outcome.ok, outcome.data["foreign"], outcome.data["signed"]) == (True, [theirs.id], [])
    with pytest.raises(BackupError, match=f"is of database guildbook .* of application {THEIRS}, not of"):
        await service.sign(theirs.id)
    with pytest.raises(BackupError, match="there is no backup nothing"):
        await service.sign("nothing")
    with pytest.raises(SettingsError, match="BACKUP_SIGNING_KEY is not set"):
        await BackupService(make_settings(tmp_path)).sign()


@pytest.mark.slow
async def test_sign_command(tmp_path: Path, database: Pool, target: ConnectTarget) -> None:
    await database.execute(GUILD)
    backup = await make_backup(make_service(tmp_path), database)
    assert (await run_backup_command(tmp_path, target, "sign")).code == 2
    done = await run_backup_command(tmp_path, target, "sign", "--json", BACKUP_SIGNING_KEY=KEY)
    assert done.code == 0, done.err
    assert [each["id"] for each in orjson.loads(done.out)["signed"]] == [backup.id]
