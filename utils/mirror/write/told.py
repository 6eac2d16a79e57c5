"""Events on their way into the database, apart from everything else: replayed journals, and batches with a bad one."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from utils.database import Pool
from utils.exceptions import DatabaseError
from utils.mirror.records.events import Event, Membership
from utils.mirror.records.rows import Entry, Key
from utils.mirror.write import event_sql
from utils.mirror.write.apply import Batch, Told, apply
from utils.mirror.write.dead_letters import bury_event, is_about_rows, isolate
from utils.service.lease import Fence


async def write_told(
    database: Pool, fence: Fence, told: Told, entries: Mapping[tuple[str, Key], Entry] | None = None
) -> int:
    """Write events and the position that they reach, and rows with them; what is refused becomes a dead letter.

    Returns how many events were new. Raises `DatabaseError` when nothing of it is at fault, `LeaseLost` when another
    process acts.
    """
    try:
        return (await apply(database, Batch(told=told, entries=entries or {}), fence)).events
    except DatabaseError as error:
        if not is_about_rows(error):
            raise
    written = 0

    async def write(part: Sequence[Event]) -> None:
        nonlocal written
        rest = set(told.events).difference(part)
        beside = [event for event in told.events if isinstance(event, Membership) and event in rest]
        piece = Told(told.journal, list(part), part[-1].stamp, beside=[*beside, *told.beside])
        written += (await apply(database, Batch(told=piece), fence)).events

    async def bury(event: Event, error: Exception) -> None:
        async with database.transaction() as connection:
            await fence.check(connection)
            await bury_event(connection, event, error)
            await connection.execute(event_sql.ADVANCE, told.journal, event.stamp)

    await isolate(told.events, write, bury)
    if entries:  # what is at fault is no event: without a row the reconcile knows all that there is to know
        with contextlib.suppress(DatabaseError):
            await apply(database, Batch(entries=entries), fence)
    return written
