"""What has to be done beside the mirror: journals that others left behind, and ids that are no longer needed."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from pathlib import Path

from utils.database import Pool
from utils.database.partitions import id_at
from utils.exceptions import GuildbookError, LeaseLost
from utils.mirror.records.events import Event, Membership
from utils.mirror.records.rows import Entry, Key
from utils.mirror.spool.journal import Journal, list_journals
from utils.mirror.spool.queue import decode_records
from utils.mirror.write import event_sql
from utils.mirror.write.apply import Told
from utils.mirror.write.told import write_told
from utils.service.lease import Fence

_log = logging.getLogger(__name__)

#: Events replayed in one transaction.
REPLAYED_AT_ONCE = 500
#: Seconds between two looks for journals whose process has ended meanwhile.
LOOK_SECONDS = 5.0
#: Seconds between two prunings.
PRUNE_SECONDS = 3_600.0


async def replay_all(
    database: Pool, fence: Fence, directory: Path, lock: asyncio.Lock, flush: Callable[[], Awaitable[None]]
) -> int:
    """Write what ended processes left in their journals, and remove those; return how many events were new.

    A journal whose process is alive is left alone. `flush` writes what this process has heard: of what both heard, a
    replay is compared with what stands in the tables. Raises `DatabaseError` when the database cannot take them now:
    what was not written stays where it is.
    """
    written = 0
    for path in await asyncio.to_thread(list_journals, directory, except_id=fence.holder):
        journal = await Journal.adopt(path)
        if journal is None:
            continue
        try:
            await flush()
            written += await _replay(database, fence, journal, lock)
        finally:
            await journal.close(1.0)
    return written


async def _replay(database: Pool, fence: Fence, journal: Journal, lock: asyncio.Lock) -> int:
    position = seen = written = 0
    memberships = await _memberships(journal)
    while True:
        oldest = decode_records(await journal.read(position, REPLAYED_AT_ONCE))
        if not oldest.upto:
            break
        people = {(event.guild_id, event.user_id) for event in oldest.events if isinstance(event, Membership)}
        beside = [
            event for person in people for event in memberships[person] if not position < event.stamp <= oldest.upto
        ]
        async with lock:
            told = Told(journal.id, oldest.events, oldest.upto, beside=beside)
            written += await write_told(database, fence, told, _rows(oldest.events))
        position = oldest.upto
        seen += len(oldest.events)
    await journal.remove()
    # Not before: with the files still there and the position gone, all of it would be written once more.
    await database.execute(event_sql.FORGET_JOURNAL, journal.id)
    _log.info("a journal was replayed", extra={"journal": journal.id, "events": seen, "new": written})
    return written


def _rows(events: Sequence[Event]) -> dict[tuple[str, Key], Entry]:
    """Return what joins and leaves say of members: the rows that went with them were in a buffer that is gone.

    Without the row of somebody who joined and left since, no listing could prove that they left.
    """
    rows: dict[tuple[str, Key], Entry] = {}
    for event in events:
        if isinstance(event, Membership) and event.kind in ("join", "leave"):
            has_joined = event.kind == "join"
            values = {"joined_at": event.at, "left_at": None} if has_joined else {"left_at": event.at}
            slot = ("members", (event.guild_id, event.user_id))
            entry = Entry(values, has_joined, event.stamp)
            rows[slot] = rows[slot].merged_with(entry) if slot in rows else entry
    return rows


async def _memberships(journal: Journal) -> dict[tuple[int, int], list[Membership]]:
    """Return a journal's joins, leaves and bans by person; they are few beside the messages."""
    found: dict[tuple[int, int], list[Membership]] = defaultdict(list)
    oldest = decode_records(await journal.read(0, REPLAYED_AT_ONCE))
    while oldest.upto:
        for event in oldest.events:
            if isinstance(event, Membership):
                found[event.guild_id, event.user_id].append(event)
        oldest = decode_records(await journal.read(oldest.upto, REPLAYED_AT_ONCE))
    return found


async def keep_replaying(
    database: Pool, fence: Fence, directory: Path, lock: asyncio.Lock, flush: Callable[[], Awaitable[None]]
) -> None:
    """Look for journals left behind again and again: a process that lost its lease may end long after."""
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        try:
            await replay_all(database, fence, directory, lock, flush)
        except LeaseLost:
            return
        except GuildbookError as error:
            _log.warning("journals that others left wait: %s", error)


async def keep_pruning(database: Pool, fence: Fence) -> None:
    """Delete the ids of messages counted more than a day ago, once an hour, a few at a time."""
    while True:
        try:
            oldest = id_at(database.now() - timedelta(hours=event_sql.COUNTED_HOURS))
            while await _prune(database, fence, oldest):
                pass
        except LeaseLost:
            return
        except GuildbookError as error:
            _log.warning("ids of counted messages were not pruned: %s", error)
        await asyncio.sleep(PRUNE_SECONDS)


async def _prune(database: Pool, fence: Fence, oldest: int) -> bool:
    """Delete some ids below `oldest`; False when there were none."""
    async with database.transaction() as connection:
        await fence.check(connection)
        return await connection.execute(event_sql.PRUNE, oldest) != "DELETE 0"
