"""A restore that is killed at any point leaves the old database or the new one, whole, and the next one works."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from pathlib import Path
from typing import Any

from tests.operations.backup.restoring import asking, cleaned, databases, dumped, put_down, sums, tell, typed
from utils.database import ConnectTarget, Pool
from utils.database.embedded import EmbeddedServer
from utils.operations.backup import scratch
from utils.operations.development import seed

#: Restores that are killed at a statement, and at a time.
AT_STATEMENTS, AT_TIMES = 12, 10


async def take_part(target: ConnectTarget) -> None:
    """Do what a bot does at its start: nothing that the killed one held may be in its way."""
    async with asyncio.timeout(30), asking(target) as connection:
        await connection.execute(
            "INSERT INTO ops.leases (shard, holder, epoch) VALUES (0, 'next', 1) ON CONFLICT (shard) DO UPDATE SET"
            " epoch = leases.epoch + 1"
        )


async def test_one_of_both_is_there_whole_wherever_it_is_killed(
    tmp_path: Path, server: EmbeddedServer, database: Pool
) -> None:
    rng = random.Random(2026)
    target = database.target
    await seed.seed(database, guilds=2, members=100)
    new = await sums(target)
    put_down(tmp_path, await dumped(server, target, tmp_path / "dump"))
    came: set[str] = set()
    async with cleaned(target):
        started = time.monotonic()
        whole = await typed(tmp_path, target, "restore", "latest", "--yes", KILL_AT="0")
        seconds = time.monotonic() - started
        assert whole.code == 0, whole
        statements = int(whole.err.split()[-1])
        # The last third is where the databases change places; what comes before only prepares.
        late = range(statements * 2 // 3, statements)
        points = [*rng.sample(range(1, statements), AT_STATEMENTS - 4), *rng.sample(late, 4)]
        kills: list[dict[str, Any]] = [{"KILL_AT": str(point)} for point in points]
        kills += [{"kill_after": rng.uniform(0.2, 1.0) * seconds} for _ in range(AT_TIMES)]
        for number, kill in enumerate(kills):
            await tell(target, f"INSERT INTO guilds (id, name) VALUES ({number + 1}, 'since')")  # noqa: S608
            old = await sums(target)
            ended = await typed(tmp_path, target, "restore", "latest", "--yes", **kill)
            assert ended.code in (0, -signal.SIGKILL), ended
            found = await sums(target)
            came.add("old" if found == old else "new" if found == new else f"neither, {kill}")
            await take_part(target)
        assert came == {"old", "new"}
        last = await typed(tmp_path, target, "restore", "latest", "--yes", "--json")
        assert last.code == 0, last
        assert await sums(target) == new
        assert await databases(target, scratch.RESTORE) == []
        assert await databases(target, scratch.BEFORE) == [json.loads(last.out)["before"]]
