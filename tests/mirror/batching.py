"""Helpers of the tests of batches: processes that have batches, and are stopped or killed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tests.leases import seize
from tests.mirror.faults.test_database import refusing
from utils.database import Pool
from utils.mirror.batches import Batch, Batches
from utils.mirror.spool.journal import Journal
from utils.mirror.spool.queue import EventQueue, SpoolMode
from utils.mirror.write.replay import replay_journals
from utils.mirror.write.writer import FlushPolicy
from utils.service.lease import Fence
from utils.tasks import cancel_and_wait

TIMEOUT = 20.0
POLICY = FlushPolicy(retry_seconds=0.01, retry_max_seconds=0.05, spacing_seconds=0.0)
_numbers = itertools.count()


async def _nothing_to_flush() -> None:
    return


class BatchProcess:
    """A process that holds the lease and has batches. It replays what earlier ones left behind."""

    def __init__(self, batches: Batches, queue: EventQueue, fence: Fence, written: list[frozenset[str]]) -> None:
        self.batches = batches
        self.fence = fence
        #: What was passed to `on_written`.
        self.written = written
        self._queue = queue

    @classmethod
    async def start(
        cls,
        database: Pool,
        directory: Path,
        *,
        spool: SpoolMode = "outage",
        max_rows: int = 10_000,
        policy: FlushPolicy = POLICY,
    ) -> BatchProcess:
        fence = await seize(database, f"process-{os.getpid()}-{next(_numbers)}")
        journal = None if spool == "off" else await Journal.open(directory, fence.holder, max_bytes=2**26)
        queue = EventQueue(journal, spool=spool, max_rows=max_rows)
        await replay_journals(database, fence, directory, asyncio.Lock(), _nothing_to_flush)
        written: list[frozenset[str]] = []
        batches = Batches(
            database, fence, queue, policy, directory=directory, on_lost=lambda: None, on_written=written.append
        )
        return cls(batches, queue, fence, written)

    async def xp(self, *, size: int = 100, seconds: float = 3_600.0, cog: str = "Levels") -> Batch:
        """Open a batch that adds up `xp` in `member_stats`."""
        batch = self.batches.open(
            "member_stats", cog, "cogs.levels", size=size, seconds=seconds, increments=("xp", "message_count")
        )
        await batch.verify()
        return batch

    async def stop(self, *, timeout: float = TIMEOUT, flush: bool = True) -> None:
        await self.batches.stop(timeout, flush=flush)
        if self._queue.journal is not None:
            await self._queue.journal.close(TIMEOUT)

    async def kill(self) -> None:
        """End as a killed process does: what is not in a file is lost, and the locks are free."""
        writers = list(self.batches._writers.values())
        journals = [journal for writer in writers if (journal := writer.queue.journal) is not None]
        if self._queue.journal is not None:
            journals.append(self._queue.journal)
        await cancel_and_wait(writer._task for writer in writers)
        for journal in journals:
            await cancel_and_wait([task for task in (journal._writing,) if task is not None])
            journal._thread.shutdown(wait=True)
            journal._release()


@contextlib.asynccontextmanager
async def outage(database: Pool) -> AsyncIterator[None]:
    """Make the database read-only during the block."""
    async with refusing(database, "read-only"):
        yield
    await database.renew()  # its idle connections were terminated


@contextlib.asynccontextmanager
async def batch_process(database: Pool, directory: Path, **options: Any) -> AsyncIterator[BatchProcess]:
    process = await BatchProcess.start(database, directory, **options)
    try:
        yield process
    finally:
        await process.stop()


async def xp_of(database: Pool) -> dict[tuple[int, int], int]:
    """Return the xp by (guild id, user id)."""
    rows = await database.fetch("SELECT guild_id, user_id, xp FROM member_stats")
    return {(row["guild_id"], row["user_id"]): row["xp"] for row in rows}
