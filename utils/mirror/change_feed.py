"""What the mirror wrote, read back after its commit and handed out in order: changes of rows, comings and goings."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from models import DISCORD_EPOCH_MS
from utils.database import Pool
from utils.exceptions import GuildbookError
from utils.logs import log_once
from utils.mirror.write import event_sql

_log = logging.getLogger(__name__)

#: The row of `ops.positions` that says how far the changes have been handed out.
JOURNAL = "change events"
#: Changes read and handed out at once.
BATCH = 500
#: Seconds between two reads at least.
PACE_SECONDS = 0.1
#: Seconds between two reads when nobody said that there is something: other processes and psql write as well.
POLL_SECONDS = 1.0
#: Seconds after which a position that moved past nothing is saved.
SAVE_SECONDS = 60.0
#: Seconds for the last save, when it ends.
END_SECONDS = 2.0
#: Seconds before the next try after an error, doubled each time up to the second figure.
RETRY_SECONDS = 0.5
RETRY_MAX_SECONDS = 30.0

Action = Literal["update", "remove", "return", "join", "leave", "ban", "unban"]

# A transaction that inserts holds ROW EXCLUSIVE on the table from before it asks the clock for its first id until after
# it can be seen. So whatever is not yet to be seen has an id from the start of the oldest of those on. Whether a
# backend has a transaction id would not tell: it gets one with its first row, which is after its first id. A start
# that is hidden (another role's, or it ended just now) counts as the beginning of time: nothing is passed.
#: Parameter: `DISCORD_EPOCH_MS`. Answers the ids of now and of the horizon, both rounded as `models.base.time_id` does.
_HORIZON = (
    "WITH writers AS (SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'relation' AND granted "
    "AND mode = 'RowExclusiveLock' "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
    "AND relation IN ('changes'::regclass, 'user_changes'::regclass, 'member_events'::regclass)), "
    "moments AS (SELECT now() AS present, least(now(), (SELECT min(coalesce(xact_start, to_timestamp(0))) "
    "FROM writers LEFT JOIN pg_stat_activity USING (pid))) AS horizon) "
    "SELECT ((extract(epoch FROM present) * 1000)::bigint - $1::bigint) << 22 AS present, "
    "((extract(epoch FROM horizon) * 1000)::bigint - $1::bigint) << 22 AS horizon FROM moments"
)
#: Parameters: the position, the horizon, how many at most.
_READ = (
    "SELECT * FROM ("
    "(SELECT id, table_name, key, action, guild_id, user_id, before, after, inferred, at FROM changes "
    "WHERE id > $1 AND id < $2 ORDER BY id LIMIT $3) UNION ALL "
    "(SELECT id, table_name, key, action, NULL, user_id, before, after, inferred, at FROM user_changes "
    "WHERE id > $1 AND id < $2 ORDER BY id LIMIT $3) UNION ALL "
    "(SELECT id, 'member_events', jsonb_build_object('guild_id', guild_id, 'user_id', user_id), kind, guild_id, "
    "user_id, NULL, NULL, inferred, at FROM member_events "
    "WHERE id > $1 AND id < $2 ORDER BY id LIMIT $3)) AS told ORDER BY id LIMIT $3"
)


@dataclass(frozen=True, slots=True)
class MirrorChange:
    """One change of a mirrored row, or one coming or going of a member."""

    #: Time-ordered, and no other change has it: whoever must not act twice keeps the last one.
    id: int
    #: The mirrored table; 'member_events' for join, leave, ban and unban.
    table: str
    #: Primary key of the row, column by column; of comings and goings `guild_id` and `user_id`.
    key: dict[str, Any]
    action: Action
    #: None for a user, who belongs to no guild.
    guild_id: int | None
    #: The person whom it is about; None for what is about nobody.
    user_id: int | None
    #: The columns that changed, as they were and as they are since, times as ISO 8601; None for comings and goings, and
    #: after an erasure.
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    #: True when a listing or a snapshot proved it, false when Discord told of it as it happened.
    inferred: bool
    #: When it was written; of a join what Discord says, of other comings and goings when they were heard of.
    at: datetime


class ChangeFeed:
    """Hands out every committed change at least once, in the order of their ids, also those made while nobody ran.

    A change waits for the transactions that began before it and write history too: a later commit may have a smaller
    id. Twice comes only what the process that ended had handed out last. What is older than the partitions that are
    kept is not there. It counts on the database's clock not being set back.
    """

    def __init__(self, database: Pool, dispatch: Callable[[MirrorChange], None], *, wanted: Callable[[], bool]) -> None:
        """`dispatch` is called in the event loop and must not block it; `wanted` tells whether anybody listens."""
        #: All up to this id has been handed out, or was not wanted; None before the first read.
        self.position: int | None = None
        self._database = database
        self._dispatch = dispatch
        self._wanted = wanted
        self._noticed = asyncio.Event()
        self._saved = 0
        self._saved_at = time.monotonic()

    def notice(self) -> None:
        """Say that something may have been committed; cheap, to be called after every commit."""
        self._noticed.set()

    async def run(self) -> None:
        """Hand out changes until cancelled; what goes wrong is logged and tried again."""
        retry = RETRY_SECONDS
        try:
            while True:
                was_noticed = self._noticed.is_set()
                self._noticed.clear()
                try:
                    found, is_complete = await self.step()
                except Exception as error:
                    known = isinstance(error, GuildbookError)
                    _log.warning("changes wait to be handed out: %s", error, exc_info=None if known else error)
                    await asyncio.sleep(retry)
                    retry = min(retry * 2, RETRY_MAX_SECONDS)
                    continue
                retry = RETRY_SECONDS
                if found == BATCH:
                    continue
                await asyncio.sleep(PACE_SECONDS)
                # What was noticed may be of this very millisecond, or waits for others: it is there in a moment.
                if is_complete and (found or not was_noticed):
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(POLL_SECONDS - PACE_SECONDS):
                            await self._noticed.wait()
        finally:
            await self._end()

    async def step(self) -> tuple[int, bool]:
        """Hand out up to `BATCH` changes; return how many, and whether none had to wait for others.

        Raises `DatabaseError` when the database cannot be read or the position not be saved.
        """
        database = self._database
        wanted = self._wanted()
        # A statement of its own, before the one that reads: its snapshot is younger, so it sees all below the horizon.
        row = await database.fetchrow(_HORIZON, DISCORD_EPOCH_MS)
        assert row is not None
        present, horizon = row["present"], row["horizon"]
        if self.position is None:
            await self._begin(horizon - 1)
        position = self.position
        assert position is not None
        if present < position:
            log_once(
                _log,
                "clock set back",
                "the database's clock was set back: changes made until it has caught up are not handed out",
            )
        records = await database.fetch(_READ, position, horizon, BATCH) if wanted and position < horizon else []
        for record in records:
            self._hand_out(MirrorChange(*record.values()))
        upto = records[-1]["id"] if len(records) == BATCH else horizon - 1
        self.position = max(position, upto)
        if records or time.monotonic() - self._saved_at > SAVE_SECONDS:
            await self._save()
        return len(records), horizon == present

    def _hand_out(self, change: MirrorChange) -> None:
        try:
            self._dispatch(change)
        except Exception:
            _log.exception("a change could not be handed out", extra={"change": change.id, "table": change.table})

    async def _begin(self, present: int) -> None:
        """Take up where the last process left; at the very first start what is there already is no news."""
        saved: int | None = await self._database.fetchval(event_sql.POSITION, JOURNAL)
        self.position = present if saved is None else saved
        self._saved = saved or 0
        await self._save()

    async def _save(self) -> None:
        if self.position is not None and self.position > self._saved:
            position = self.position
            await self._database.execute(event_sql.ADVANCE, JOURNAL, position)
            self._saved = position
        self._saved_at = time.monotonic()

    async def _end(self) -> None:
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._save()
        except (GuildbookError, TimeoutError) as error:
            _log.info("the last changes may be handed out once more: %s", error)
