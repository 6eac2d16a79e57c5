"""Verify says of every place what it checked there, and what it did not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.operations.backup.making import filled, vault_in
from utils.database import Pool
from utils.exceptions import BackupError
from utils.operations.action import Step
from utils.operations.backup import tools, verify
from utils.operations.backup.create import Wanted
from utils.operations.backup.manifest import Manifest
from utils.operations.backup.service import BackupService

pyrage = pytest.importorskip("pyrage")


@pytest.fixture
def away(tmp_path: Path) -> Path:
    """A directory that stands for a place elsewhere."""
    return tmp_path / "away"


@pytest.fixture
def two(tmp_path: Path, away: Path) -> BackupService:
    """Backups here and there."""
    return vault_in(tmp_path / "here", backup_url=away.as_uri())


def said(data: Mapping[str, Any]) -> list[str]:
    return [str(line) for line in data["checks"]]


async def test_each_place_is_checked_and_named(database: Pool, two: BackupService, away: Path) -> None:
    await filled(database)
    made = await two.make(database, Wanted())
    steps: list[Step] = []
    outcome = await two.verify("latest", progress=steps.append)
    whole = f"{made.size:,} bytes with the right SHA-256, contents as the manifest says"
    assert said(outcome.data) == [f"{two.local.name}: {whole}", f"{away.as_uri()}: {whole}"]
    assert outcome.text.splitlines()[0] == f"backup {made.id} is whole"
    assert {step.text for step in steps} >= {"checking", "fetching", "reading the contents"}


async def test_the_place_that_is_damaged_is_named_and_the_other_one_serves(
    database: Pool, two: BackupService, away: Path, tmp_path: Path
) -> None:
    made = await two.make(database, Wanted())
    os.truncate(away / made.file, made.size - 1)
    with pytest.raises(BackupError, match=f"is damaged: it has {made.size - 1:,} bytes"):
        await two.verify(made.id)
    assert (await vault_in(tmp_path / "here").verify(made.id)).ok
    (two.local.path / made.file).unlink()
    with pytest.raises(BackupError, match=f"{made.file} is not in {two.local.path}"):
        await two.verify(made.id)


async def test_a_place_that_lacks_it_is_not_mentioned(database: Pool, two: BackupService, away: Path) -> None:
    made = await two.make(database, Wanted())
    (away / f"{made.id}.json").unlink()
    assert [line.split(": ")[0] for line in said((await two.verify(made.id)).data)] == [two.local.name]
    (two.local.path / f"{made.id}.json").unlink()
    with pytest.raises(BackupError, match=f"there is no backup {made.id}: there is none at all"):
        await two.verify(made.id)


async def test_without_the_identity_it_says_what_it_did_not_check(tmp_path: Path, database: Pool) -> None:
    identity = pyrage.x25519.Identity.generate()
    (tmp_path / "key").write_text(f"{identity}\n")
    blind = vault_in(tmp_path, backup_age_recipient=str(identity.to_public()))
    await blind.make(database, Wanted())
    assert "not decrypted, because BACKUP_AGE_IDENTITY_FILE is not set" in (await blind.verify("latest")).text
    able = vault_in(tmp_path, backup_age_identity_file=tmp_path / "key")
    assert "decrypted, contents as the manifest says" in (await able.verify("latest")).text
    assert list((tmp_path / "opened").iterdir()) == []


@pytest.mark.parametrize("wanted", [Wanted(tables=("members", "changes")), Wanted(schema_only=True)], ids=str)
async def test_partial_ones_can_be_verified_too(tmp_path: Path, database: Pool, wanted: Wanted) -> None:
    await filled(database)
    vault = vault_in(tmp_path)
    made = await vault.make(database, wanted)
    assert "contents as the manifest says" in (await vault.verify(made.id)).text


async def test_an_archive_without_a_table_that_was_counted_is_not_whole(tmp_path: Path, database: Pool) -> None:
    await filled(database)
    vault = vault_in(tmp_path)
    made = await vault.make(database, Wanted(tables=("users",)))
    more = {**made.rows, "public.members": 5, "public.changes": 0}
    with pytest.raises(BackupError, match=r"has no rows of public\.members, which the manifest counts"):
        await verify.readable(_with_rows(made, more), vault.local.path / made.file)


def _with_rows(made: Manifest, rows: dict[str, int]) -> Manifest:
    return replace(made, rows=rows)


async def test_rows_of_partitions_count_for_their_table(tmp_path: Path, database: Pool) -> None:
    await database.execute(
        "INSERT INTO changes (guild_id, table_name, key, action) SELECT 1, 'members', '{}', 'update'"
        " FROM generate_series(1, 40)"
    )
    vault = vault_in(tmp_path)
    made = await vault.make(database, Wanted(tables=("changes",)))
    assert made.rows == {"public.changes": 40}
    assert (await vault.verify(made.id)).ok


async def test_a_pg_restore_that_does_not_come_to_an_end_is_given_up(
    tmp_path: Path, database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = vault_in(tmp_path)
    made = await vault.make(database, Wanted(schema_only=True))
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    program = bin_dir / "pg_restore"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o700)

    async def found(major: int) -> Path:
        return bin_dir

    monkeypatch.setattr(tools, "found", found)
    monkeypatch.setattr(verify, "CONTENTS_SECONDS", 0.2)
    with pytest.raises(BackupError, match="did not list"):
        await vault.verify(made.id)
