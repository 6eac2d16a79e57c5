"""The lease, taken without waiting for it to be free."""

from __future__ import annotations

from utils.database import Pool
from utils.service.lease import NEXT_EPOCH, Fence

_FIRST = "INSERT INTO ops.leases (shard, holder, epoch) VALUES (0, '', 0) ON CONFLICT (shard) DO NOTHING"
#: Waits for transactions that have checked the former epoch; the UPDATE alone would not.
_LOCK = "SELECT FROM ops.leases WHERE shard = 0 FOR UPDATE"
_SEIZE = f"""
UPDATE ops.leases SET holder = $1, epoch = {NEXT_EPOCH.format(epoch="epoch", known="0")},
taken_at = clock_timestamp(), expires_at = NULL
WHERE shard = 0 RETURNING epoch
"""  # noqa: S608 - constants


async def seize(pool: Pool, name: str) -> Fence:
    """Take the lease at once, whoever holds it."""
    async with pool.transaction(isolation="read_committed") as connection:
        await connection.execute(_FIRST)
        await connection.execute(_LOCK)
        return Fence(name, await connection.fetchval(_SEIZE, name))
