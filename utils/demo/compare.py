"""Compares tables with a simulated world: missing rows, extra rows and wrong values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from models import mirrored_tables
from utils.database import Pool
from utils.mirror.records.rows import tombstone_column

Key = tuple[Any, ...]
Row = Mapping[str, object]

#: The mirrored tables, in the order in which they are displayed.
TABLES = ("guilds", "users", "members", "roles", "channels", "threads")


@dataclass(slots=True)
class Comparison:
    """The result of comparing one table. Keys are values of its primary key."""

    table: str
    compared: int = 0
    missing: list[Key] = field(default_factory=list)
    extra: list[Key] = field(default_factory=list)
    #: By key: each column that differs, with its expected and its actual value.
    different: dict[Key, dict[str, tuple[object, object]]] = field(default_factory=dict)

    @property
    def differences(self) -> int:
        """Number of missing, extra and different rows."""
        return len(self.missing) + len(self.extra) + len(self.different)

    def lines(self, most: int = 5) -> list[str]:
        """Return the first differences, one line each."""
        lines = [f"{self.table} {_text(key)} is missing" for key in self.missing[:most]]
        lines += [f"{self.table} {_text(key)} must not exist" for key in self.extra[:most]]
        for key, columns in list(self.different.items())[:most]:
            shown = ", ".join(
                f"{name} is {actual!r}, expected {expected!r}" for name, (expected, actual) in columns.items()
            )
            lines.append(f"{self.table} {_text(key)}: {shown}")
        return lines[:most]


def _text(key: Key) -> str:
    return "/".join(map(str, key))


async def compare(pool: Pool, table: str, expected: Iterable[Row], *, guild_id: int | None = None) -> Comparison:
    """Compare the rows without a tombstone with `expected`, for one guild or for all guilds the bot is in.

    Columns missing from an expected row are ignored: those of a hidden channel keep their last known values. Extra
    rows are ignored for threads in hidden channels and for users without a membership, which the bot cannot observe.
    """
    names = [column.name for column in mirrored_tables()[table].primary_key.columns]
    actual = {tuple(row[name] for name in names): row for row in await _rows(pool, table, guild_id)}
    comparison = Comparison(table)
    for row in expected:
        key = tuple(row[name] for name in names)
        comparison.compared += 1
        stored = actual.pop(key, None)
        if stored is None:
            comparison.missing.append(key)
        elif wrong := {name: (value, stored[name]) for name, value in row.items() if stored[name] != value}:
            comparison.different[key] = wrong
    comparison.extra = [key for key, stored in actual.items() if stored["is_observable"]]
    return comparison


#: Whether the bot can observe a row, so that it is wrong if the world does not have it; true for other tables.
_IS_OBSERVABLE = {
    "users": "EXISTS (SELECT FROM members AS m WHERE m.user_id = t.id AND m.left_at IS NULL AND {guild})",
    "threads": (
        "NOT EXISTS (SELECT FROM channels AS c WHERE c.guild_id = t.guild_id AND c.id = t.parent_id AND c.hidden)"
    ),
}


async def _rows(pool: Pool, table: str, guild_id: int | None) -> list[asyncpg.Record]:
    observable = _IS_OBSERVABLE.get(table, "true").format(guild="($1::bigint IS NULL OR m.guild_id = $1)")
    column = {"guilds": "id", "users": None}.get(table, "guild_id")
    conditions = ["($1::bigint IS NULL OR true)"]  # every statement uses the parameter
    if column is not None:
        conditions.append(f"($1::bigint IS NULL OR t.{column} = $1)")
    if column == "guild_id":
        conditions.append("EXISTS (SELECT FROM guilds AS g WHERE g.id = t.guild_id AND g.left_at IS NULL)")
    if (tombstone := tombstone_column(table)) is not None:
        conditions.append(f"t.{tombstone} IS NULL")
    where = " AND ".join(conditions)
    statement = f"SELECT t.*, {observable} AS is_observable FROM {table} AS t WHERE {where}"  # noqa: S608 - names are ours
    return await pool.fetch(statement, guild_id, timeout=60)
