"""The SQL that makes the rows of one live table those of its scratch table.

Only what differs is written: rows that are not in the backup are deleted, and rows of which a column differs are
changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from utils.database.sessions import Connection
from utils.database.sql import load_statements, quote_identifier
from utils.operations.backup.archive.objects import Name, OwnTable, find_drawn_columns, qualified
from utils.operations.backup.scratch.load import LOAD_SECONDS

_SQL = load_statements(Path(__file__).with_suffix(".sql"))
#: What the server computes for rows of one guild's documents that are written: to a bot that keeps running, a version
#: must never be one that the document had before.
_RENEWED = {"version": "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint", "updated_at": "now()"}


@dataclass(frozen=True, slots=True)
class Pair:
    """A live table, the scratch table that replaces its rows, and how."""

    #: Of the live table.
    name: Name
    #: Both in SQL.
    live: str
    scratch: str
    is_partitioned: bool
    #: The columns that both have, with the type to cast to, where the types differ.
    columns: Mapping[str, str | None]
    #: The columns that identify a row; none if nothing does.
    key: Sequence[str]
    #: Whether rows that differ must be changed in place, instead of being deleted and added again.
    must_update: bool
    #: Only rows of this guild are replaced; None: all. The scratch table has no others.
    guild_id: int | None = None

    @property
    def arguments(self) -> list[int]:
        """The arguments of the statements that read or delete live rows."""
        return [] if self.guild_id is None else [self.guild_id]

    @property
    def scope(self) -> str:
        """The condition on the live rows that are replaced, after another condition."""
        return "" if self.guild_id is None else " AND t.guild_id = $1"

    @property
    def only(self) -> str:
        """The live table, without what other programs let inherit from it."""
        return self.live if self.is_partitioned else f"ONLY {self.live}"

    def value(self, column: str, alias: str = "s") -> str:
        """Return a column of the scratch table, as the live one has it."""
        if self.guild_id is not None and column in _RENEWED:
            return _RENEWED[column]
        cast = self.columns[column]
        name = f"{alias}.{quote_identifier(column)}"
        return name if cast is None else f"{name}::text::{cast}"

    @property
    def has_same_key(self) -> str:
        """The condition under which a live row `t` and a scratch row `s` are the same one."""
        return " AND ".join(f"{self.value(column)} = t.{quote_identifier(column)}" for column in self.key)

    @property
    def differs(self) -> str:
        """The condition under which a live row `t` and a scratch row `s` have different contents."""
        # Compares the stored bytes: not every type has an operator for equality.
        compared = [column for column in self.columns if self.guild_id is None or column not in _RENEWED]
        live = ", ".join(f"t.{quote_identifier(column)}" for column in compared)
        return f"ROW({live})::record *<> ROW({', '.join(map(self.value, compared))})::record"

    def delete(self) -> str:
        """Return the statement that deletes what is not in the backup."""
        if not self.key and self.guild_id is None:
            return f"TRUNCATE {self.only}"  # a publication forbids to delete rows that nothing identifies
        same = self.has_same_key if self.must_update else f"{self.has_same_key} AND NOT ({self.differs})"
        is_gone = f"NOT EXISTS (SELECT FROM {self.scratch} AS s WHERE {same})" if self.key else "true"
        return f"DELETE FROM {self.only} AS t WHERE {is_gone}{self.scope}"  # noqa: S608

    def update(self) -> str | None:
        """Return the statement that changes the rows which differ; None: they have been deleted."""
        changed = [column for column in self.columns if column not in self.key]
        if not (self.key and self.must_update and changed):
            return None
        values = ", ".join(f"{quote_identifier(column)} = {self.value(column)}" for column in changed)
        return (
            f"UPDATE {self.only} AS t SET {values} FROM {self.scratch} AS s"  # noqa: S608
            f" WHERE {self.has_same_key} AND {self.differs}"
        )

    def insert(self) -> str:
        """Return the statement that adds the rows that are not there."""
        columns = ", ".join(map(quote_identifier, self.columns))
        values = ", ".join(map(self.value, self.columns))
        missing = f" WHERE NOT EXISTS (SELECT FROM {self.live} AS t WHERE {self.has_same_key})" if self.key else ""
        return (
            f"INSERT INTO {self.live} ({columns}) OVERRIDING SYSTEM VALUE"  # noqa: S608
            f" SELECT {values} FROM {self.scratch} AS s{missing}"
        )


async def find_pairs(
    connection: Connection, tables: Sequence[OwnTable], scratch: Sequence[Name], guild_id: int | None = None
) -> list[Pair]:
    """Return how to replace the rows of each table, in the order in which rows are added.

    scratch: the names of their scratch tables; a table whose scratch table does not exist is left out. guild_id: only
    rows of this guild are replaced; None: all.
    """
    live = [table.quoted for table in tables]
    others = list(map(qualified, scratch))
    pairs = {
        live[row["number"] - 1]: Pair(
            (tables[row["number"] - 1].schema, tables[row["number"] - 1].name),
            live[row["number"] - 1],
            others[row["number"] - 1],
            row["is_partitioned"],
            dict(zip(row["columns"], row["casts"], strict=True)),
            row["key"],
            row["must_update"],
            guild_id,
        )
        for row in await connection.fetch(_SQL["shapes"], live, others)
    }
    rows = await connection.fetch(_SQL["references"], live)
    by_regclass = {row["shown"]: row["name"] for row in await connection.fetch(
        "SELECT name, name::regclass::text AS shown FROM unnest($1::text[]) AS name", live
    )}  # fmt: skip
    order: TopologicalSorter[str] = TopologicalSorter({name: set() for name in pairs})
    for row in rows:
        order.add(by_regclass[row["source"]], by_regclass[row["target"]])
    try:
        return [pairs[name] for name in order.static_order()]
    except CycleError:  # then only deferrable keys can be satisfied
        return list(pairs.values())


async def add_rows(connection: Connection, source: Name, into: Name) -> int:
    """Add the rows whose key does not exist; keys from sequences are drawn anew. Return their number."""
    target = qualified(into)
    drawn = await find_drawn_columns(connection, target)
    [shape] = await connection.fetch(_SQL["shapes"], [target], [qualified(source)])
    casts = zip(shape["columns"], shape["casts"], strict=True)
    columns = {column: cast for column, cast in casts if column not in drawn}
    names = ", ".join(map(quote_identifier, columns))
    values = ", ".join(
        quote_identifier(column) if cast is None else f"{quote_identifier(column)}::text::{cast}"
        for column, cast in columns.items()
    )
    status = await connection.execute(
        f"INSERT INTO {target} ({names}) SELECT {values} FROM {qualified(source)} ON CONFLICT DO NOTHING",  # noqa: S608
        timeout=LOAD_SECONDS,
    )
    return affected(status)


def affected(status: str) -> int:
    """Return the number of rows in a command tag; 0 for a command that does not count."""
    with contextlib.suppress(ValueError):
        return int(status.rsplit(" ", 1)[-1])
    return 0
