"""Members for the benchmarks: records as the mirror makes them of Discord's pages."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

from utils.database import Pool
from utils.mirror.spool.queue import EventQueue
from utils.mirror.translate.pages import Page, Record
from utils.mirror.write.writer import FlushPolicy, MirrorWriter
from utils.service.lease import Fence

GUILD_ID = 81_384_788_765_712_384
PAGE = 1_000
_ROLES = [GUILD_ID + (index << 22) for index in range(1, 60)]


def records(count: int, stamp: int, *, changed: float = 0.0, seed: int = 5) -> tuple[list[Record], list[Record]]:
    """Return user and member records in the random order of ids in which op 8 shows them; `changed` is a fraction."""
    rng = random.Random(seed)
    changes = random.Random(seed + 1)
    start = datetime(2019, 1, 1, tzinfo=UTC)
    users: list[Record] = []
    members: list[Record] = []
    for index in range(count):
        user_id = (rng.getrandbits(41) << 22) | index
        mark = "*" if changes.random() < changed else ""
        avatar = f"{rng.getrandbits(128):032x}" if index % 3 else None
        global_name = f"Member number {index}" if index % 4 else None
        users.append((user_id, f"member_{index}{mark}", "0", global_name, avatar, False, False, index % 512, stamp))
        roles = sorted(rng.sample(_ROLES, rng.randint(0, 5)))
        nick = f"nick of {index}{mark}" if index % 5 == 0 or mark else None
        joined = start + timedelta(seconds=index * 97)
        boosting = joined if index % 50 == 0 else None
        members.append((GUILD_ID, user_id, nick, None, roles, joined, boosting, None, False, 0, None, stamp))
    return users, members


def pages(users: Sequence[Record], members: Sequence[Record]) -> Iterator[Page]:
    """Yield the records in pages of a thousand."""
    for start in range(0, len(users), PAGE):
        cut = slice(start, start + PAGE)
        yield Page(list(users[cut]), list(members[cut]), seen=len(users[cut]))


def memory_queue() -> EventQueue:
    """Return a queue of events that is in memory alone."""
    return EventQueue(None, spool="off", max_rows=15_000)


async def writer_of(database: Pool) -> MirrorWriter:
    """Return the writer of a process that acts."""
    fence = await seize(database, "a benchmark")
    return MirrorWriter(
        database, fence, memory_queue(), FlushPolicy(), on_lost=lambda: None, on_dropped=lambda guilds: None
    )


_FIRST = "INSERT INTO ops.leases (shard, holder, epoch) VALUES (0, '', 0) ON CONFLICT (shard) DO NOTHING"
#: Waits for transactions that have checked the former epoch; the UPDATE alone would not.
_LOCK = "SELECT FROM ops.leases WHERE shard = 0 FOR UPDATE"
_SEIZE = """
UPDATE ops.leases SET holder = $1, epoch = epoch + 1, taken_at = clock_timestamp(), expires_at = NULL
WHERE shard = 0 RETURNING epoch
"""


async def seize(pool: Pool, name: str) -> Fence:
    """Take the lease at once, whoever holds it."""
    async with pool.transaction(isolation="read_committed") as connection:
        await connection.execute(_FIRST)
        await connection.execute(_LOCK)
        return Fence(name, await connection.fetchval(_SEIZE, name))
