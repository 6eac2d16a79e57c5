"""Backups as they are made are what a restore takes; what is not whole, not full or not readable is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.operations.backup.restoring import cleaned, sums
from utils.database import Pool
from utils.exceptions import BackupError
from utils.operations.action import ignore_progress
from utils.operations.backup import create, drill
from utils.operations.backup.kept import Kept
from utils.operations.backup.restore import restore
from utils.operations.development import seed
from utils.settings import Settings


def settings(directory: Path, **given: object) -> Settings:
    return Settings(_env_file=None, data_dir=directory, **given)  # type: ignore[call-arg,arg-type]


@pytest.fixture
async def saved(tmp_path: Path, database: Pool) -> str:
    """The id of a backup of two guilds."""
    await seed.seed(database, guilds=2, members=60)
    return await Kept(settings(tmp_path)).save(database, "manual", ignore_progress)


async def test_a_backup_that_was_made_comes_back_and_is_drilled(tmp_path: Path, database: Pool, saved: str) -> None:
    kept = Kept(settings(tmp_path))
    wanted = await sums(database.target)
    await database.execute("DELETE FROM members")
    newest = await kept.newest()
    assert newest is not None
    assert newest.id == saved
    async with cleaned(database.target):
        drilled = await drill.drill(database, kept)
        assert drilled.ok, drilled.text
        assert await drill.last_drill(kept, saved) is not None
        done = await restore(database, kept, saved)
        assert done.ok, done.text
        assert await sums(database.target) == wanted
        assert await Kept(settings(tmp_path)).newest() != newest, "what was there was backed up before"
    assert list((tmp_path / "opened").iterdir()) == []


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
async def test_an_archive_that_is_not_as_it_was_is_refused(
    tmp_path: Path, database: Pool, saved: str, damage: str
) -> None:
    file = tmp_path / "backups" / f"{saved}.dump"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flipped" else content[:-10])
    wanted = await sums(database.target)
    with pytest.raises(BackupError, match="is not there" if damage == "gone" else "is damaged"):
        await restore(database, Kept(settings(tmp_path)), saved)
    assert await sums(database.target) == wanted


async def test_a_partial_backup_and_one_of_a_newer_server_are_refused(
    tmp_path: Path, database: Pool, saved: str
) -> None:
    kept = Kept(settings(tmp_path))
    partial = await create.create(database, create.Places(kept.local), create.Wanted(tables=("guilds",)))
    with pytest.raises(BackupError, match="partial"):
        await restore(database, kept, partial.id)
    with pytest.raises(BackupError, match="newer"):
        async with kept.opened(saved, 15, ignore_progress):
            pass
    with pytest.raises(BackupError, match="no backup nothing"):
        await restore(database, kept, "nothing")


async def test_an_encrypted_backup_needs_the_identity(tmp_path: Path, database: Pool) -> None:
    pyrage = pytest.importorskip("pyrage")
    await seed.seed(database, guilds=1, members=20)
    identity = pyrage.x25519.Identity.generate()
    (tmp_path / "key").write_text(f"# mine\n{identity}\n")
    sealed = settings(tmp_path, backup_age_recipient=str(identity.to_public()))
    saved = await Kept(sealed).save(database, "manual", ignore_progress)
    with pytest.raises(BackupError, match="BACKUP_AGE_IDENTITY_FILE"):
        await drill.drill(database, Kept(sealed), saved)
    able = sealed.model_copy(update={"backup_age_identity_file": tmp_path / "key"})
    done = await drill.drill(database, Kept(able), saved)
    assert done.ok, done.text
    assert list((tmp_path / "opened").iterdir()) == []
