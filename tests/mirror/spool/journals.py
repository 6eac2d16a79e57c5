"""Helpers for the journal tests: a journal with small segments and short pauses, filled and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.mirror.spool.journal import DiskPolicy, Journal

#: Bound for waits that normally take milliseconds, in seconds.
TIMEOUT = 20.0
#: Bytes per segment: a few records.
SEGMENT_BYTES = 200
POLICY = DiskPolicy(retry_seconds=0.001, retry_max_seconds=0.01, close_seconds=0.05)


async def open_journal(directory: Path, id: str = "ours", *, max_bytes: int = 2**20, **options: Any) -> Journal:
    return await Journal.open(directory, id, max_bytes=max_bytes, policy=POLICY, **options)


async def adopt(path: Path, policy: DiskPolicy = POLICY) -> Journal:
    """Adopt a journal, which must not be locked."""
    journal = await Journal.adopt(path, policy=policy)
    assert journal is not None, f"{path} is locked or missing"
    return journal


def payload(stamp: int) -> bytes:
    return b"event %d" % stamp


def append(journal: Journal, *stamps: int) -> None:
    for stamp in stamps:
        journal.append(stamp, payload(stamp))


async def write(journal: Journal, *stamps: int) -> None:
    """Append records and wait until they are on disk."""
    append(journal, *stamps)
    assert await journal.wait_written(TIMEOUT), journal.failure


async def read_stamps(journal: Journal, after: int = 0, limit: int = 10_000) -> list[int]:
    """Read records, check their payloads, and return their stamps."""
    records = await journal.read(after, limit)
    assert records == [(stamp, payload(stamp)) for stamp, _ in records]
    return [stamp for stamp, _ in records]


async def close_and_reread(journal: Journal) -> list[int]:
    """Close a journal, adopt it as another process does, and return its stamps; nothing may be damaged."""
    await journal.close(1.0)
    other = await adopt(journal.path)
    try:
        assert not other.damage
        assert other.records == len(await read_stamps(other))
        return await read_stamps(other)
    finally:
        await other.remove()


def segment_files(journal: Journal) -> list[Path]:
    return sorted(journal.path.glob("*.journal"))
