"""Whether a backup is what it was when it was made."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping
from pathlib import Path

from utils.exceptions import BackupError
from utils.operations.action import Progress, Step, ignore_progress
from utils.operations.backup import encryption, tools
from utils.operations.backup.manifest import LARGEST, SUFFIX, Manifest, unpacked
from utils.operations.backup.pipeline import Command, Passed, checksum, run
from utils.operations.backup.store import Directory, Remote

#: Seconds for pg_restore to read an archive's table of contents.
CONTENTS_SECONDS = 300.0
_DATA = re.compile(r"^\d+; \d+ \d+ TABLE DATA (\S+) (.+) \S+$", re.MULTILINE)


async def manifest_of(store: Directory | Remote, id: str) -> Manifest:
    """Return the manifest of a backup. Raises `BackupError` when it is not there, or not whole."""
    name = f"{id}{SUFFIX}"
    content = await store.read(name, LARGEST + 1)
    if content is None:
        raise BackupError(f"{store.name} has no backup {id}: its manifest {name} is not there")
    if len(content) > LARGEST:
        raise BackupError(f"{name} is damaged: it is larger than any manifest")
    return unpacked(content, name)


def in_place(store: Directory | Remote, manifest: Manifest, names: Mapping[str, int]) -> None:
    """Look for the archive among a store's names and sizes. Raises `BackupError` when it is not there as it was."""
    size = names.get(manifest.file)
    if size is None:
        raise BackupError(f"backup {manifest.id} is not whole: its archive {manifest.file} is not in {store.name}")
    if size != manifest.size:
        raise BackupError(f"{manifest.file} is damaged: it has {size:,} bytes, the manifest says {manifest.size:,}")


async def checked(
    store: Directory | Remote, manifest: Manifest, *, keep: Path | None = None, progress: Progress = ignore_progress
) -> None:
    """Read the stored archive and compare it with the manifest; `keep`: where a remote one is brought to as well.

    Raises `BackupError` with what differs.
    """
    progress(Step("checking", 0, manifest.size, "bytes"))
    in_place(store, manifest, await store.names())
    if isinstance(store, Remote):
        reading = (
            store.checksum(manifest.file, progress) if keep is None else store.fetch(manifest.file, keep, progress)
        )
        found = await reading
    else:
        found = await _checksum(store.path / manifest.file)
    if found.sha256 != manifest.sha256:
        raise BackupError(
            f"{manifest.file} is damaged: its SHA-256 is {found.sha256[:12]}…, expected {manifest.sha256[:12]}…"
        )


async def _checksum(path: Path) -> Passed:
    try:
        return await asyncio.to_thread(checksum, path)
    except OSError as exc:
        raise BackupError(f"{path} cannot be read: {exc.strerror}") from exc


async def decrypted(
    manifest: Manifest, file: Path, identity: Path, out: Path, *, progress: Progress = ignore_progress
) -> None:
    """Decrypt an archive into a new file. Raises `BackupError` when it is not what was encrypted."""
    command = Command(encryption.decryption(identity), dict(os.environ))
    passed = await run([command], out, source=file, progress=progress, what="decrypting")
    if passed[0].sha256 != manifest.plain_sha256:
        raise BackupError(f"{manifest.file} decrypts to something else than was encrypted: it is damaged")


async def readable(manifest: Manifest, file: Path) -> None:
    """Have pg_restore read the contents of an archive in the clear, and compare them with the manifest.

    Raises `BackupError`.
    """
    directory = await tools.found(manifest.major)
    process = await asyncio.create_subprocess_exec(
        str(directory / "pg_restore"), "--list", str(file),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(CONTENTS_SECONDS):
            out, said = await process.communicate()
    except TimeoutError:
        raise BackupError(f"pg_restore did not list {manifest.file} within {CONTENTS_SECONDS:g} s") from None
    finally:
        await tools.ended(process)
    if process.returncode:
        words = " ".join(said.decode(errors="replace").split())[:300]
        raise BackupError(f"pg_restore cannot read {manifest.file}: {words}")
    held = {f"{schema}.{name}" for schema, name in _DATA.findall(out.decode(errors="replace"))}
    # Partitions stand in the archive under their own names, with their table's as a beginning.
    missing = [
        name
        for name, rows in manifest.rows.items()
        if rows and not any(one == name or one.startswith(f"{name}_") for one in held)
    ]
    if missing:
        raise BackupError(f"{manifest.file} has no rows of {', '.join(missing[:5])}, which the manifest counts")
