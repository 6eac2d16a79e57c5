"""Whatever happens to the files of a backup, it is refused with the reason, by verify and by restore alike."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.operations.backup.making import filled, vault_in
from tests.operations.backup.restoring import sums
from utils.database import Pool
from utils.exceptions import BackupError
from utils.operations.action import ignore_progress
from utils.operations.backup.create import Wanted
from utils.operations.backup.manifest import Manifest, _seal, unpacked
from utils.operations.backup.service import BackupService

#: How many corruptions of each kind of backup, and the seeds of their dice.
PLAIN, ENCRYPTED = 100, 20
SEED = 1_907

Damage = Callable[[random.Random, Path, Manifest, Manifest], None]


def flipped(dice: random.Random, file: Path) -> None:
    """Turn one bit over."""
    content = bytearray(file.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)


def cut(dice: random.Random, file: Path) -> None:
    """Leave a beginning of it, or nothing."""
    content = file.read_bytes()
    file.write_bytes(content[: dice.choice((0, dice.randrange(len(content)), len(content) - 1))])


def lengthened(dice: random.Random, file: Path) -> None:
    """Append some bytes; white space after a manifest would change nothing that it says."""
    with file.open("ab") as out:
        out.write(dice.randbytes(dice.randrange(1, 5_000)) + b"\0")


def zeroed(dice: random.Random, file: Path) -> None:
    """Turn a piece into zeros, as a disk that lost power does."""
    content = bytearray(file.read_bytes())
    start = dice.randrange(len(content))
    piece = slice(start, min(start + 4_096, len(content)))
    content[piece] = bytes(b ^ 0xFF if not b and start + 1 == len(content) else 0 for b in content[piece])
    if content == file.read_bytes():  # they were zeros: then something else
        content[start] ^= 1
    file.write_bytes(content)


def missing(dice: random.Random, file: Path) -> None:
    """Take it away."""
    file.unlink()


def exchanged(one: Path, other: Path) -> None:
    """Swap two files."""
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def to_one(which: str, damage: Callable[[random.Random, Path], None]) -> Damage:
    """Damage the archive or the manifest."""

    def do(dice: random.Random, place: Path, one: Manifest, other: Manifest) -> None:
        damage(dice, place / (one.file if which == "archive" else f"{one.id}.json"))

    do.__name__ = f"{which} {damage.__name__}"
    return do


def swapped_archives(dice: random.Random, place: Path, one: Manifest, other: Manifest) -> None:
    exchanged(place / one.file, place / other.file)


def swapped_manifests(dice: random.Random, place: Path, one: Manifest, other: Manifest) -> None:
    exchanged(place / f"{one.id}.json", place / f"{other.id}.json")


def rewritten(**changes: Any) -> Damage:
    """Put another manifest there, with a seal that fits it."""

    def do(dice: random.Random, place: Path, one: Manifest, other: Manifest) -> None:
        content = orjson.loads(one.packed()) | changes
        content.pop("seal")
        content = {name: value for name, value in content.items() if value is not ...}
        (place / f"{one.id}.json").write_bytes(orjson.dumps(content | {"seal": _seal(content)}))

    do.__name__ = f"rewritten {changes}"
    return do


ANY: list[Damage] = [
    to_one(which, damage) for which in ("archive", "manifest") for damage in (flipped, flipped, cut, lengthened, zeroed)
] + [to_one("archive", missing), to_one("manifest", missing), swapped_archives, swapped_manifests]  # fmt: skip
#: Manifests that are whole, and are not ours or say what cannot be.
STRANGE: list[Damage] = [
    rewritten(project="somebody else's"), rewritten(project=None), rewritten(format=2), rewritten(format="1"),
    rewritten(file="../../etc/passwd"), rewritten(file="20260101T000000Z-abcdef.dump"), rewritten(size=-1),
    rewritten(sha256="0" * 64), rewritten(sha256=None), rewritten(size="large"), rewritten(rows=[1, 2]),
    rewritten(rows={"public.users": "many"}), rewritten(created_at="2026-01-01T00:00:00"), rewritten(created_at=7),
    rewritten(created_at="yesterday"), rewritten(server=""), rewritten(server=18), rewritten(id="latest"),
    rewritten(kind="half"), rewritten(reason=None), rewritten(unknown=True), rewritten(rows=...),
]  # fmt: skip


async def refused(vault: BackupService, database: Pool, id: str) -> list[str]:
    """Return why verify, a restore and the listing refuse a backup; any error but theirs comes through."""
    reasons = []
    with pytest.raises(BackupError) as told:
        await vault.verify(id)
    reasons.append(str(told.value))
    with pytest.raises(BackupError) as told:
        await vault.restore(database, id)
    reasons.append(str(told.value))
    with pytest.raises(BackupError):
        async with vault.opened(id, 18, ignore_progress):
            pass
    await vault.listing()
    await vault.prune(dry_run=True)
    return reasons


async def corrupted(tmp_path: Path, database: Pool, number: int, damages: list[Damage], **given: Any) -> None:
    """Make two backups, corrupt the first one so many times, and see each refused."""
    await filled(database)
    vault = vault_in(tmp_path / "data", **given)
    one = await vault.make(database, Wanted())
    await database.execute("UPDATE members SET nick = 'another'")  # else both archives may be the same, byte by byte
    other = await vault.make(database, Wanted())
    whole, place = tmp_path / "whole", vault.local.path
    shutil.copytree(place, whole)
    before = await sums(database.target)
    dice, seen = random.Random(SEED), set[str]()
    for turn in range(number):
        damage = damages[turn % len(damages)]
        shutil.rmtree(place)
        shutil.copytree(whole, place)
        damage(dice, place, one, other)
        try:
            for reason in await refused(vault, database, one.id):
                assert one.id in reason or one.file in reason, reason
                assert len(reason) < 700, reason
        except BaseException as exc:
            exc.add_note(f"turn {turn} of seed {SEED}: {damage.__name__}")
            raise
        seen.add(damage.__name__)
    assert len(seen) == len({damage.__name__ for damage in damages})
    assert await sums(database.target) == before
    shutil.rmtree(place)
    shutil.copytree(whole, place)
    assert (await vault.verify(one.id)).ok, "and it is not that everything is refused"


@pytest.mark.slow
async def test_100_random_corruptions_are_all_refused_with_the_reason(tmp_path: Path, database: Pool) -> None:
    await corrupted(tmp_path, database, PLAIN, ANY)


async def test_22_manifests_that_are_not_ours_or_say_what_cannot_be_are_refused(tmp_path: Path, database: Pool) -> None:
    await corrupted(tmp_path, database, len(STRANGE), STRANGE)


async def test_20_random_corruptions_of_an_encrypted_backup_are_all_refused(tmp_path: Path, database: Pool) -> None:
    pyrage = pytest.importorskip("pyrage")
    identity = pyrage.x25519.Identity.generate()
    (tmp_path / "key").write_text(f"{identity}\n")
    given = {"backup_age_recipient": str(identity.to_public()), "backup_age_identity_file": tmp_path / "key"}
    await corrupted(tmp_path, database, ENCRYPTED, ANY, **given)


async def test_a_manifest_that_was_made_to_fit_a_cut_archive_does_not_save_it(tmp_path: Path, database: Pool) -> None:
    await filled(database)
    vault = vault_in(tmp_path)
    one = await vault.make(database, Wanted())
    file = vault.local.path / one.file
    content = file.read_bytes()[:500]
    digest = hashlib.sha256(content).hexdigest()
    file.write_bytes(content)
    forged = replace(one, size=len(content), sha256=digest, plain_size=len(content), plain_sha256=digest)
    await vault.local.write(f"{one.id}.json", forged.packed())
    with pytest.raises(BackupError, match="pg_restore cannot read"):
        await vault.verify(one.id)


def test_a_manifest_comes_back_as_it_was() -> None:
    made = Manifest(
        "20260101T000000Z-abcdef", "2026-01-01T00:00:00.000+00:00", "full", "manual", "20260101T000000Z-abcdef.dump",
        5, "a" * 64, 5, "a" * 64, None, "guildbook", "18.4", "18.4", None, {"public.users": 1}, 0.5,
    )  # fmt: skip
    assert unpacked(made.packed(), f"{made.id}.json") == made
