"""Proves tables against a world: every row that should be there is, as it should be, and no other one."""

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

#: In the order in which people think of them.
TABLES = ("guilds", "users", "members", "roles", "channels", "threads")


@dataclass(slots=True)
class Proof:
    """What comparing one table came to; keys are those of the table's primary key."""

    table: str
    compared: int = 0
    missing: list[Key] = field(default_factory=list)
    extra: list[Key] = field(default_factory=list)
    #: By key: each column that differs, as it should be and as it is.
    different: dict[Key, dict[str, tuple[object, object]]] = field(default_factory=dict)

    @property
    def differences(self) -> int:
        """Rows that are missing, too many, or not as they should be."""
        return len(self.missing) + len(self.extra) + len(self.different)

    def lines(self, most: int = 5) -> list[str]:
        """Return the first differences, one line each."""
        told = [f"{self.table} {_text(key)} is missing" for key in self.missing[:most]]
        told += [f"{self.table} {_text(key)} should not be there" for key in self.extra[:most]]
        for key, columns in list(self.different.items())[:most]:
            shown = ", ".join(f"{name} is {found!r}, not {wanted!r}" for name, (wanted, found) in columns.items())
            told.append(f"{self.table} {_text(key)}: {shown}")
        return told[:most]


def _text(key: Key) -> str:
    return "/".join(map(str, key))


async def compare(db: Pool, table: str, expected: Iterable[Row], *, guild_id: int | None = None) -> Proof:
    """Compare what is there (tombstoned rows are not) with `expected`, of one guild or of all the bot is in.

    Columns that an expected row does not name may hold anything: those of a hidden channel are what was last seen.
    So may threads in hidden channels, and users who are no member anywhere: nobody can know better.
    """
    names = [column.name for column in mirrored_tables()[table].primary_key.columns]
    found = {tuple(row[name] for name in names): row for row in await _rows(db, table, guild_id)}
    proof = Proof(table)
    for wanted in expected:
        key = tuple(wanted[name] for name in names)
        proof.compared += 1
        row = found.pop(key, None)
        if row is None:
            proof.missing.append(key)
        elif wrong := {name: (value, row[name]) for name, value in wanted.items() if row[name] != value}:
            proof.different[key] = wrong
    proof.extra = [key for key, row in found.items() if row["must_be_known"]]
    return proof


#: What else a table's rows are asked for; `must_be_known`: whether a row that the world does not show is wrong.
_KNOWN = {
    "users": "EXISTS (SELECT FROM members AS m WHERE m.user_id = t.id AND m.left_at IS NULL AND {guild})",
    "threads": (
        "NOT EXISTS (SELECT FROM channels AS c WHERE c.guild_id = t.guild_id AND c.id = t.parent_id AND c.hidden)"
    ),
}


async def _rows(db: Pool, table: str, guild_id: int | None) -> list[asyncpg.Record]:
    known = _KNOWN.get(table, "true").format(guild="($1::bigint IS NULL OR m.guild_id = $1)")
    column = {"guilds": "id", "users": None}.get(table, "guild_id")
    conditions = ["($1::bigint IS NULL OR true)"]  # so that every statement has its parameter
    if column is not None:
        conditions.append(f"($1::bigint IS NULL OR t.{column} = $1)")
    if column == "guild_id":
        conditions.append("EXISTS (SELECT FROM guilds AS g WHERE g.id = t.guild_id AND g.left_at IS NULL)")
    if (tombstone := tombstone_column(table)) is not None:
        conditions.append(f"t.{tombstone} IS NULL")
    where = " AND ".join(conditions)
    statement = f"SELECT t.*, {known} AS must_be_known FROM {table} AS t WHERE {where}"  # noqa: S608 - names are ours
    return await db.fetch(statement, guild_id, timeout=60)
