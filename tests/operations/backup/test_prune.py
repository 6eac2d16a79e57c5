"""What prune deletes, in both places, and what it goes by when a backup is not whole."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.operations.backup.making import vault_in
from utils.exceptions import BackupError
from utils.operations.backup.manifest import Manifest
from utils.operations.backup.retention import Rules, kept
from utils.operations.backup.service import BackupService
from utils.operations.backup.store import Directory, Remote

NOW = datetime(2026, 11, 21, 11, 30, tzinfo=UTC)
ARCHIVE = b"PGDMP, or whatever"
FULL = Manifest(
    "", "", "full", "manual", "", len(ARCHIVE), "a" * 64, 1, "a" * 64, None, "guildbook", "18.4", "18.4", "0003", {}
)
FEW = {"backup_keep": 2, "backup_keep_daily": 0, "backup_keep_weekly": 0, "backup_keep_monthly": 0}


def made(at: datetime, number: int = 0, **changes: Any) -> Manifest:
    """Return a backup of a moment; its number stands where chance does."""
    id = f"{at:%Y%m%dT%H%M%SZ}-{number:06x}"
    return replace(FULL, id=id, created_at=at.isoformat(timespec="milliseconds"), file=f"{id}.dump", **changes)


def ago(hours: float, **changes: Any) -> Manifest:
    """Return a backup of so many hours before the present, which prune goes by."""
    return made(datetime.now(UTC) - timedelta(hours=hours), **changes)


def both(tmp_path: Path, **given: int) -> BackupService:
    """Return backups in a directory and in one that obstore reaches."""
    return vault_in(tmp_path / "near", backup_url=(tmp_path / "far").as_uri(), **given)


async def stored(store: Directory | Remote, manifest: Manifest, content: bytes = ARCHIVE) -> None:
    """Put a backup there."""
    await store.write(manifest.file, content)
    await store.write(f"{manifest.id}.json", manifest.packed())


async def left(vault: BackupService) -> set[str]:
    """Return what is left in both places, which must be the same."""
    local, remote = [set(await store.names()) for store in vault.stores]
    assert local == remote
    return local


@given(
    st.lists(st.integers(0, 24 * 500), max_size=40),
    st.builds(Rules, st.integers(1, 8), st.integers(0, 9), st.integers(0, 6), st.integers(0, 14)),
)
def test_the_last_of_each_promised_day_week_and_month_stays(hours: list[int], rules: Rules) -> None:
    full = [made(NOW - timedelta(hours=before), number) for number, before in enumerate(hours)]
    stays = kept(full, rules, NOW)
    in_time = sorted(full, key=lambda one: (one.made_at, one.id))
    assert {one.id for one in in_time[-rules.newest :]} <= stays
    for number, form in ((rules.daily, "%Y-%m-%d"), (rules.weekly, "%G-%V"), (rules.monthly, "%Y-%m")):
        last = {one.made_at.strftime(form): one.id for one in in_time}  # later ones take the place of earlier ones
        assert {last[period] for period in sorted(last, reverse=True)[:number]} <= stays


async def test_prune_deletes_in_both_places_and_a_rehearsal_nothing(tmp_path: Path) -> None:
    vault = both(tmp_path, **FEW)
    first, second, third, fourth = (ago(hours) for hours in (1, 2, 300, 400))
    safety = ago(5, reason="before restore")
    for store in vault.stores:
        for manifest in (first, second, third, fourth, safety):
            await stored(store, manifest)
            await store.write(f"{manifest.id}.drill.json", b"{}")
    before = await left(vault)
    rehearsed = await vault.prune(dry_run=True)
    assert await left(vault) == before
    assert "2 of 5 backups would be deleted" in rehearsed.text
    done = await vault.prune()
    assert {name.split(".")[0] for name in await left(vault)} == {first.id, second.id, safety.id}
    assert done.data["deleted"] == rehearsed.data["deleted"] == [third.id, fourth.id]
    assert (await vault.prune()).data["deleted"] == []


async def test_a_backup_without_its_whole_archive_takes_no_whole_ones_place(tmp_path: Path) -> None:
    vault = both(tmp_path, **FEW | {"backup_keep": 1})
    hollow, cut, whole, old = (ago(hours) for hours in (1, 2, 3, 4))
    for store in vault.stores:
        for manifest in (hollow, cut, whole, old):
            await stored(store, manifest, ARCHIVE[:5] if manifest is cut else ARCHIVE)
        await store.delete(hollow.file)
    listed = (await vault.listing()).text
    assert f"DAMAGED: backup {hollow.id} is not whole: its archive {hollow.file} is not in" in listed
    assert f"DAMAGED: {cut.file} is damaged: it has 5 bytes" in listed
    assert (await vault.prune()).data["deleted"] == [old.id]
    assert f"{whole.id}.dump" in await left(vault)


async def test_one_that_is_damaged_near_and_whole_far_away_is_shown_as_both(tmp_path: Path) -> None:
    vault = both(tmp_path)
    one = ago(1)
    for store in vault.stores:
        await stored(store, one)
    (vault.local.path / f"{one.id}.json").write_bytes(b"{")
    [entry] = await vault.known()
    assert entry.manifest == one
    assert "is damaged" in entry.line
    with pytest.raises(BackupError, match="is damaged"):
        await vault.verify(one.id)


async def test_archives_whose_manifest_never_came_are_swept_away_after_a_day(tmp_path: Path) -> None:
    vault = both(tmp_path)
    young, old, mine = ago(20), ago(30), "notes.txt"
    for store in vault.stores:
        for name in (young.file, old.file, f"{old.id}.dump.age", mine):
            await store.write(name, ARCHIVE)
    await vault.prune()
    assert await left(vault) == {young.file, mine}, "one may be under way still, and the other is somebody else's"


async def test_the_later_one_of_two_in_one_second_is_the_newest(tmp_path: Path) -> None:
    vault = both(tmp_path)
    earlier, later = made(NOW, 0xFFFFFF), made(NOW + timedelta(milliseconds=400), 1)
    for store in vault.stores:
        await stored(store, earlier)
        await stored(store, later)
    assert (await vault.find("latest")).id == later.id
    assert [entry.id for entry in await vault.known()] == [later.id, earlier.id]
    assert kept([earlier, later], Rules(1), NOW) == {later.id}, "ids say the second, then chance"
