"""The live overlay: what dispatches reported while an observation was under way, and which of the two is newer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from utils.exceptions import SyncError
from utils.mirror.records.rows import PEOPLE_TABLES, Entry, Group, Key, Mode, Row, key_columns, tombstone_column

Slot = tuple[str, Key]


class _LiveRow:
    """What dispatches reported of one row, each column with the stamp of the last dispatch that named it."""

    __slots__ = ("may_insert", "stamp", "stamps", "values")

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.stamps: dict[str, int] = {}
        self.may_insert = False
        self.stamp = 0

    def add(self, row: Row, stamp: int) -> None:
        self.values |= row.values
        self.stamps |= dict.fromkeys(row.values, stamp)
        self.may_insert = self.may_insert or row.may_insert
        self.stamp = stamp

    def values_since(self, stamp: int) -> dict[str, Any]:
        return {name: value for name, value in self.values.items() if self.stamps[name] > stamp}


class LiveOverlay:
    """Remembers dispatches for as long as an observation older than them is still to be merged.

    A dispatch that changed nothing leaves no stamp in the table, and yet it is newer than an older page, in the columns
    that it named; in the other columns the page is newer than the table.

    Members and users are many. They are remembered only while an observation that shows them is open, up to
    `max_people` rows, and not while memory is short. An observation that outlasts this has to be requested again.
    """

    __slots__ = ("_forgotten_stamp", "_newest_stamp", "_open", "_open_people", "_people", "_rows", "max_people")

    def __init__(self, max_people: int = 100_000) -> None:
        self.max_people = max_people
        self._open: set[object] = set()
        #: The open observations that show members or users.
        self._open_people: set[object] = set()
        #: By table and guild id (0 for users), then by key.
        self._rows: dict[tuple[str, int], dict[Key, _LiveRow]] = {}
        #: How many of the rows are members or users.
        self._people = 0
        #: Dispatches about members and users up to this stamp are forgotten.
        self._forgotten_stamp = 0
        self._newest_stamp = 0

    @property
    def is_tracking(self) -> bool:
        """Whether any observation is open."""
        return bool(self._open)

    def open(self, observation: object, *, people: bool = True) -> None:
        """Start to remember dispatches for an observation; `people`: it shows members or users."""
        self._open.add(observation)
        if people:
            self._open_people.add(observation)

    def close(self, observation: object) -> None:
        """Close an observation; with the last one, forget every dispatch."""
        self._open.discard(observation)
        if observation in self._open_people:
            self._open_people.remove(observation)
            if not self._open_people:
                self._clear_people()
        if not self._open:
            self._rows.clear()

    @contextlib.contextmanager
    def tracking(self, *, people: bool = True) -> Iterator[None]:
        """Remember dispatches during the block: for a request that is sent now and answered later."""
        request = object()
        self.open(request, people=people)
        try:
            yield
        finally:
            self.close(request)

    def add(self, row: Row, stamp: int) -> None:
        """Record that a dispatch named a row."""
        if not self._open:
            return
        is_person = row.table in PEOPLE_TABLES
        if is_person and not self._open_people:
            return
        rows = self._rows.setdefault((row.table, _scope(row.table, row.key)), {})
        live = rows.get(row.key)
        if live is None:
            live = rows[row.key] = _LiveRow()
            self._people += is_person
        live.add(row, stamp)
        if is_person:
            self._newest_stamp = stamp
            if self._people > self.max_people:
                self.forget_people()

    def forget_people(self) -> None:
        """Forget members and users to free memory; observations requested before now can no longer be merged."""
        if self._people:
            self._forgotten_stamp = self._newest_stamp
            self._clear_people()

    def _clear_people(self) -> None:
        for scope in [scope for scope in self._rows if scope[0] in PEOPLE_TABLES]:
            del self._rows[scope]
        self._people = 0

    def covers(self, stamp: int) -> bool:
        """Return whether every dispatch about members and users after `stamp` is still remembered."""
        return stamp >= self._forgotten_stamp

    def rows(self, table: str, guild_id: int) -> Mapping[Key, _LiveRow]:
        """Return what dispatches reported of a guild's rows, by key; guild 0: users."""
        return self._rows.get((table, guild_id), {})

    def touched_since(self, table: str, guild_id: int, stamp: int) -> set[int]:
        """Return the ids (last in the key) of a guild's rows that dispatches after `stamp` named; guild 0: users.

        Raises `SyncError` when they are no longer remembered.
        """
        if table in PEOPLE_TABLES and not self.covers(stamp):
            raise SyncError(
                f"guild {guild_id}: more than {self.max_people:,} members changed while its member list was read; "
                "it will be requested again"
            )
        rows = self._rows.get((table, guild_id))
        return {key[-1] for key, live in rows.items() if live.stamp > stamp} if rows else set()

    def split_stale(self, group: Group, guild_id: int, stamp: int) -> list[Group]:
        """Split a group observed at `stamp` into rows that no dispatch named since, and rows that one did.

        Of the latter, unknown rows are inserted whole. For known rows, only the columns that no dispatch named
        are written, with the dispatch's stamp, which the row may already have.
        """
        touched = self.touched_since(group.table, guild_id, stamp)
        keys = len(key_columns(group.table))
        stale = [record for record in group.records if record[keys - 1] in touched] if touched else []
        if not stale:
            return [group]
        fresh = [record for record in group.records if record[keys - 1] not in touched]
        groups = [Group(group.table, group.columns, group.mode, fresh)]
        if group.mode is not Mode.UPDATE:
            groups.append(Group(group.table, group.columns, Mode.INSERT, stale))
        rows = self._rows[group.table, guild_id]
        partial: dict[tuple[str, ...], Group] = {}
        for record in stale:
            live = rows[record[:keys]]
            columns = tuple(name for name in group.columns if live.stamps.get(name, 0) <= stamp)
            if columns:
                part = partial.setdefault(columns, Group(group.table, columns, Mode.UPDATE))
                values = dict(zip(group.columns, record[keys:-1], strict=True))
                part.records.append((*record[:keys], *(values[name] for name in columns), live.stamp))
        return [*groups, *partial.values()]

    def entries_to_reapply(self, guild_id: int, stamp: int) -> Iterator[tuple[Slot, Entry]]:
        """Yield the dispatches after `stamp` that had no effect if their row was inserted only by the listing.

        Partial payloads change an existing row only, so they have to be written again once the listing has been
        merged. Deletions as well: what a deletion implied (a role removed from members, the threads of a channel), the
        listing may have brought back.
        """
        for (table, scope), rows in self._rows.items():
            if scope != guild_id or table == "users":
                continue
            tombstone = tombstone_column(table)
            for key, live in rows.items():
                if live.stamp <= stamp:
                    continue
                values = live.values_since(stamp)
                if not live.may_insert or (tombstone is not None and values.get(tombstone) is not None):
                    yield (table, key), Entry(values, may_insert=False, stamp=live.stamp)


def _scope(table: str, key: Key) -> int:
    return 0 if table == "users" else key[0]
