"""What live events spoke of while a listing was under way: there the listing is the older observation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from utils.exceptions import SyncError
from utils.mirror.records.rows import PEOPLE_TABLES, Entry, Group, Key, Mode, Row, key_columns, tombstone_column

Slot = tuple[str, Key]


class _Spoken:
    """What live events said of one row, each column with the stamp of the last event that spoke of it."""

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

    def since(self, stamp: int) -> dict[str, Any]:
        return {name: value for name, value in self.values.items() if self.stamps[name] > stamp}


class LiveOverlay:
    """Remembers live observations for as long as one older than them is still to be merged.

    Changed or not: an event that changed nothing leaves no stamp in the table, yet it beats an older page. It does so
    in the columns that it spoke of: of the others the page knows better.

    People are many: they are remembered only while a listing of people is open, up to `max_people` rows, and not when
    memory is short. A listing that had to wait longer than that is to be asked for again.
    """

    __slots__ = ("_floor", "_newest", "_open", "_open_people", "_people", "_spoken", "max_people")

    def __init__(self, max_people: int = 100_000) -> None:
        self.max_people = max_people
        self._open: set[object] = set()
        #: Of those, the ones that show members or users.
        self._open_people: set[object] = set()
        #: By table and guild (0 for users), then by key.
        self._spoken: dict[tuple[str, int], dict[Key, _Spoken]] = {}
        #: Rows of people among them.
        self._people = 0
        #: What was said of people up to this stamp is forgotten.
        self._floor = 0
        self._newest = 0

    def open(self, observation: object, *, people: bool = True) -> None:
        """Start to remember what comes live, for an observation made now; `people`: one that shows members or users."""
        self._open.add(observation)
        if people:
            self._open_people.add(observation)

    def close(self, observation: object) -> None:
        """Forget an observation, and with the last one all that was remembered."""
        self._open.discard(observation)
        if observation in self._open_people:
            self._open_people.remove(observation)
            if not self._open_people:
                self._forget_people()
        if not self._open:
            self._spoken.clear()

    @contextlib.contextmanager
    def watching(self, *, people: bool = True) -> Iterator[None]:
        """Remember what comes live as long as the block lasts: for what is asked now and answered later."""
        question = object()
        self.open(question, people=people)
        try:
            yield
        finally:
            self.close(question)

    def add(self, row: Row, stamp: int) -> None:
        """Note that a live event spoke of a row."""
        if not self._open:
            return
        is_person = row.table in PEOPLE_TABLES
        if is_person and not self._open_people:
            return
        known = self._spoken.setdefault((row.table, _scope(row.table, row.key)), {})
        spoken = known.get(row.key)
        if spoken is None:
            spoken = known[row.key] = _Spoken()
            self._people += is_person
        spoken.add(row, stamp)
        if is_person:
            self._newest = stamp
            if self._people > self.max_people:
                self.give_up_people()

    def give_up_people(self) -> None:
        """Forget people for want of memory: what was asked before now cannot be merged any more."""
        if self._people:
            self._floor = self._newest
            self._forget_people()

    def knows_since(self, stamp: int) -> bool:
        """Whether nothing of what was said of people after `stamp` had to be forgotten."""
        return stamp >= self._floor

    def _forget_people(self) -> None:
        for scope in [scope for scope in self._spoken if scope[0] in PEOPLE_TABLES]:
            del self._spoken[scope]
        self._people = 0

    def since(self, table: str, guild_id: int, stamp: int) -> set[int]:
        """Return the ids (the last part of the key) of a guild's rows touched after `stamp`; guild 0 for users.

        Raises `SyncError` when they are not known any more.
        """
        if table in PEOPLE_TABLES and not self.knows_since(stamp):
            raise SyncError(
                f"guild {guild_id}: more members changed since they were asked for than memory holds: ask again"
            )
        known = self._spoken.get((table, guild_id))
        return {key[-1] for key, spoken in known.items() if spoken.stamp > stamp} if known else set()

    def behind(self, group: Group, guild_id: int, stamp: int) -> list[Group]:
        """Split a group observed at `stamp` into what nobody touched since, and what live events are ahead of.

        Of the latter, rows that are not there yet are made, and of the others only those columns written that no
        event spoke of, with the event's stamp: the row may have it already.
        """
        touched = self.since(group.table, guild_id, stamp)
        keys = len(key_columns(group.table))
        older = [record for record in group.records if record[keys - 1] in touched] if touched else []
        if not older:
            return [group]
        rest = [record for record in group.records if record[keys - 1] not in touched]
        behind = [Group(group.table, group.columns, group.mode, rest)]
        if group.mode is Mode.MERGE:
            behind.append(Group(group.table, group.columns, Mode.INSERT, older))
        known = self._spoken[group.table, guild_id]
        parts: dict[tuple[str, ...], Group] = {}
        for record in older:
            spoken = known[record[:keys]]
            columns = tuple(name for name in group.columns if spoken.stamps.get(name, 0) <= stamp)
            if columns:
                part = parts.setdefault(columns, Group(group.table, columns, Mode.UPDATE))
                values = dict(zip(group.columns, record[keys:-1], strict=True))
                part.records.append((*record[:keys], *(values[name] for name in columns), spoken.stamp))
        return [*behind, *parts.values()]

    def again(self, guild_id: int, stamp: int) -> Iterator[tuple[Slot, Entry]]:
        """Yield what a guild's live events after `stamp` said that could not make a row by itself, and who went.

        It fell on nothing if the row was not there yet; once the listing has been merged it is, so it is said again.
        What went took others along (a role its place in the members' arrays, a channel its threads), which the
        listing may have brought back.
        """
        for (table, scope), known in self._spoken.items():
            if scope != guild_id or table == "users":
                continue
            tombstone = tombstone_column(table)
            for key, spoken in known.items():
                if spoken.stamp <= stamp:
                    continue
                values = spoken.since(stamp)
                if not spoken.may_insert or (tombstone is not None and values.get(tombstone) is not None):
                    yield (table, key), Entry(values, may_insert=False, stamp=spoken.stamp)


def _scope(table: str, key: Key) -> int:
    return 0 if table == "users" else key[0]
