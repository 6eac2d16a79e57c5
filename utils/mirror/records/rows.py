"""Rows of mirrored tables with their stamps, and observations: what a response or a snapshot showed of a guild."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import Table

from models import Part, mirrored_tables, part_of

#: The receive counter takes the low 40 bits of a stamp: 10,000 events a second for 3.5 years in one epoch.
COUNTER_BITS = 40

#: Tables about people: far more rows than the tables about guilds.
PEOPLE_TABLES = frozenset({"users", "members"})

#: The values of a row's primary key, in the order of `key_columns`.
Key = tuple[int, ...]


class Stamps:
    """Hands out ordering stamps: the lease epoch in the high bits, a receive counter in the low ones."""

    __slots__ = ("_last",)

    def __init__(self, epoch: int) -> None:
        if not 0 <= epoch < 1 << (63 - COUNTER_BITS):
            raise ValueError(f"epoch {epoch} does not fit into the {63 - COUNTER_BITS} high bits of a stamp")
        self._last: int = epoch << COUNTER_BITS

    def next(self) -> int:
        """Return a stamp greater than all earlier ones."""
        self._last += 1
        return self._last

    @property
    def last(self) -> int:
        """The stamp handed out last."""
        return self._last


class Row(NamedTuple):
    """What one payload says of one row: only the columns that it contained."""

    table: str
    key: Key
    values: dict[str, Any]
    #: False if it may only update an existing row: a removal, an outage, a partial payload.
    may_insert: bool = True
    #: Whether the payload says that the object was created just now.
    is_created: bool = False


class Entry(NamedTuple):
    """The values of a row that waits in the buffer."""

    values: dict[str, Any]
    may_insert: bool
    stamp: int
    #: Whether a dispatch said that the object was created.
    is_created: bool = False

    def merged_with(self, later: Entry) -> Entry:
        """Combine two entries of the same row; values of the later one win."""
        return Entry(
            self.values | later.values,
            self.may_insert or later.may_insert,
            max(self.stamp, later.stamp),
            self.is_created or later.is_created,
        )


class Mode(enum.Enum):
    """What a group of rows may do to its table."""

    #: Insert or update.
    MERGE = "merge"
    #: Likewise, of objects that a dispatch says were created: an insert is recorded as that.
    CREATE = "create"
    #: Update existing rows only: removals, partial payloads.
    UPDATE = "update"
    #: Insert missing rows only: these are older than a dispatch about the same rows.
    INSERT = "insert"


@dataclass(slots=True)
class Group:
    """Rows of one table with the same columns; each record holds the key, the columns and the stamp."""

    table: str
    columns: tuple[str, ...]
    mode: Mode
    records: list[tuple[Any, ...]] = field(default_factory=list)


class Absence(NamedTuple):
    """The result of a complete listing: rows of the guild with an older stamp that are not in `present` are gone."""

    table: str
    guild_id: int
    stamp: int
    present: Iterable[int]


class ReadyGuilds(NamedTuple):
    """The guilds of a shard as listed by READY: all others of the shard were left."""

    shard_id: int
    shards: int
    guild_ids: set[int]


@dataclass(slots=True)
class Run:
    """One reconcile of a guild, stored as a row of `sync_runs`."""

    guild_id: int
    started_at: Any
    source: str
    reason: str
    stamp: int
    pages: int = 0
    rows_seen: int = 0
    rows_inserted: int = 0
    rows_updated: int = 0
    rows_left: int = 0
    error: str | None = None


@dataclass(eq=False, slots=True)
class Observation:
    """What a response or a snapshot showed of one guild at one moment: rows, and tables that it listed completely."""

    guild_id: int
    stamp: int
    groups: list[Group]
    absences: list[Absence] = field(default_factory=list)
    run: Run | None = None
    ready: ReadyGuilds | None = None
    #: Resolved when the observation is committed, or with the error that prevented it.
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def size(self) -> int:
        """The number of records."""
        return sum(len(group.records) for group in self.groups)

    @property
    def has_people(self) -> bool:
        """Whether it contains members or users."""
        tables = {group.table for group in self.groups} | {absence.table for absence in self.absences}
        return not PEOPLE_TABLES.isdisjoint(tables)


def group_entries(entries: Iterable[tuple[tuple[str, Key], Entry]]) -> Iterator[Group]:
    """Group buffered rows by table and columns, sorted by key: writers that lock in one order never deadlock."""
    groups: dict[tuple[str, tuple[str, ...], Mode], Group] = {}
    for (table, key), entry in sorted(entries, key=lambda item: item[0]):
        columns = tuple(name for name in value_columns(table) if name in entry.values)
        mode = Mode.UPDATE if not entry.may_insert else Mode.CREATE if entry.is_created else Mode.MERGE
        group = groups.get((table, columns, mode))
        if group is None:
            group = groups[table, columns, mode] = Group(table, columns, mode)
        group.records.append((*key, *(entry.values[name] for name in columns), entry.stamp))
    yield from groups.values()


@cache
def table_of(name: str) -> Table:
    """Return a mirrored table by name."""
    return mirrored_tables()[name]


@cache
def key_columns(name: str) -> tuple[str, ...]:
    """Return the names of the primary key's columns, `guild_id` first."""
    return tuple(column.name for column in table_of(name).primary_key.columns)


@cache
def value_columns(name: str) -> tuple[str, ...]:
    """Return the columns that a payload can set, in the table's order."""
    keys = key_columns(name)
    return tuple(
        column.name
        for column in table_of(name).columns
        if column.name not in keys
        and column.computed is None
        and part_of(column) in (Part.DATA, Part.QUIET, Part.TOMBSTONE)
    )


@cache
def tombstone_column(name: str) -> str | None:
    """Return the column that holds the time of a row's removal; None for `users`, which are never removed."""
    return next((column.name for column in table_of(name).columns if part_of(column) is Part.TOMBSTONE), None)
