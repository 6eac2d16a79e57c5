"""Reads archives of backups without a database: downloads, compares with manifests, decrypts, and counts the rows."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from utils.exceptions import BackupError
from utils.operations.action import Progress, Step, ignore_progress
from utils.operations.backup.archive import encryption, pipeline
from utils.operations.backup.archive.manifest import Manifest
from utils.operations.backup.archive.objects import Name
from utils.operations.backup.archive.script import CONTENTS_SECONDS, list_contents, open_script, table_of
from utils.operations.backup.store import Remote, Store
from utils.text import format_count

#: Seconds between two progress reports.
PROGRESS_SECONDS = 0.25
#: Tables that an error message names; the others are counted.
LISTED_TABLES = 5
#: Lines of `pg_restore --list` that stand for the rows of a table: schema and name.
_TABLE_DATA = re.compile(r"^\d+; \d+ \d+ TABLE DATA (\S+) (.+) \S+$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Verification:
    """What the verification of one copy of a backup checked."""

    store: str
    #: Bytes whose SHA-256 was compared.
    size: int
    is_encrypted: bool
    #: False if it is encrypted and no identity was available: then only its checksum was compared.
    has_read_contents: bool
    #: Rows that were counted; None if they were not.
    rows: int | None = None

    def __str__(self) -> str:
        checksum = f"{self.store}: {self.size:,} bytes, SHA-256 correct"
        if not self.has_read_contents:
            return f"{checksum}; not decrypted, because BACKUP_AGE_IDENTITY_FILE is not set"
        checksum += ", decrypted" if self.is_encrypted else ""
        if self.rows is None:
            return f"{checksum}, table of contents matches the manifest; rows not counted (--deep does)"
        return f"{checksum}, {format_count(self.rows, 'row')} counted as in the manifest"


async def verified_file(store: Store, manifest: Manifest, directory: Path, progress: Progress) -> Path:
    """Return the archive as it is stored as a local file, after comparing its size and checksum."""
    progress(Step("verifying", 0, manifest.size, "bytes"))
    if isinstance(store, Remote):
        file = directory / "downloaded"
        digest = await store.download(manifest.file, file, progress)
    else:
        file = store.path / manifest.file
        try:
            digest = await asyncio.to_thread(pipeline.file_digest, file)
        except OSError as exc:
            raise BackupError(f"{file} cannot be read: {exc.strerror}: use another backup") from exc
    if (digest.size, digest.sha256) != (manifest.size, manifest.sha256):
        raise BackupError(
            f"{manifest.file} in {store.name} is damaged: it has {digest.size:,} bytes and SHA-256"
            f" {digest.sha256[:12]}…, expected {manifest.size:,} and {manifest.sha256[:12]}…: use another backup"
        )
    progress(Step("verifying", manifest.size, manifest.size, "bytes"))
    return file


async def decrypt(manifest: Manifest, file: Path, identity: Path, directory: Path, progress: Progress) -> Path:
    """Decrypt an archive into a directory and return the new file. Raises `BackupError` if it is damaged."""
    out = directory / "decrypted"
    command = pipeline.Command(encryption.decrypt_command(identity), dict(os.environ))
    [digest] = await pipeline.run([command], out, source=file, progress=progress, what="decrypting")
    if digest.sha256 != manifest.plain_sha256:
        raise BackupError(f"{manifest.file} is damaged: it does not decrypt to what was encrypted")
    return out


async def check_contents(manifest: Manifest, file: Path, tools: Path, *, timeout: float = CONTENTS_SECONDS) -> None:
    """List an unencrypted archive with pg_restore, and check that it has the rows that the manifest counts.

    `tools` is the directory of pg_restore. Raises `BackupError`.
    """
    contents = await list_contents(file, tools, name=manifest.file, timeout=timeout)
    tables = {f"{schema}.{name}" for schema, name in _TABLE_DATA.findall(contents)}
    # Partitions appear under their own names, which start with their table's.
    missing = [
        name
        for name, rows in manifest.rows.items()
        if rows and not any(table == name or table.startswith(f"{name}_") for table in tables)
    ]
    if missing:
        raise BackupError(f"{manifest.file} has no rows of {', '.join(missing[:5])}, which the manifest counts")


async def check_rows(manifest: Manifest, file: Path, tools: Path, *, progress: Progress = ignore_progress) -> None:
    """Decompress an archive, and check that every table has the rows that the manifest counts.

    file: the archive, not encrypted. tools: the directory of pg_restore. Raises `BackupError` that names the tables
    which differ, with both numbers.
    """
    found = await count_rows(file, tools, manifest.rows, total=manifest.total_rows, progress=progress)
    expected = dict.fromkeys(found, 0) | manifest.rows
    problems = differences(expected, {name: found.get(name, 0) for name in expected})
    if problems:
        raise BackupError(
            f"{manifest.file} does not have the rows that its manifest counts:"
            f" {'; '.join(problems[:LISTED_TABLES])}"
            f"{f' and {len(problems) - LISTED_TABLES} more' if len(problems) > LISTED_TABLES else ''}:"
            " use another backup"
        )


async def count_rows(
    file: Path,
    tools: Path,
    tables: Collection[str] = (),
    *,
    total: int | None = None,
    progress: Progress = ignore_progress,
) -> dict[str, int]:
    """Return the exact number of rows in an archive by `schema.table`, in bounded memory.

    file: the archive, not encrypted. tools: the directory of pg_restore. tables: those that partitions count with;
    otherwise a partition counts as a table. total: how many rows are expected, for the progress. Raises `BackupError`
    if the archive cannot be read to its end.
    """
    names: set[Name] = {(schema, table) for schema, _, table in (name.partition(".") for name in tables)}
    counts: dict[str, int] = {}
    rows, reported = 0, time.monotonic()
    progress(Step("counting rows", 0, total))
    async with open_script(file, tools) as script:
        while (header := await script.next_table()) is not None:
            name = ".".join(table_of(header.table, names) or header.table)
            counts.setdefault(name, 0)
            async for chunk in script.rows():
                number = chunk.count(b"\n")  # a line break in a value is escaped
                counts[name] += number
                rows += number
                if time.monotonic() - reported > PROGRESS_SECONDS:
                    reported = time.monotonic()
                    progress(Step("counting rows", rows, total))
    progress(Step("counting rows", rows, total))
    return counts


def differences(expected: Mapping[str, int], found: Mapping[str, int | None]) -> list[str]:
    """Return one line for each table, by `schema.table`, whose row count differs; None: there is no such table."""
    lines = []
    for name, rows in expected.items():
        actual = found.get(name)
        if actual != rows:
            lines.append(f"{name}: {'no table' if actual is None else format_count(actual, 'row')}, expected {rows:,}")
    return lines


@contextlib.asynccontextmanager
async def private_directory(parent: Path) -> AsyncIterator[Path]:
    """Yield a new directory in `parent` that only its owner can read, after deleting those of killed processes.

    In threads, because deleting a gigabyte can take a good part of a second. Raises `BackupError`.
    """
    directory = _private_directory(parent)
    path = await asyncio.to_thread(directory.__enter__)
    try:
        yield path
    finally:
        await asyncio.to_thread(directory.__exit__, None, None, None)


@contextlib.contextmanager
def _private_directory(parent: Path) -> Iterator[Path]:
    # Decrypted personal data is written there: it must not be left behind.
    try:
        parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for leftover in parent.iterdir():
            with contextlib.suppress(OSError), (leftover / "lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its owner is alive
                shutil.rmtree(leftover, ignore_errors=True)
        path = Path(tempfile.mkdtemp(dir=parent))
    except OSError as exc:
        raise BackupError(f"{parent} cannot be used: {exc.strerror}: choose another DATA_DIR") from exc
    try:
        with (path / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
