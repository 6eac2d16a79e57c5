"""Prune deletes expired backups in both stores, and keeps what it cannot be sure of."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.operations.backup.helpers import EVERYONE, make_service
from utils.exceptions import BackupError
from utils.operations.backup.archive.manifest import Manifest
from utils.operations.backup.service import BackupService
from utils.operations.backup.store import Store

ARCHIVE = b"PGDMP, or whatever"
SHA256 = hashlib.sha256(ARCHIVE).hexdigest()
FULL = Manifest(
    "",
    "",
    "full",
    "manual",
    "",
    len(ARCHIVE),
    SHA256,
    1,
    SHA256,
    None,
    "guildbook",
    "18.4",
    "18.4",
    "0003",
    {"public.guilds": 2},
)
NEWEST_TWO = {"backup_keep": 2, "backup_keep_daily": 0, "backup_keep_weekly": 0, "backup_keep_monthly": 0}


def manifest(made_at: datetime, number: int = 0, **changes: Any) -> Manifest:
    """Return the manifest of a backup made at a time; the number replaces the random end of its id."""
    id = f"{made_at:%Y%m%dT%H%M%SZ}-{number:06x}"
    return replace(FULL, id=id, created_at=made_at.isoformat(timespec="milliseconds"), file=f"{id}.dump", **changes)


def hours_ago(hours: float, **changes: Any) -> Manifest:
    return manifest(datetime.now(UTC) - timedelta(hours=hours), **changes)


def service_with_two_stores(tmp_path: Path, **values: int) -> BackupService:
    return make_service(tmp_path / "local", EVERYONE, backup_url=(tmp_path / "remote").as_uri(), **values)


async def write_backup(store: Store, backup: Manifest, content: bytes = ARCHIVE) -> None:
    await store.write(backup.file, content)
    await store.write(f"{backup.id}.json", backup.serialize())


async def remaining_files(service: BackupService) -> set[str]:
    """Return the files in both stores, which must be the same."""
    local, remote = [set(await store.names()) for store in service.catalog.stores]
    assert local == remote
    return local


async def test_deletes_in_both_stores_but_nothing_in_a_dry_run(tmp_path: Path) -> None:
    service = service_with_two_stores(tmp_path, **NEWEST_TWO)
    first, second, third, fourth = (hours_ago(hours) for hours in (1, 2, 300, 400))
    safety_copy = hours_ago(5, reason="before restore")
    for store in service.catalog.stores:
        for backup in (first, second, third, fourth, safety_copy):
            await write_backup(store, backup)
            await store.write(f"{backup.id}.drill.json", b"{}")
    before = await remaining_files(service)
    dry = await service.prune(dry_run=True)
    assert await remaining_files(service) == before
    assert "2 of 5 backups would be deleted" in dry.text
    pruned = await service.prune()
    assert {name.split(".")[0] for name in await remaining_files(service)} == {first.id, second.id, safety_copy.id}
    assert pruned.data["deleted"] == dry.data["deleted"] == [third.id, fourth.id]
    assert (await service.prune()).data["deleted"] == []


async def test_damaged_backups_neither_count_nor_go(tmp_path: Path) -> None:
    service = service_with_two_stores(tmp_path, **NEWEST_TWO | {"backup_keep": 1})
    without_archive, truncated, intact, old = (hours_ago(hours) for hours in (1, 2, 3, 4))
    for store in service.catalog.stores:
        for backup in (without_archive, truncated, intact, old):
            await write_backup(store, backup, ARCHIVE[:5] if backup is truncated else ARCHIVE)
        await store.delete(without_archive.file)
    lines = (await service.list()).text
    assert f"DAMAGED: backup {without_archive.id} is incomplete: its archive {without_archive.file} is not in" in lines
    assert f"DAMAGED: {truncated.file} in {service.catalog.local.name} is damaged: it has 5 bytes" in lines
    assert (await service.prune()).data["deleted"] == [old.id]
    assert f"{intact.id}.dump" in await remaining_files(service)


async def test_lists_damage_in_one_of_two_stores(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    service = service_with_two_stores(tmp_path)
    backup = hours_ago(1)
    for store in service.catalog.stores:
        await write_backup(store, backup)
    (service.catalog.local.path / f"{backup.id}.json").write_bytes(b"{")
    [entry] = await service.catalog.entries()
    assert entry.manifest == backup
    assert "is damaged" in entry.line
    assert (await service.catalog.find("latest")).id == backup.id
    assert "are skipped" not in caplog.text, "another copy of it is intact"
    with pytest.raises(BackupError, match="is damaged"):
        await service.verify(backup.id)


async def test_deletes_archives_without_a_manifest_after_a_day(tmp_path: Path) -> None:
    service = service_with_two_stores(tmp_path)
    recent, old, foreign = hours_ago(20), hours_ago(30), "notes.txt"
    for store in service.catalog.stores:
        for name in (recent.file, old.file, f"{old.id}.dump.age", foreign):
            await store.write(name, ARCHIVE)
    await service.prune()
    assert await remaining_files(service) == {recent.file, foreign}, "one may still be uploading, the other is not ours"


async def test_the_later_of_two_in_one_second_is_the_latest(tmp_path: Path) -> None:
    service = service_with_two_stores(tmp_path)
    now = datetime(2026, 11, 21, 11, 30, tzinfo=UTC)
    earlier, later = manifest(now, 0xFFFFFF), manifest(now + timedelta(milliseconds=400), 1)
    for store in service.catalog.stores:
        await write_backup(store, earlier)
        await write_backup(store, later)
    assert (await service.catalog.find("latest")).id == later.id
    assert [entry.id for entry in await service.catalog.entries()] == [later.id, earlier.id]
