"""The change feed: reads committed changes back and dispatches them in order, as `MirrorChange` events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import stamina

from models import DISCORD_EPOCH_MS
from utils.database import Pool
from utils.database.sql import load_statements
from utils.exceptions import GuildbookError
from utils.logs import log_once
from utils.mirror.write import events

_log = logging.getLogger(__name__)

#: The row of `ops.positions` that holds the position of the feed.
JOURNAL = "change events"
#: What precedes the name of a listener, for the position of one that is ahead of others.
LISTENER_PREFIX = f"{JOURNAL}: "
#: Changes read and dispatched at once.
BATCH = 500
#: Least seconds between two reads.
SPACING_SECONDS = 0.1
#: Most seconds between two reads without a notice: other processes and psql write as well.
POLL_SECONDS = 1.0
#: Seconds after which a position that moved past no change is saved.
SAVE_SECONDS = 60.0
#: Time limit of the last save, when the feed is stopped.
STOP_SECONDS = 2.0
#: Delay before the first retry after an error; it doubles up to the maximum.
RETRY_SECONDS = 0.5
RETRY_MAX_SECONDS = 30.0

_STATEMENTS = load_statements(Path(__file__).with_name("change_feed.sql"))
_SELECT_HORIZON = _STATEMENTS["select_horizon"]
_SELECT_CHANGES = _STATEMENTS["select_changes"]
_SELECT_LISTENERS = _STATEMENTS["select_listeners"]

Action = Literal["create", "update", "remove", "return", "join", "leave", "ban", "unban"]


@dataclass(frozen=True, slots=True)
class MirrorChange:
    """One change of a mirrored row, one join, leave, ban or unban, or the creation of a channel, thread, role or guild.

    A guild counts as created when the bot is added to it. Members and users are not created: a member joins.
    """

    #: Unique and time-ordered; store the last one if a change must not be acted on twice.
    id: int
    #: The mirrored table; `member_events` for join, leave, ban and unban.
    table: str
    #: Primary key of the row, by column; `guild_id` and `user_id` for `member_events`.
    key: dict[str, Any]
    action: Action
    #: None for a user, who belongs to no guild.
    guild_id: int | None
    #: The user that the change is about; None if it is about no user.
    user_id: int | None
    #: The columns that changed, with their old and new values, times as ISO 8601; None for `member_events` and after an
    #: erasure. Of a creation, `before` is None and `after` has what Discord sent.
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    #: True if a listing or a snapshot proved it, false if Discord sent an event.
    inferred: bool
    #: When the change was written. Of a join, the time that Discord sends; of a leave, ban or unban, when it was
    #: received.
    at: datetime


class ChangeFeed:
    """Dispatches every committed change at least once, in the order of the ids, including those made while stopped.

    A change waits for transactions that began before it and also write history: a later commit may have a smaller id.
    Only the last batch before an unclean end is dispatched twice. Changes older than the partitions that are kept are
    not dispatched. The feed relies on the database's clock not being set back.
    """

    def __init__(
        self,
        pool: Pool,
        dispatch: Callable[[MirrorChange], None],
        *,
        has_listeners: Callable[[], bool],
        positions: Callable[[int], tuple[int, Mapping[str, int]]] = lambda read: (read, {}),
        wait_for_room: Callable[[], Awaitable[None]] | None = None,
        batch: int = BATCH,
        poll_seconds: float = POLL_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        """`dispatch` is called in the event loop and must not block it. Without listeners, changes are skipped.

        `positions` turns the id up to which changes were dispatched into the one up to which all listeners have been
        told, with the names of listeners that have been told of more. `wait_for_room` is awaited before each read.
        `batch`: changes read at once. `poll_seconds`: most seconds between two reads without a notice.
        `retry_seconds`: delay before the first retry after an error.
        """
        #: Every change up to this id has been dispatched or skipped; None before the first read.
        self.position: int | None = None
        #: Whether it has read everything and waits for a notice or the next poll.
        self.is_waiting: bool = False
        self._pool = pool
        self._dispatch = dispatch
        self._has_listeners = has_listeners
        self._positions = positions
        self._wait_for_room = wait_for_room
        #: Id of the last change that was dispatched.
        self._dispatched = 0
        self._batch = batch
        self._poll_seconds = poll_seconds
        self._retry_seconds = retry_seconds
        self._noticed = asyncio.Event()
        self._saved = 0
        self._saved_ahead: dict[str, int] = {}
        self._saved_at = time.monotonic()

    def notice(self) -> None:
        """Announce that something may have been committed; cheap enough to be called after every commit."""
        self._noticed.set()

    async def run(self) -> None:
        """Dispatch changes until cancelled; errors are logged and retried."""
        try:
            while True:
                if self._wait_for_room is not None:
                    await self._wait_for_room()
                was_noticed = self._noticed.is_set()
                self._noticed.clear()
                found, is_complete = await self._step_with_retries()
                if found == self._batch:
                    continue
                await asyncio.sleep(SPACING_SECONDS)
                # A notice may be about this very millisecond, or about a change that waits: both are visible soon.
                if is_complete and (found or not was_noticed):
                    await self._wait_for_notice()
        finally:
            await self._save_at_stop()

    async def _wait_for_notice(self) -> None:
        self.is_waiting = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self._poll_seconds - SPACING_SECONDS)):
                await self._noticed.wait()
        self.is_waiting = False

    async def _step_with_retries(self) -> tuple[int, bool]:
        async for attempt in stamina.retry_context(
            on=_should_retry, attempts=None, timeout=None, wait_initial=self._retry_seconds,
            wait_max=RETRY_MAX_SECONDS, wait_jitter=self._retry_seconds,
        ):  # fmt: skip
            with attempt:
                return await self.step()
        raise AssertionError("unreachable: there is no last attempt")

    async def step(self) -> tuple[int, bool]:
        """Dispatch one batch; return (changes dispatched, whether none had to wait for another transaction).

        Raises `DatabaseError` when the changes cannot be read or the position cannot be saved.
        """
        has_listeners = self._has_listeners()
        # A statement of its own: the later snapshot of the one that reads sees everything below the horizon.
        row = await self._pool.fetchrow(_SELECT_HORIZON, DISCORD_EPOCH_MS)
        assert row is not None
        present, horizon = row["present"], row["horizon"]
        if self.position is None:
            await self._load_position(horizon - 1)
        position = self.position
        assert position is not None
        if present < position:
            log_once(
                _log,
                "clock set back",
                "the database's clock was set back: changes are not dispatched until it has caught up",
            )
        records = []
        if has_listeners and position < horizon:
            records = await self._pool.fetch(_SELECT_CHANGES, position, horizon, self._batch)
        for record in records:
            self._dispatch_safely(MirrorChange(*record.values()))
            self._dispatched = record["id"]
        reached = records[-1]["id"] if len(records) == self._batch else horizon - 1
        self.position = max(position, reached)
        if self._saved < self._dispatched or time.monotonic() - self._saved_at > SAVE_SECONDS:
            await self._save()
        return len(records), horizon == present

    def _dispatch_safely(self, change: MirrorChange) -> None:
        try:
            self._dispatch(change)
        except Exception:
            _log.exception("could not dispatch a change", extra={"change": change.id, "table": change.table})

    async def _load_position(self, present: int) -> None:
        """Continue where the last process stopped; the very first start skips what is already there."""
        saved: int | None = await self._pool.fetchval(events.SELECT_POSITION, JOURNAL)
        self.position = present if saved is None else saved
        self._saved = saved or 0
        await self._save()

    async def _save(self) -> None:
        if self.position is not None and self.position > self._saved:
            position, ahead = self._positions(self.position)
            # Before the position of all: what was told would otherwise be told again after a kill in between.
            for name, told in ahead.items():
                if told > self._saved_ahead.get(name, 0):
                    await self._pool.execute(events.ADVANCE_POSITION, LISTENER_PREFIX + name, told)
                    self._saved_ahead[name] = told
            if position > self._saved:
                await self._pool.execute(events.ADVANCE_POSITION, JOURNAL, position)
                self._saved = position
        self._saved_at = time.monotonic()

    async def _save_at_stop(self) -> None:
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._save()
        except (GuildbookError, TimeoutError) as error:
            _log.info("could not save the position of the change feed; its last changes may repeat: %s", error)


async def read_listener_positions(pool: Pool) -> dict[str, int]:
    """Return up to which change each listener was told that was ahead of others when the last process ended."""
    rows = await pool.fetch(_SELECT_LISTENERS, LISTENER_PREFIX)
    return {row["journal"].removeprefix(LISTENER_PREFIX): row["position"] for row in rows}


def _should_retry(error: BaseException) -> bool:
    if not isinstance(error, Exception):
        return False  # cancelled
    known = isinstance(error, GuildbookError)
    _log.warning("could not read changes; they wait: %s", error, exc_info=None if known else error)
    return True
