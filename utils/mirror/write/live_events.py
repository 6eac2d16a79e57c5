"""What the gateway reported of members and users, handed on once it is committed, with the rows before and after."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson

from models import Part, part_of
from utils.database import Pool
from utils.database.sql import load_statements
from utils.exceptions import DatabaseUnavailable
from utils.logs import log_once
from utils.mirror.records.rows import Entry, Key, Row, table_of
from utils.service import metrics

_log = logging.getLogger(__name__)

_STATEMENTS = load_statements(Path(__file__).with_name("live_events.sql"))
_SELECT_MEMBERS = _STATEMENTS["select_members"]
_SELECT_USERS = _STATEMENTS["select_users"]

Slot = tuple[str, Key]
Values = Mapping[str, Any]
#: What a dispatch says of a member; of a user it can only be an update.
Kind = Literal["join", "update", "leave"]


@dataclass(frozen=True, slots=True)
class MemberChange:
    """One dispatch about a member: an update that changed the row, or a leave (`after` is None)."""

    #: Of the dispatch, as in rows.
    stamp: int
    guild_id: int
    user_id: int
    #: The row of `members` as it was; for a leave without the row's columns if the database had no row.
    before: Values
    after: Values | None
    #: The row of `users` afterwards; None if the database has none.
    user: Values | None


@dataclass(frozen=True, slots=True)
class UserChange:
    """One dispatch that changed a user: the rows of `users` before and after."""

    #: Of the dispatch, as in rows.
    stamp: int
    before: Values
    after: Values


class _Seen(NamedTuple):
    """One dispatch about one row, or what has to wait for those before it (`action`)."""

    stamp: int
    slot: Slot
    kind: Kind
    values: Values
    may_insert: bool
    action: Callable[[], None] | None = None


class LiveEvents:
    """Keeps dispatches about members and users until their rows are committed, then calls `on_change` for each change.

    Only what this process received from the gateway comes in here: nothing of a listing, an import, a restore or a
    replayed journal. The row before the first of several dispatches in one flush is the database's, the row before each
    further one is the row after its predecessor. A dispatch that the database already agrees with, because a listing
    was faster, changes nothing. What is not committed when the process ends is not handed on.

    An unexpected error in here is logged and loses the dispatches that it concerns; their rows are written anyway.
    """

    def __init__(
        self,
        pool: Pool,
        on_change: Callable[[MemberChange | UserChange], None],
        *,
        has_listeners: Callable[[], bool] = lambda: True,
        max_waiting: int = 15_000,
    ) -> None:
        """`on_change` is called in the event loop and must not block it; without listeners nothing is kept.

        `max_waiting`: dispatches that wait at most; beyond it none of them is handed on.
        """
        self._pool = pool
        self._on_change = on_change
        self._has_listeners = has_listeners
        self._max_waiting = max_waiting
        #: By row, in the order of their stamps.
        self._waiting: dict[Slot, list[_Seen]] = {}
        self._count = 0
        #: Rows as they were before the first write that contains a waiting dispatch was tried; None: there was no row.
        self._before: dict[Slot, Values | None] = {}

    def __len__(self) -> int:
        return self._count

    # --- what comes in

    def observe(self, kind: Kind, rows: Iterable[Row], stamp: int) -> None:
        """Keep a dispatch: what it says of a member and their user. Never raises."""
        try:
            if not self._has_listeners():
                return
            for row in rows:
                if row.table in ("members", "users"):
                    slot = (row.table, row.key)
                    self._add(_Seen(stamp, slot, kind, row.values, row.may_insert))
            if self._count > self._max_waiting:
                self._drop_all()
        except Exception as error:
            _report(error)

    def defer(self, guild_id: int, user_id: int, action: Callable[[], None]) -> bool:
        """Call `action` after the member's waiting updates and leaves; return False if none waits."""
        slot = ("members", (guild_id, user_id))
        waiting = self._waiting.get(slot, [])
        if all(seen.kind == "join" and seen.action is None for seen in waiting):
            return False
        self._add(_Seen(waiting[-1].stamp, slot, "join", {}, False, action))
        return True

    def _add(self, seen: _Seen) -> None:
        self._waiting.setdefault(seen.slot, []).append(seen)
        self._count += 1

    def _drop_all(self) -> None:
        _log.error(
            "memory is full (BUFFER_MAX_ROWS): %s events about members are not dispatched; their rows are kept",
            self._count,
        )
        metrics.dropped.labels("member event").inc(self._count)
        waiting, self._waiting, self._count = self._waiting, {}, 0
        self._before.clear()
        self._run([seen for of_row in waiting.values() for seen in of_row if seen.action is not None])

    # --- around a write

    def keep_only(self, entries: Collection[Slot], held_guilds: Collection[int]) -> None:
        """Forget dispatches whose rows are neither among the entries of a flush nor held: memory was full.

        Never raises.
        """
        lost = [
            slot
            for slot in self._waiting
            if slot not in entries and not (slot[0] == "members" and slot[1][0] in held_guilds)
        ]
        for slot in lost:
            self.forget(slot)

    def forget(self, slot: Slot) -> None:
        """Forget the dispatches about a row: it will not be written."""
        seen = self._waiting.pop(slot, [])
        self._count -= len(seen)
        self._before.pop(slot, None)
        if not self._waiting:
            self._before.clear()
        self._run([event for event in seen if event.action is not None])

    async def prepare(self, entries: Mapping[Slot, Entry]) -> None:
        """Read the rows that a write is about to change; call it with `write_lock` held, before the write.

        A row that was read for an attempt that failed is not read again: that attempt may have been committed. Raises
        `DatabaseUnavailable`, which the write would raise as well; if the rows cannot be read for another reason, their
        dispatches are forgotten.
        """
        due = [slot for slot in entries if slot in self._waiting]
        if not due:
            return
        try:
            await self._read_before(due)
        except DatabaseUnavailable:
            raise
        except Exception as error:
            _report(error)
            for slot in due:
                self.forget(slot)

    async def _read_before(self, due: Sequence[Slot]) -> None:
        members = [slot for slot in due if slot[0] == "members" and slot not in self._before]
        users = {("users", slot[1][-1:]) for slot in due} - self._before.keys()
        if members:
            guild_ids, user_ids = zip(*(key for _, key in members), strict=True)
            found = await self._pool.fetch(_SELECT_MEMBERS, guild_ids, user_ids)
            rows: dict[Slot, Values] = {("members", (row["guild_id"], row["user_id"])): dict(row) for row in found}
            self._before |= {slot: rows.get(slot) for slot in members}
        if users:
            found = await self._pool.fetch(_SELECT_USERS, [key[0] for _, key in users])
            rows = {("users", (row["id"],)): dict(row) for row in found}
            self._before |= {slot: rows.get(slot) for slot in users}

    def finish(self, entries: Mapping[Slot, Entry]) -> None:
        """Hand on the dispatches that these entries contain, in the order of their stamps; call it after the commit.

        Never raises.
        """
        try:
            self._hand_on(entries)
        except Exception as error:
            _report(error)
            for slot in entries:
                self.forget(slot)

    def _hand_on(self, entries: Mapping[Slot, Entry]) -> None:
        if not self._waiting:  # they were dropped while the rows were read or written
            self._before.clear()
            return
        self._run(sorted(self._take(entries), key=lambda seen: seen.stamp))
        # Users are also read for members; with the next dispatch, the rows are read anew.
        used = {slot for slot in entries if slot not in self._waiting}
        used |= {slot for slot in self._before if slot[0] == "users" and slot not in self._waiting}
        for slot in used:
            self._before.pop(slot, None)

    def _take(self, entries: Mapping[Slot, Entry]) -> Iterable[_Seen]:
        for slot in [slot for slot in entries if slot in self._waiting]:
            stamp = entries[slot].stamp
            waiting = self._waiting[slot]
            taken = [seen for seen in waiting if seen.stamp <= stamp]
            self._count -= len(taken)
            if len(taken) == len(waiting):
                del self._waiting[slot]
            else:
                self._waiting[slot] = waiting[len(taken) :]
            yield from taken

    def _run(self, events: Iterable[_Seen]) -> None:
        for seen in events:
            try:
                if seen.action is not None:
                    seen.action()
                elif (change := self._apply(seen)) is not None:
                    self._on_change(change)
            except Exception:
                _log.exception("could not dispatch a change of %s %s", *seen.slot)

    def _apply(self, seen: _Seen) -> MemberChange | UserChange | None:
        """Apply a dispatch to the row that is known, and return the change; None if there is none to tell."""
        table, key = seen.slot
        before = self._before.get(seen.slot)
        if before is not None and before["stamp"] > seen.stamp:
            return None  # something newer is written
        if before is None:
            after = {**_keys_of(seen.slot), **seen.values, "stamp": seen.stamp} if seen.may_insert else None
        else:
            after = {**before, **seen.values}
        self._before[seen.slot] = after
        if table == "users":
            is_changed = before is not None and _differs(table, before, seen.values)
            return (
                UserChange(seen.stamp, before, after)
                if is_changed and before is not None and after is not None
                else None
            )
        guild_id, user_id = key[0], key[-1]
        user = self._before.get(("users", (user_id,)))
        was_present = before is not None and before["left_at"] is None
        if seen.kind == "leave":
            if before is not None and not was_present:
                return None  # a listing has shown it
            return MemberChange(seen.stamp, guild_id, user_id, before or _keys_of(seen.slot), None, user)
        if seen.kind == "update" and was_present and before is not None and _differs(table, before, seen.values):
            return MemberChange(seen.stamp, guild_id, user_id, before, after, user)
        return None


def _report(error: Exception) -> None:
    log_once(
        _log,
        type(error).__name__,
        "could not follow what changed members and users (%r), so that cogs may miss events about them; further errors "
        "are only counted",
        error,
    )


def _keys_of(slot: Slot) -> dict[str, Any]:
    table, key = slot
    return {"id": key[0]} if table == "users" else {"guild_id": key[0], "user_id": key[1]}


def _differs(table: str, before: Values, values: Values) -> bool:
    """Return whether a dispatch changed a column that is recorded in the history."""
    columns = table_of(table).columns
    return any(
        _comparable(before.get(name)) != _comparable(value)
        for name, value in values.items()
        if part_of(columns[name]) is Part.DATA
    )


def _comparable(value: Any) -> Any:
    """Return jsonb as text, in the form in which payloads are translated."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode() if isinstance(value, dict) else value
