"""Background work of the process that holds the lease: replay abandoned journals, prune ids of counted messages."""

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
from utils.mirror.records.batch_rows import BatchRow, is_batch_row
from utils.mirror.records.events import Event, Membership
from utils.mirror.records.rows import COUNTER_BITS, Entry, Key
from utils.mirror.spool.journal import Journal, list_journals
from utils.mirror.spool.queue import decode_records
from utils.mirror.write import events
from utils.mirror.write.batch import EventBatch
from utils.mirror.write.batch_rows import write_batch_rows
from utils.mirror.write.dead_letters import write_events_isolated
from utils.service.lease import Fence

_log = logging.getLogger(__name__)

#: Events replayed in one transaction.
TRANSACTION_EVENTS = 500
#: Seconds between two searches for abandoned journals.
SEARCH_SECONDS = 5.0
#: How long the ids of counted messages are kept, and the seconds between two prunings.
COUNTED_HOURS = 24
PRUNE_SECONDS = 3_600.0
#: Ids deleted in one statement, so that no statement takes long.
PRUNED_AT_ONCE = 10_000


async def keep_replaying(
    pool: Pool,
    fence: Fence,
    directory: Path,
    lock: asyncio.Lock,
    flush: Callable[[], Awaitable[None]],
    *,
    seconds: float = SEARCH_SECONDS,
    on_lost: Callable[[], None] = lambda: None,
) -> None:
    """Replay abandoned journals every `seconds`: a process that lost its lease may end long after.

    `on_lost` is called when the lease must be taken anew, see `replay_journals`.
    """
    while True:
        await asyncio.sleep(seconds)
        try:
            await replay_journals(pool, fence, directory, lock, flush)
        except LeaseLost as error:
            _log.warning("%s", error)
            on_lost()
            return
        except GuildbookError as error:  # the next search is the retry, at a fixed interval
            _log.warning("could not replay abandoned journals: %s", error)


async def replay_journals(
    pool: Pool, fence: Fence, directory: Path, lock: asyncio.Lock, flush: Callable[[], Awaitable[None]]
) -> int:
    """Write the journals of processes that have ended, remove them, and return how many events were new.

    The journal of a live process is left alone. `flush` writes what this process has received: an event that both
    processes received is recognised by what the tables hold. Raises `DatabaseError` when the database cannot take the
    events now; what was not written stays in its journal. Raises `LeaseLost` for a journal that is not older than this
    process's lease: its rows would outrank what is observed from now on, so the lease must be taken anew.
    """
    written = 0
    for path in await asyncio.to_thread(list_journals, directory, except_id=fence.holder):
        journal = await Journal.adopt(path)
        if journal is None:
            continue
        try:
            if (epoch := journal.last >> COUNTER_BITS) >= fence.epoch:
                raise LeaseLost(f"journal {journal.id} has epoch {epoch}, our lease has {fence.epoch}: take it anew")
            if await _has_batch_rows(journal):
                await _replay_batch_rows(pool, fence, journal)
            else:
                await flush()
                written += await _replay(pool, fence, journal, lock)
        finally:
            await journal.close(1.0)
    return written


async def _replay(pool: Pool, fence: Fence, journal: Journal, lock: asyncio.Lock) -> int:
    position = read = written = 0
    memberships = await _read_memberships(journal)
    while True:
        oldest = decode_records(await journal.read(position, TRANSACTION_EVENTS))
        if not oldest.upto:
            break
        people = {(event.guild_id, event.user_id) for event in oldest.events if isinstance(event, Membership)}
        context = [
            event for person in people for event in memberships[person] if not position < event.stamp <= oldest.upto
        ]
        async with lock:
            batch = EventBatch(journal.id, oldest.events, oldest.upto, context=context)
            written += await write_events_isolated(pool, fence, batch, _rows_of(oldest.events))
        position = oldest.upto
        read += len(oldest.events)
    await journal.remove()
    # After the files: with the position deleted and the files still there, every event would be written again.
    await pool.execute(events.DELETE_POSITION, journal.id)
    _log.info("journal replayed", extra={"journal": journal.id, "events": read, "new": written})
    return written


async def _has_batch_rows(journal: Journal) -> bool:
    return any(is_batch_row(payload) for _, payload in await journal.read(0, 1))


async def _replay_batch_rows(pool: Pool, fence: Fence, journal: Journal) -> None:
    """Write rows that cogs added to batches; the cogs need not be loaded."""
    position = 0
    while records := await journal.read(position, TRANSACTION_EVENTS):
        position = records[-1][0]
        await write_batch_rows(pool, fence, journal.id, [BatchRow(*record) for record in records], position)
    rows = journal.records
    await journal.remove()
    await pool.execute(events.DELETE_POSITION, journal.id)  # after the files, as in `_replay`
    _log.info("journal of a batch replayed", extra={"journal": journal.id, "rows": rows})


async def _read_memberships(journal: Journal) -> dict[tuple[int, int], list[Membership]]:
    """Return a journal's joins, leaves and bans by (guild id, user id); they are few beside the messages."""
    memberships: dict[tuple[int, int], list[Membership]] = defaultdict(list)
    oldest = decode_records(await journal.read(0, TRANSACTION_EVENTS))
    while oldest.upto:
        for event in oldest.events:
            if isinstance(event, Membership):
                memberships[event.guild_id, event.user_id].append(event)
        oldest = decode_records(await journal.read(oldest.upto, TRANSACTION_EVENTS))
    return memberships


def _rows_of(replayed: Sequence[Event]) -> dict[tuple[str, Key], Entry]:
    """Return the member rows that joins and leaves imply: the rows themselves were in the lost buffer.

    Without the row of a member who joined and left since, no listing could prove the leave.
    """
    rows: dict[tuple[str, Key], Entry] = {}
    for event in replayed:
        if isinstance(event, Membership) and event.kind in ("join", "leave"):
            has_joined = event.kind == "join"
            values = {"joined_at": event.at, "left_at": None} if has_joined else {"left_at": event.at}
            slot = ("members", (event.guild_id, event.user_id))
            entry = Entry(values, has_joined, event.stamp)
            rows[slot] = rows[slot].merged_with(entry) if slot in rows else entry
    return rows


async def keep_pruning(pool: Pool, fence: Fence) -> None:
    """Delete the ids of messages counted more than `COUNTED_HOURS` ago, once an hour, a few at a time."""
    while True:
        try:
            oldest = id_at(pool.now() - timedelta(hours=COUNTED_HOURS))
            while await _prune(pool, fence, oldest):
                pass
        except LeaseLost:
            return
        except GuildbookError as error:  # the next pruning is the retry, at a fixed interval
            _log.warning("could not prune the ids of counted messages: %s", error)
        await asyncio.sleep(PRUNE_SECONDS)


async def _prune(pool: Pool, fence: Fence, oldest: int) -> bool:
    """Delete some ids below `oldest` and return whether there were any."""
    async with pool.transaction() as connection:
        await fence.check(connection)
        status = await connection.execute(events.PRUNE_COUNTED_MESSAGES, oldest, PRUNED_AT_ONCE)
        return status != "DELETE 0"
