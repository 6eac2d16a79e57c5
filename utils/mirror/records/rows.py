"""What the mirror works on: rows of mirrored tables, each with the order in which it was observed."""

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

Key = tuple[int, ...]


#: Tables that are about people rather than about what guilds are made of.
PEOPLE = frozenset({"users", "members"})


class Mode(enum.Enum):
    """What a group of rows may do to its table."""

    MERGE = "merge"
    #: Rows that only speak of what is there: removals, partial payloads.
    UPDATE = "update"
    #: Rows older than a live event about the same ones: good only where there is nothing yet.
    INSERT = "insert"


class Stamps:
    """Hands out ordering stamps: the lease epoch in the high bits, a receive counter in the low ones."""

    __slots__ = ("_last",)

    def __init__(self, epoch: int) -> None:
        if not 0 <= epoch < 1 << (63 - COUNTER_BITS):
            raise ValueError(f"epoch {epoch} does not fit into the {63 - COUNTER_BITS} high bits of a stamp")
        self._last: int = epoch << COUNTER_BITS

    def next(self) -> int:
        """Return a stamp later than every one before it."""
        self._last += 1
        return self._last

    @property
    def last(self) -> int:
        """The latest stamp handed out."""
        return self._last


class Row(NamedTuple):
    """One observation of one row: the columns that the payload spoke of, and nothing about the others."""

    table: str
    key: Key
    values: dict[str, Any]
    #: False for what may only change a row that is there (a removal, an outage, half a payload), never make one.
    appears: bool = True


class Entry(NamedTuple):
    """A row as it waits to be written."""

    values: dict[str, Any]
    appears: bool
    stamp: int

    def overlaid(self, later: Entry) -> Entry:
        """Return this observation with a later one of the same row laid over it."""
        return Entry(self.values | later.values, self.appears or later.appears, max(self.stamp, later.stamp))


@dataclass(slots=True)
class Group:
    """Rows of one table that speak of the same columns; each record is key, columns, stamp."""

    table: str
    columns: tuple[str, ...]
    mode: Mode
    records: list[tuple[Any, ...]] = field(default_factory=list)


class Absence(NamedTuple):
    """A listing proven complete: rows of the guild with an older stamp that are not among `present` are gone."""

    table: str
    guild_id: int
    stamp: int
    present: Iterable[int]


@dataclass(slots=True)
class Run:
    """What becomes a row of `sync_runs`."""

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
    """What Discord showed of one guild at one moment: rows, and what is gone if it is not among them."""

    guild_id: int
    stamp: int
    groups: list[Group]
    absences: list[Absence] = field(default_factory=list)
    run: Run | None = None
    #: Guilds that the bot is in, by READY: (shard id, number of shards, ids).
    ready: tuple[int, int, set[int]] | None = None
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def size(self) -> int:
        """Records in it."""
        return sum(len(group.records) for group in self.groups)

    @property
    def shows_people(self) -> bool:
        """Whether it shows members or users."""
        tables = {group.table for group in self.groups} | {absence.table for absence in self.absences}
        return not PEOPLE.isdisjoint(tables)


def table_of(name: str) -> Table:
    """Return a mirrored table by name."""
    return mirrored_tables()[name]


@cache
def key_columns(name: str) -> tuple[str, ...]:
    """Return the names of the primary key's columns, `guild_id` first."""
    return tuple(column.name for column in table_of(name).primary_key.columns)


@cache
def value_columns(name: str) -> tuple[str, ...]:
    """Return the columns that observations may speak of, in the table's order."""
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
    """Return the column that says when a row of the table went away; None for `users`, who never do."""
    return next((column.name for column in table_of(name).columns if part_of(column) is Part.TOMBSTONE), None)


def grouped(entries: Iterable[tuple[tuple[str, Key], Entry]]) -> Iterator[Group]:
    """Group waiting rows by table and columns, keys in order: writers that sort never deadlock one another."""
    groups: dict[tuple[str, tuple[str, ...], Mode], Group] = {}
    for (table, key), entry in sorted(entries, key=lambda item: item[0]):
        columns = tuple(name for name in value_columns(table) if name in entry.values)
        mode = Mode.MERGE if entry.appears else Mode.UPDATE
        group = groups.get((table, columns, mode))
        if group is None:
            group = groups[table, columns, mode] = Group(table, columns, mode)
        group.records.append((*key, *(entry.values[name] for name in columns), entry.stamp))
    yield from groups.values()
