"""Which process acts: every start takes the shard over, and its epoch orders all it observes after the former one's."""

from __future__ import annotations

import os
import secrets
import socket

from utils.database import Database

#: One process serves all shards, so one row stands for them.
SHARD = 0

_TAKE = """
INSERT INTO ops.leases AS lease (shard, holder, epoch) VALUES ($1, $2, 1)
ON CONFLICT (shard) DO UPDATE SET epoch = lease.epoch + 1, holder = excluded.holder, taken_at = now()
RETURNING epoch
"""


def holder() -> str:
    """Return a name for this process that no other one has."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"


async def take(database: Database, name: str) -> int:
    """Take the shard over and return the new epoch. Raises `DatabaseError`."""
    epoch: int = await database.fetchval(_TAKE, SHARD, name)
    return epoch
