"""An encrypted backup: to its recipient only, never in the clear on disk, and no word of the identity anywhere."""

from __future__ import annotations

import asyncio
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
from tests.operations.backup.making import filled, vault_in
from utils.database import Pool
from utils.exceptions import BackupError
from utils.operations.backup import encryption, pipeline
from utils.operations.backup.service import BackupService

pyrage = pytest.importorskip("pyrage")

#: How each begins: pg_dump's custom format, and age's.
CUSTOM, AGE = b"PGDMP", b"age-encryption.org/v1\n"
#: Bytes that age seals at a time.
CHUNK = 1 << 16


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A file with an identity, as age-keygen writes it."""
    path, identity = tmp_path / "key", pyrage.x25519.Identity.generate()
    path.write_text(f"# created: 2026-01-01T00:00:00Z\n# public key: {identity.to_public()}\n{identity}\n")
    return path


def recipient(key: Path) -> str:
    """Return whom to encrypt to."""
    return key.read_text().splitlines()[1].removeprefix("# public key: ")


def secret(key: Path) -> str:
    """Return the identity."""
    return key.read_text().splitlines()[2]


def beginnings(vault: BackupService) -> dict[str, bytes]:
    """Return how every file among the backups begins, hidden ones too."""
    files = [path for path in vault.local.path.iterdir() if path.is_file()]
    return {path.name: path.read_bytes()[: len(AGE)] for path in files}


async def test_the_archive_is_never_on_the_disk_in_the_clear(tmp_path: Path, database: Pool, key: Path) -> None:
    await filled(database)
    vault = vault_in(tmp_path, backup_age_recipient=recipient(key), backup_age_identity_file=key, drill_every="1d")
    seen: list[bytes] = []
    await vault.create(database, progress=lambda step: seen.extend(beginnings(vault).values()))
    manifest = (await vault.find("latest")).manifest
    assert manifest is not None
    assert not [begins for begins in [*seen, *beginnings(vault).values()] if begins.startswith(CUSTOM)]
    assert beginnings(vault)[manifest.file] == AGE
    assert (manifest.file, manifest.recipient) == (f"{manifest.id}.dump.age", recipient(key))
    assert manifest.size > manifest.plain_size
    assert manifest.sha256 != manifest.plain_sha256
    assert "encrypted" in manifest.line


async def test_only_drills_without_an_identity_keep_one_copy_from_before_it(
    tmp_path: Path, database: Pool, key: Path
) -> None:
    vault = vault_in(tmp_path, backup_age_recipient=recipient(key), drill_every="1d")
    for _ in range(2):
        await vault.create(database)
    clear = [name for name, begins in beginnings(vault).items() if begins.startswith(CUSTOM)]
    newest = await vault.find("latest")
    assert clear == [f".plain-{newest.id}"]
    assert stat.S_IMODE((vault.local.path / clear[0]).stat().st_mode) == 0o600
    assert clear[0] not in await vault.local.names()
    await vault_in(tmp_path, backup_age_recipient=recipient(key)).create(database)
    assert clear[0] not in beginnings(vault), "nothing asks for it any more"


async def test_it_comes_back_with_its_identity_and_with_no_other(tmp_path: Path, database: Pool, key: Path) -> None:
    await filled(database)
    await vault_in(tmp_path, backup_age_recipient=recipient(key)).create(database)
    able = vault_in(tmp_path, backup_age_identity_file=key)
    assert (await able.drill(database)).ok
    other = tmp_path / "other"
    other.write_text(f"{pyrage.x25519.Identity.generate()}\n")
    with pytest.raises(BackupError, match=r"age failed: .*[Nn]o matching"):
        await vault_in(tmp_path, backup_age_identity_file=other).verify("latest")
    both = tmp_path / "both"
    both.write_text(f"{pyrage.x25519.Identity.generate()}\n{secret(key)}\n")
    assert "decrypted" in (await vault_in(tmp_path, backup_age_identity_file=both).verify("latest")).text
    assert list((tmp_path / "opened").iterdir()) == []


async def test_a_file_that_holds_no_identity_is_told_without_a_word_of_it(
    tmp_path: Path, database: Pool, key: Path
) -> None:
    await vault_in(tmp_path, backup_age_recipient=recipient(key)).create(database)
    file = tmp_path / "typo"
    for content, told in (
        (secret(key)[:-1] + "!", "holds a line that is no age identity"),
        ("# nothing\n\n", "holds no age identity"),
        ("AGE-SECRET-KEY-\N{SNOWMAN}", "cannot be read"),
    ):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(BackupError, match=told) as error:
            await vault_in(tmp_path, backup_age_identity_file=file).verify("latest")
        assert secret(key)[15:40] not in str(error.value)
    with pytest.raises(BackupError, match=r"nowhere cannot be read: No such file"):
        await vault_in(tmp_path, backup_age_identity_file=tmp_path / "nowhere").verify("latest")


def test_the_identity_stands_in_no_process_list(key: Path) -> None:
    assert secret(key) not in " ".join(encryption.decryption(key))


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 5_000_000])
async def test_bytes_of_any_number_come_back(tmp_path: Path, key: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "in").write_bytes(content)
    await sealed(tmp_path, key)
    [passed] = await opened(tmp_path, key)
    assert (tmp_path / "out").read_bytes() == content
    assert passed.size == size


@pytest.mark.parametrize("cut", [1, CHUNK // 2, CHUNK + 16, 2 * (CHUNK + 16)])
async def test_a_stream_that_was_cut_does_not_pass_for_a_shorter_one(tmp_path: Path, key: Path, cut: int) -> None:
    (tmp_path / "in").write_bytes(os.urandom(4 * CHUNK))
    await sealed(tmp_path, key)
    os.truncate(tmp_path / "sealed", (tmp_path / "sealed").stat().st_size - cut)
    with pytest.raises(BackupError, match="age failed"):
        await opened(tmp_path, key)


async def sealed(tmp_path: Path, key: Path) -> None:
    """Encrypt the file `in`."""
    command = pipeline.Command(encryption.encryption(recipient(key)), dict(os.environ))
    await pipeline.run([command], tmp_path / "sealed", source=tmp_path / "in")


async def opened(tmp_path: Path, key: Path) -> list[pipeline.Passed]:
    """Decrypt it again."""
    command = pipeline.Command(encryption.decryption(key), dict(os.environ))
    return await pipeline.run([command], tmp_path / "out", source=tmp_path / "sealed")


async def test_nothing_is_left_when_the_encryption_is_killed(tmp_path: Path, database: Pool, key: Path) -> None:
    await filled(database)
    vault = vault_in(tmp_path, backup_age_recipient=recipient(key), drill_every="1d")
    async with database.transaction() as connection:
        await connection.execute("LOCK TABLE guilds")  # pg_dump waits for it, and age for pg_dump
        making = asyncio.create_task(vault.create(database))
        age = await encrypting()
        age.send_signal(signal.SIGKILL)
        with pytest.raises(BackupError, match="age failed"):
            async with asyncio.timeout(20):
                await making
    assert set(beginnings(vault)) <= {".lock"}
    assert (await vault.create(database)).ok


async def encrypting() -> psutil.Process:
    """Return the process that encrypts, once there is one."""
    async with asyncio.timeout(20):
        while True:
            for child in psutil.Process().children():
                if "utils.operations.backup.encryption" in child.cmdline():
                    return child
            await asyncio.sleep(0.01)


@pytest.mark.slow
async def test_a_recipient_that_is_none_is_refused_before_anything_is_written(
    tmp_path: Path, database: Pool, database_url: str
) -> None:
    wrong = "age1" + "q" * 58  # the right letters, and no right checksum
    variables = {"DATABASE_URL": database_url, "DATA_DIR": str(tmp_path / "data"), "BACKUP_AGE_RECIPIENT": wrong}
    code, output = await run_cli(tmp_path, "backup", "create", **variables)
    assert code == 1
    assert "age failed" in output
    assert not [path for path in (tmp_path / "data" / "backups").iterdir() if path.name != ".lock"]


async def test_what_verify_decrypted_is_removed_and_not_on_the_loops_thread(
    tmp_path: Path, database: Pool, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await vault_in(tmp_path, backup_age_recipient=recipient(key)).create(database)
    threads: list[threading.Thread] = []
    remove = shutil.rmtree

    def noted(*args: Any, **kwargs: Any) -> None:
        threads.append(threading.current_thread())
        remove(*args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", noted)
    await vault_in(tmp_path, backup_age_identity_file=key).verify("latest")
    assert threads
    assert threading.current_thread() not in threads
    assert list((tmp_path / "opened").iterdir()) == []
