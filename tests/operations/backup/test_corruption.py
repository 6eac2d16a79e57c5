"""A backup with damaged files is refused with the reason, by verify and by restore."""

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

from tests.conftest import IS_EXHAUSTIVE
from tests.operations.backup.helpers import fill, make_backup, make_service, table_checksums
from utils.database import Pool
from utils.exceptions import BackupError
from utils.operations.backup.archive.manifest import Manifest, checksum_of, parse_manifest
from utils.operations.backup.service import BackupService

#: Number of random corruptions of a plain and of an encrypted backup, at least one of each kind, and their seed.
PLAIN, ENCRYPTED = (100, 20) if IS_EXHAUSTIVE else (28, 14)
SEED = 1_907

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

Damage = Callable[[random.Random, Path, Manifest, Manifest], None]


def flip_bit(rng: random.Random, file: Path) -> None:
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def truncate(rng: random.Random, file: Path) -> None:
    """Truncate it, perhaps to nothing."""
    content = file.read_bytes()
    file.write_bytes(content[: rng.choice((0, rng.randrange(len(content)), len(content) - 1))])


def append(rng: random.Random, file: Path) -> None:
    """Append some bytes; NUL, because white space after a manifest would change nothing."""
    with file.open("ab") as out:
        out.write(rng.randbytes(rng.randrange(1, 5_000)) + b"\0")


def zero(rng: random.Random, file: Path) -> None:
    """Overwrite a block with zeros, as a disk that lost power does."""
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content))
    block = slice(start, min(start + 4_096, len(content)))
    content[block] = bytes(b ^ 0xFF if not b and start + 1 == len(content) else 0 for b in content[block])
    if content == file.read_bytes():  # they were zeros already
        content[start] ^= 1
    file.write_bytes(content)


def delete(rng: random.Random, file: Path) -> None:
    """Delete it."""
    file.unlink()


def exchange(one: Path, other: Path) -> None:
    """Swap two files."""
    temporary = one.with_name("temporary")
    one.rename(temporary)
    other.rename(one)
    temporary.rename(other)


def damage_file(which: str, damage: Callable[[random.Random, Path], None]) -> Damage:
    """Return a function that damages the archive or the manifest."""

    def do(rng: random.Random, place: Path, one: Manifest, other: Manifest) -> None:
        damage(rng, place / (one.file if which == "archive" else f"{one.id}.json"))

    do.__name__ = f"{which} {damage.__name__}"
    return do


def swap_archives(rng: random.Random, place: Path, one: Manifest, other: Manifest) -> None:
    exchange(place / one.file, place / other.file)


def swap_manifests(rng: random.Random, place: Path, one: Manifest, other: Manifest) -> None:
    exchange(place / f"{one.id}.json", place / f"{other.id}.json")


def rewrite(**changes: Any) -> Damage:
    """Return a function that changes the manifest and its checksum."""

    def do(rng: random.Random, place: Path, one: Manifest, other: Manifest) -> None:
        content = orjson.loads(one.serialize()) | changes
        content.pop("seal")
        content = {name: value for name, value in content.items() if value is not ...}
        (place / f"{one.id}.json").write_bytes(orjson.dumps(content | {"seal": checksum_of(content)}))

    do.__name__ = f"rewrite {changes}"
    return do


RANDOM: list[Damage] = [
    damage_file(which, damage)
    for which in ("archive", "manifest")
    for damage in (flip_bit, flip_bit, truncate, append, zero, delete)
] + [swap_archives, swap_manifests]
#: Undamaged manifests of another project, or with impossible values.
INVALID: list[Damage] = [
    rewrite(project="somebody else's"), rewrite(project=None), rewrite(format=2), rewrite(format="1"),
    rewrite(file="../../etc/passwd"), rewrite(file="20260101T000000Z-abcdef.dump"), rewrite(size=-1),
    rewrite(sha256="0" * 64), rewrite(sha256=None), rewrite(size="large"), rewrite(rows=[1, 2]),
    rewrite(rows={"public.users": "many"}), rewrite(created_at="2026-01-01T00:00:00"), rewrite(created_at=7),
    rewrite(created_at="yesterday"), rewrite(server=""), rewrite(server=18), rewrite(id="latest"),
    rewrite(kind="half"), rewrite(reason=None), rewrite(unknown=True), rewrite(rows=...), rewrite(rows={}),
    rewrite(rows={"public.theirs": 5}), rewrite(ordered_at="2026-01-01T00:00:00"), rewrite(ordered_at=5),
]  # fmt: skip


async def check_refused(service: BackupService, database: Pool, id: str) -> list[str]:
    """Check that verify, restore and open refuse a backup, and return the messages of the first two."""
    messages = []
    with pytest.raises(BackupError) as error:
        await service.verify(id)
    messages.append(str(error.value))
    with pytest.raises(BackupError) as error:
        await service.restore(database, id)
    messages.append(str(error.value))
    with pytest.raises(BackupError):
        async with service.catalog.open(id, 18):
            pass
    await service.list()
    await service.prune(dry_run=True)
    return messages


async def corrupt_and_check(tmp_path: Path, database: Pool, number: int, damages: list[Damage], **given: Any) -> None:
    """Make two backups, and check that each of `number` corruptions of the first is refused."""
    await fill(database)
    service = make_service(tmp_path / "data", **given)
    one = await make_backup(service, database)
    await database.execute("UPDATE members SET nick = 'another'")  # so that the archives differ
    other = await make_backup(service, database)
    intact, place = tmp_path / "intact", service.catalog.local.path
    shutil.copytree(place, intact)
    before = await table_checksums(database.target)
    rng, seen = random.Random(SEED), set[str]()
    for turn in range(number):
        damage = damages[turn % len(damages)]
        shutil.rmtree(place)
        shutil.copytree(intact, place)
        damage(rng, place, one, other)
        try:
            for message in await check_refused(service, database, one.id):
                assert one.id in message or one.file in message, message
                assert len(message) < 700, message
        except BaseException as exc:
            exc.add_note(f"turn {turn} of seed {SEED}: {damage.__name__}")
            raise
        seen.add(damage.__name__)
    assert len(seen) == len({damage.__name__ for damage in damages})
    assert await table_checksums(database.target) == before
    shutil.rmtree(place)
    shutil.copytree(intact, place)
    assert (await service.verify(one.id)).ok, "the intact one is not refused"


async def test_refuses_random_corruptions(tmp_path: Path, database: Pool) -> None:
    await corrupt_and_check(tmp_path, database, PLAIN, RANDOM)


async def test_refuses_invalid_manifests(tmp_path: Path, database: Pool) -> None:
    await corrupt_and_check(tmp_path, database, len(INVALID), INVALID)


async def test_refuses_random_corruptions_of_an_encrypted_backup(tmp_path: Path, database: Pool) -> None:
    pyrage = pytest.importorskip("pyrage")
    identity = pyrage.x25519.Identity.generate()
    (tmp_path / "key").write_text(f"{identity}\n")
    given = {"backup_age_recipient": str(identity.to_public()), "backup_age_identity_file": tmp_path / "key"}
    await corrupt_and_check(tmp_path, database, ENCRYPTED, RANDOM, **given)


async def test_refuses_a_truncated_archive_with_a_fitting_manifest(tmp_path: Path, database: Pool) -> None:
    await fill(database)
    service = make_service(tmp_path)
    one = await make_backup(service, database)
    file = service.catalog.local.path / one.file
    content = file.read_bytes()[:500]
    digest = hashlib.sha256(content).hexdigest()
    file.write_bytes(content)
    forged = replace(one, size=len(content), sha256=digest, plain_size=len(content), plain_sha256=digest)
    await service.catalog.local.write(f"{one.id}.json", forged.serialize())
    with pytest.raises(BackupError, match="pg_restore cannot read"):
        await service.verify(one.id)


def test_a_manifest_round_trips() -> None:
    made = Manifest(
        "20260101T000000Z-abcdef", "2026-01-01T00:00:00.000+00:00", "full", "manual", "20260101T000000Z-abcdef.dump",
        5, "a" * 64, 5, "a" * 64, None, "guildbook", "18.4", "18.4", None, {"public.guilds": 1}, 0.5,
    )  # fmt: skip
    assert parse_manifest(made.serialize(), f"{made.id}.json") == made
