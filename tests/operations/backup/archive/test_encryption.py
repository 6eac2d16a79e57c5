"""Encrypted backups: readable with the identity only, never unencrypted on disk, and never revealing the identity."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import stat
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.bot.running import run_cli
from tests.operations.backup.helpers import GUILD, fill, make_service
from utils.database import Pool
from utils.exceptions import BackupError
from utils.operations.backup.archive import encryption, pipeline
from utils.operations.backup.service import BackupService

pyrage = pytest.importorskip("pyrage")

#: First bytes of pg_dump's custom format, and of age's.
CUSTOM, AGE = b"PGDMP", b"age-encryption.org/v1\n"
#: Bytes that age encrypts at a time.
CHUNK = 1 << 16


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """An identity file as age-keygen writes it."""
    path, identity = tmp_path / "key", pyrage.x25519.Identity.generate()
    path.write_text(f"# created: 2026-01-01T00:00:00Z\n# public key: {identity.to_public()}\n{identity}\n")
    return path


def recipient(key: Path) -> str:
    """Return the recipient of the identity."""
    return key.read_text().splitlines()[1].removeprefix("# public key: ")


def secret(key: Path) -> str:
    """Return the identity itself."""
    return key.read_text().splitlines()[2]


def first_bytes(service: BackupService) -> dict[str, bytes]:
    """Return the first bytes of every backup file, hidden ones included."""
    files = [path for path in service.catalog.local.path.iterdir() if path.is_file()]
    return {path.name: path.read_bytes()[: len(AGE)] for path in files}


async def test_the_archive_is_never_unencrypted_on_disk(tmp_path: Path, database: Pool, key: Path) -> None:
    await fill(database)
    service = make_service(
        tmp_path, backup_age_recipient=recipient(key), backup_age_identity_file=key, drill_every="1d"
    )
    seen: list[bytes] = []
    await service.create(database, progress=lambda step: seen.extend(first_bytes(service).values()))
    manifest = (await service.catalog.find("latest")).manifest
    assert manifest is not None
    assert not [start for start in [*seen, *first_bytes(service).values()] if start.startswith(CUSTOM)]
    assert first_bytes(service)[manifest.file] == AGE
    assert (manifest.file, manifest.recipient) == (f"{manifest.id}.dump.age", recipient(key))
    assert manifest.size > manifest.plain_size
    assert manifest.sha256 != manifest.plain_sha256
    assert "encrypted" in manifest.line


async def test_keeps_one_unencrypted_copy_for_drills(tmp_path: Path, database: Pool, key: Path) -> None:
    service = make_service(tmp_path, backup_age_recipient=recipient(key), drill_every="1d")
    await database.execute(GUILD)
    for _ in range(2):
        await service.create(database)
    plaintext = [name for name, start in first_bytes(service).items() if start.startswith(CUSTOM)]
    newest = await service.catalog.find("latest")
    assert plaintext == [f".plain-{newest.id}"]
    assert stat.S_IMODE((service.catalog.local.path / plaintext[0]).stat().st_mode) == 0o600
    assert plaintext[0] not in await service.catalog.local.names()
    await make_service(tmp_path, backup_age_recipient=recipient(key)).create(database)
    assert plaintext[0] not in first_bytes(service), "no drill needs it any more"


async def test_decrypts_with_the_right_identity_only(tmp_path: Path, database: Pool, key: Path) -> None:
    await fill(database)
    await make_service(tmp_path, backup_age_recipient=recipient(key)).create(database)
    with_identity = make_service(tmp_path, backup_age_identity_file=key)
    assert (await with_identity.drill(database)).ok
    other = tmp_path / "other"
    other.write_text(f"{pyrage.x25519.Identity.generate()}\n")
    with pytest.raises(BackupError, match=r"age failed: .*[Nn]o matching"):
        await make_service(tmp_path, backup_age_identity_file=other).verify("latest")
    both = tmp_path / "both"
    both.write_text(f"{pyrage.x25519.Identity.generate()}\n{secret(key)}\n")
    assert "decrypted" in (await make_service(tmp_path, backup_age_identity_file=both).verify("latest")).text
    assert list((tmp_path / "opened").iterdir()) == []


async def test_invalid_identity_files_are_not_quoted(tmp_path: Path, database: Pool, key: Path) -> None:
    await database.execute(GUILD)
    await make_service(tmp_path, backup_age_recipient=recipient(key)).create(database)
    file = tmp_path / "typo"
    for content, message in (
        (secret(key)[:-1] + "!", "has a line that is not an age identity"),
        ("# nothing\n\n", "contains no age identity"),
        ("AGE-SECRET-KEY-\N{SNOWMAN}", "cannot be read"),
    ):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(BackupError, match=message) as error:
            await make_service(tmp_path, backup_age_identity_file=file).verify("latest")
        assert secret(key)[15:40] not in str(error.value)
    with pytest.raises(BackupError, match=r"nowhere cannot be read: No such file"):
        await make_service(tmp_path, backup_age_identity_file=tmp_path / "nowhere").verify("latest")


def test_the_identity_is_not_an_argument(key: Path) -> None:
    assert secret(key) not in " ".join(encryption.decrypt_command(key))


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 5_000_000])
async def test_round_trips_any_size(tmp_path: Path, key: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "in").write_bytes(content)
    await encrypt(tmp_path, key)
    [digest] = await decrypt(tmp_path, key)
    assert (tmp_path / "out").read_bytes() == content
    assert digest.size == size


@pytest.mark.parametrize("cut", [1, CHUNK // 2, CHUNK + 16, 2 * (CHUNK + 16)])
async def test_refuses_a_truncated_stream(tmp_path: Path, key: Path, cut: int) -> None:
    (tmp_path / "in").write_bytes(os.urandom(4 * CHUNK))
    await encrypt(tmp_path, key)
    os.truncate(tmp_path / "encrypted", (tmp_path / "encrypted").stat().st_size - cut)
    with pytest.raises(BackupError, match="age failed"):
        await decrypt(tmp_path, key)


async def encrypt(tmp_path: Path, key: Path) -> None:
    """Encrypt the file `in` into `encrypted`."""
    command = pipeline.Command(encryption.encrypt_command(recipient(key)), dict(os.environ))
    await pipeline.run([command], tmp_path / "encrypted", source=tmp_path / "in")


async def decrypt(tmp_path: Path, key: Path) -> list[pipeline.Digest]:
    """Decrypt the file `encrypted` into `out`."""
    command = pipeline.Command(encryption.decrypt_command(key), dict(os.environ))
    return await pipeline.run([command], tmp_path / "out", source=tmp_path / "encrypted")


async def test_killed_encryption_leaves_nothing(tmp_path: Path, database: Pool, key: Path) -> None:
    await fill(database)
    service = make_service(tmp_path, backup_age_recipient=recipient(key), drill_every="1d")
    async with database.transaction() as connection:
        await connection.execute("LOCK TABLE guilds")  # pg_dump waits for it, and age for pg_dump
        task = asyncio.create_task(service.create(database))
        age = await find_encryption()
        age.send_signal(signal.SIGKILL)
        with pytest.raises(BackupError, match="age failed"):
            async with asyncio.timeout(20):
                await task
    assert set(first_bytes(service)) <= {".lock"}
    assert (await service.create(database)).ok


async def find_encryption() -> psutil.Process:
    """Return the encrypting subprocess once it runs."""
    async with asyncio.timeout(20):
        while True:
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):  # another child has just ended
                    if encryption.__name__ in child.cmdline():
                        return child
            await asyncio.sleep(0.01)


@pytest.mark.slow
async def test_rejects_an_invalid_recipient(tmp_path: Path, database: Pool, database_url: str) -> None:
    wrong = "age1" + "q" * 58  # valid characters, wrong checksum
    variables = {"DATABASE_URL": database_url, "DATA_DIR": str(tmp_path / "data"), "BACKUP_AGE_RECIPIENT": wrong}
    code, output = await run_cli(tmp_path, "backup", "create", **variables)
    assert code == 1
    assert "age failed" in output
    assert not [path for path in (tmp_path / "data" / "backups").iterdir() if path.name != ".lock"]


async def test_verify_deletes_decrypted_files_in_a_thread(
    tmp_path: Path, database: Pool, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await database.execute(GUILD)
    await make_service(tmp_path, backup_age_recipient=recipient(key)).create(database)
    threads: list[threading.Thread] = []
    rmtree = shutil.rmtree

    def recording(*args: Any, **kwargs: Any) -> None:
        threads.append(threading.current_thread())
        rmtree(*args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", recording)
    await make_service(tmp_path, backup_age_identity_file=key).verify("latest")
    assert threads
    assert threading.current_thread() not in threads
    assert list((tmp_path / "opened").iterdir()) == []
