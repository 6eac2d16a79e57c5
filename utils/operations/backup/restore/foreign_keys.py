"""Checks the foreign keys between the tables whose rows a restore replaces and all others, whoever made those."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import asyncpg

from utils.database.placement import Placement
from utils.database.sessions import Connection
from utils.database.sql import load_statements, quote_identifier
from utils.exceptions import BackupError
from utils.operations.backup.archive.objects import OwnTable, find_tables, owned_names
from utils.operations.backup.restore.pairs import Pair
from utils.operations.backup.scratch.load import LOAD_SECONDS
from utils.text import format_count

_SQL = load_statements(Path(__file__).with_suffix(".sql"))
#: What deleting a row does to those that refer to it, by pg_constraint.confdeltype.
_ON_DELETE = {"c": "would be deleted", "n": "would lose the reference", "d": "would lose the reference"}


async def check_keys_onto(
    connection: Connection, schemas: Placement, tables: Sequence[OwnTable], pairs: Sequence[Pair]
) -> None:
    """Raise `BackupError` if rows of tables that are not replaced refer to rows that are not in the backup."""
    parts = [name for table in tables for name in table.relations]
    shown = {row["shown"]: row["pair"] for row in await connection.fetch(
        "SELECT name::regclass::text AS shown, pair FROM unnest($1::text[], $2::text[]) AS t (name, pair)",
        parts,
        [table.quoted for table in tables for _ in table.relations],
    )}  # fmt: skip
    by_name = {pair.live: pair for pair in pairs}
    ours = await _own_relations(connection, schemas)
    for key in await connection.fetch(_SQL["keys_onto"], parts, parts):
        pair = by_name[shown[key["target"]]]
        await _check_key_onto(connection, key, pair, is_ours=key["source"] in ours)


async def _own_relations(connection: Connection, schemas: Placement) -> set[str]:
    return {name for table in await find_tables(connection, owned_names(schemas)) for name in table.relations}


async def _check_key_onto(connection: Connection, key: asyncpg.Record, pair: Pair, *, is_ours: bool) -> None:
    refers = " AND ".join(
        f"t.{quote_identifier(to)} = f.{quote_identifier(column)}"
        for column, to in zip(key["columns"], key["referenced"], strict=True)
    )
    stays = " AND ".join([pair.has_same_key, *(
        f"{pair.value(to)} = t.{quote_identifier(to)}" for to in key["referenced"] if to not in pair.key
    )])  # fmt: skip
    vanishes = f"NOT EXISTS (SELECT FROM {pair.scratch} AS s WHERE {stays}){pair.scope}"
    what = f"foreign key {key['name']} of {key['source']}"
    try:
        async with connection.transaction():  # a savepoint
            rows = await connection.fetchval(
                f"SELECT count(*) FROM {key['source']} AS f JOIN {pair.live} AS t ON {refers} WHERE {vanishes}",  # noqa: S608
                *pair.arguments,
                timeout=LOAD_SECONDS,
            )
    except asyncpg.InsufficientPrivilegeError:
        if key["on_delete"] not in _ON_DELETE:
            return  # the server refuses to delete what is referred to
        query = f"SELECT EXISTS (SELECT FROM {pair.live} AS t WHERE {vanishes})"  # noqa: S608
        if await connection.fetchval(query, *pair.arguments, timeout=LOAD_SECONDS):
            raise BackupError(
                f"rows of {pair.live} are not in the backup, and rows of {key['source']}, which may not be read,"
                f" may refer to them ({what}): grant SELECT on that table, or drop the key. Nothing was changed"
            ) from None
        return
    if rows:
        effect = _ON_DELETE.get(key["on_delete"], "would refer to nothing")
        advice = "restore that table too" if is_ours else "delete them first, or point them elsewhere"
        raise BackupError(
            f"{format_count(rows, 'row')} of {key['source']}, which this restore does not replace,"
            f" {'refers' if rows == 1 else 'refer'} to rows of"
            f" {pair.live} that are not in the backup, and {effect} ({what}): {advice}. Nothing was changed"
        )


async def check_keys_from(connection: Connection, schemas: Placement, pairs: Sequence[Pair]) -> None:
    """Raise `BackupError` if rows of the backup refer to rows of tables that are not replaced, and do not exist."""
    by_name = {pair.live: pair for pair in pairs}
    ours = await _own_relations(connection, schemas)
    for key in await connection.fetch(_SQL["keys_from"], list(by_name)):
        pair = by_name[key["source"]]
        if not set(key["columns"]) <= pair.columns.keys():
            continue  # the backup does not know the key, and the rows keep theirs
        values = [pair.value(column) for column in key["columns"]]
        refers = " AND ".join(
            f"{value} = f.{quote_identifier(to)}" for value, to in zip(values, key["referenced"], strict=True)
        )
        has_reference = " AND ".join(f"{value} IS NOT NULL" for value in values)
        try:
            async with connection.transaction():  # a savepoint
                rows = await connection.fetchval(
                    f"SELECT count(*) FROM {pair.scratch} AS s WHERE {has_reference}"  # noqa: S608
                    f" AND NOT EXISTS (SELECT FROM {key['target']} AS f WHERE {refers})",
                    timeout=LOAD_SECONDS,
                )
        except asyncpg.InsufficientPrivilegeError:
            continue  # the server refuses such rows
        if rows:
            advice = "restore that table too" if key["target"] in ours else "add them first, or drop the key"
            raise BackupError(
                f"{format_count(rows, 'row')} of {pair.live} in the backup {'refers' if rows == 1 else 'refer'} to"
                f" rows of {key['target']}, which this restore does not replace, and they are not there (foreign"
                f" key {key['name']}): {advice}. Nothing was changed"
            )
