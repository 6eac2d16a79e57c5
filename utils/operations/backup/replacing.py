"""Replaces the rows of the live tables by those of scratch tables, in one transaction.

Until its commit the old rows are live, afterwards the new ones, whatever is killed in between. Readers see the old rows
until then, and writers wait. Tables, views, grants and foreign keys stay as they are, so other programs' views and keys
on our tables live on. Only what differs is written: rows that are not in the backup are deleted, and rows of which a
column differs are changed. A row that another program's foreign key refers to is never deleted.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import asyncpg
import stamina

from models import mirrored_tables
from utils.database import ConnectTarget
from utils.database.cache.channel import announce
from utils.database.locks import LOCK_STATES, describe_lock_holders
from utils.database.ownership import VERSION_TABLE
from utils.database.placement import Placement
from utils.database.sql import load_statements, quote_identifier
from utils.exceptions import BackupError, DatabaseError, DatabaseUnavailable, translate_errors
from utils.mirror.records.rows import COUNTER_BITS
from utils.operations.action import Progress, Step, ignore_progress
from utils.operations.backup.archive import SequenceState
from utils.operations.backup.load import LOAD_SECONDS, Place
from utils.operations.backup.missing_tables import add_missing_tables
from utils.operations.backup.objects import (
    Name,
    OwnTable,
    find_drawn_columns,
    find_sequences,
    find_tables,
    owned_names,
    qualified,
)
from utils.operations.backup.scratch import Connection, connect
from utils.service import lease
from utils.text import format_count

_log = logging.getLogger(__name__)

#: Attempts, and seconds of the first and longest pause between two.
ATTEMPTS = 6
MIN_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.5, 3.0
#: Seconds to wait for the transactions that are writing.
LOCK_SECONDS = 5.0
#: Seconds after which the server ends the transaction by itself if this process no longer answers.
IDLE_SECONDS = 60
#: Memory of the server for each join.
WORK_MEM = "64MB"
_SQL = load_statements(Path(__file__).with_suffix(".sql"))


_ENABLE = {"O": "ENABLE", "R": "ENABLE REPLICA", "A": "ENABLE ALWAYS"}
#: What the server computes for rows of one guild's documents that are written: to a bot that keeps running, a version
#: must never be one that the document had before.
_RENEWED = {"version": "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint", "updated_at": "now()"}
#: What deleting a row does to those that refer to it, by pg_constraint.confdeltype.
_ON_DELETE = {"c": "would be deleted", "n": "would lose the reference", "d": "would lose the reference"}


@dataclass(slots=True)
class Replaced:
    """What replacing the rows did."""

    attempts: int = 1
    #: Number of rows deleted, changed and added, in all tables.
    deleted: int = 0
    changed: int = 0
    added: int = 0
    #: Tables that were missing, and are there again.
    brought_back: list[str] = field(default_factory=list)
    #: Number of rows of `ops` added from the backup, by table.
    ops_rows: dict[str, int] = field(default_factory=dict)
    #: True if the live database began anew since the backup, so that the backup's rows of `ops` were added.
    has_diverged: bool = False


@dataclass(frozen=True, slots=True)
class _Pair:
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


async def check_owner(live: ConnectTarget, schemas: Placement) -> None:
    """Raise `BackupError` unless we own our tables: only their owner may keep triggers from firing."""
    async with connect(live) as connection:
        with translate_errors("looking for the tables' owner"):
            tables = await find_tables(connection, owned_names(schemas))
            row = await connection.fetchrow(_SQL["foreign_owner"], [table.quoted for table in tables])
    if row is not None:
        raise BackupError(
            f"{row['name']} belongs to {row['owner']}, and {row['role']} may not replace its rows (to allow it: GRANT"
            f" {quote_identifier(row['owner'])} TO {quote_identifier(row['role'])})"
        )


async def replace_rows(
    live: ConnectTarget,
    schemas: Placement,
    place: Place,
    tables: Sequence[Name],
    sequences: Mapping[Name, SequenceState],
    *,
    is_partial: bool = False,
    guild_id: int | None = None,
    revoke_lease: bool = False,
    attempts: int = ATTEMPTS,
    lock_seconds: float = LOCK_SECONDS,
    progress: Progress = ignore_progress,
) -> Replaced:
    """Replace the rows of live `tables` by those of the tables that stand for them in a place.

    Rows of `ops` stay, unless the live database began anew since the backup: then the backup's are added. `sequences`
    are raised to at least these states. With `is_partial`, other tables that are missing are not brought back; with
    `guild_id`, only the rows of that guild are replaced, and the place must have no others. With `revoke_lease`, the
    holder of the lease loses it, starts over and reconciles everything. `lock_seconds` is how long each attempt waits
    for transactions that are writing. Raises `BackupError` after the last attempt, or if rows of tables that are not
    replaced are in the way; then nothing was changed.
    """
    replacement = _Replacement(
        live, schemas, place, tables, sequences, is_partial, guild_id, revoke_lease, lock_seconds, progress
    )
    result = Replaced()
    try:
        async for attempt in stamina.retry_context(
            on=_is_retryable, attempts=attempts, timeout=None,
            wait_initial=MIN_PAUSE_SECONDS, wait_max=MAX_PAUSE_SECONDS, wait_jitter=MIN_PAUSE_SECONDS,
        ):  # fmt: skip
            with attempt:
                result = Replaced(attempts=attempt.num)
                try:
                    await replacement.run(result)
                except DatabaseError as error:
                    if await replacement.is_committed():  # but the answer was lost
                        break
                    _log.warning("the rows could not be replaced in attempt %d: %s", attempt.num, error)
                    raise
    except DatabaseError as error:
        holders = await replacement.lock_holders() if error.sqlstate in LOCK_STATES else ""
        raise BackupError(f"the rows could not be replaced: {error}{holders}. Nothing was changed") from error
    return result


def _is_retryable(error: Exception) -> bool:
    return isinstance(error, DatabaseUnavailable)


class _Replacement:
    """One replacement of rows, which may take several attempts."""

    def __init__(
        self,
        live: ConnectTarget,
        schemas: Placement,
        place: Place,
        names: Sequence[Name],
        sequences: Mapping[Name, SequenceState],
        is_partial: bool,
        guild_id: int | None,
        revoke_lease: bool,
        lock_seconds: float,
        progress: Progress,
    ) -> None:
        self._live = live
        self._schemas = schemas
        self._place = place
        self._names = [name for name in names if name[0] != schemas.ops and name[1] != VERSION_TABLE]
        self._ops_names = [name for name in names if name[0] == schemas.ops]
        self._sequences = sequences
        self._is_partial = is_partial
        self._guild_id = guild_id
        self._revoke_lease = revoke_lease
        self._lock_seconds = lock_seconds
        self._progress = progress
        #: Id of the transaction of the last attempt; None before it wrote anything.
        self._xid: str | None = None

    async def run(self, result: Replaced) -> None:
        self._xid = None
        async with connect(self._live) as connection:
            with translate_errors("replacing the rows"):
                async with connection.transaction(isolation="read_committed"):
                    await self._run(connection, result)

    async def _run(self, connection: Connection, result: Replaced) -> None:
        # Otherwise the session of a killed process goes on until its statement ends.
        await connection.execute(
            "SELECT set_config(name, '1s', true) FROM pg_settings WHERE name = 'client_connection_check_interval'"
        )
        await connection.execute(
            # Without a path, every name in a definition has its schema. Rows are compared by joins of whole tables.
            f"SET LOCAL work_mem = '{WORK_MEM}'; SET LOCAL search_path = pg_catalog; SET LOCAL row_security = off;"
            f" SET LOCAL idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'"
        )
        tables = await find_tables(connection, self._names)
        await self._lock(connection, tables)
        self._xid = await connection.fetchval("SELECT pg_current_xact_id()::text")
        added = [] if self._is_partial else await add_missing_tables(connection, self._schemas, self._place.schemas)
        result.brought_back = [table.quoted for table in added]
        pairs = await self._pairs(connection, tables)
        await self._check_foreign_keys(connection, tables, pairs)
        await self._check_own_foreign_keys(connection, pairs)
        enabling = await _disable_triggers(connection, tables)
        await self._replace(connection, pairs, result)
        await self._check_counts(connection, pairs)
        with _violated_keys():
            await connection.execute("SET CONSTRAINTS ALL IMMEDIATE")  # a table with pending checks is not altered
        for statement in enabling:
            await connection.execute(statement)
        await self._raise_sequences(connection, [*tables, *added])
        await self._merge_ops(connection, pairs, result)
        await announce(connection, {self._schemas.shown(table.schema, table.name) for table in [*tables, *added]})

    async def is_committed(self) -> bool:
        """Return whether the last attempt was committed after all."""
        if self._xid is None:
            return False
        try:
            async with connect(self._live) as connection:
                status = await connection.fetchval("SELECT pg_xact_status($1::text::xid8)", self._xid)
        except DatabaseError as error:
            _log.warning("could not find out whether the rows were replaced: %s", error)
            return False
        return bool(status == "committed")

    async def lock_holders(self) -> str:
        """Return the end of an error message that names who holds locks on the tables; empty if nobody does."""
        return await describe_lock_holders(self._live, [qualified(name) for name in self._names], "EXCLUSIVE")

    async def _lock(self, connection: Connection, tables: Sequence[OwnTable]) -> None:
        """Lock the tables against writing."""
        timeout = f"SET LOCAL lock_timeout = '{self._lock_seconds:g}s'"
        await connection.execute(timeout)
        async with connect(self._live) as gate, gate.transaction():
            # A bot's transactions lock a row of `ops.leases` before anything else. While none of them holds a lock on
            # the tables, locking all of them cannot end in a deadlock with one.
            await gate.execute(timeout)
            await lease.block_writers(gate)
            names = ", ".join(table.quoted for table in tables)
            await connection.execute(f"LOCK TABLE {names} IN EXCLUSIVE MODE")
        await connection.execute("SET LOCAL lock_timeout = 0")

    async def _pairs(self, connection: Connection, tables: Sequence[OwnTable]) -> list[_Pair]:
        """Return how to replace the rows of each table, in the order in which rows are added."""
        live = [table.quoted for table in tables]
        scratch = [
            qualified((self._place.schemas.resolve(self._schemas.spell(table.schema)), table.name)) for table in tables
        ]
        pairs = {
            live[row["number"] - 1]: _Pair(
                (tables[row["number"] - 1].schema, tables[row["number"] - 1].name),
                live[row["number"] - 1],
                scratch[row["number"] - 1],
                row["is_partitioned"],
                dict(zip(row["columns"], row["casts"], strict=True)),
                row["key"],
                row["must_update"],
                self._guild_id,
            )
            for row in await connection.fetch(_SQL["shapes"], live, scratch)
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

    async def _check_foreign_keys(
        self, connection: Connection, tables: Sequence[OwnTable], pairs: Sequence[_Pair]
    ) -> None:
        """Raise `BackupError` if rows of tables that are not replaced refer to rows that are not in the backup."""
        parts = [name for table in tables for name in table.relations]
        shown = {row["shown"]: row["pair"] for row in await connection.fetch(
            "SELECT name::regclass::text AS shown, pair FROM unnest($1::text[], $2::text[]) AS t (name, pair)",
            parts,
            [table.quoted for table in tables for _ in table.relations],
        )}  # fmt: skip
        by_name = {pair.live: pair for pair in pairs}
        ours = await self._own_relations(connection)
        for key in await connection.fetch(_SQL["foreign_keys"], parts, parts):
            pair = by_name[shown[key["target"]]]
            await self._check_foreign_key(connection, key, pair, is_ours=key["source"] in ours)

    async def _own_relations(self, connection: Connection) -> set[str]:
        return {name for table in await find_tables(connection, owned_names(self._schemas)) for name in table.relations}

    async def _check_foreign_key(
        self, connection: Connection, key: asyncpg.Record, pair: _Pair, *, is_ours: bool
    ) -> None:
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

    async def _check_own_foreign_keys(self, connection: Connection, pairs: Sequence[_Pair]) -> None:
        """Raise `BackupError` if rows of the backup refer to rows of tables that are not replaced, and do not exist."""
        by_name = {pair.live: pair for pair in pairs}
        ours = await self._own_relations(connection)
        for key in await connection.fetch(_SQL["own_foreign_keys"], list(by_name)):
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

    async def _replace(self, connection: Connection, pairs: Sequence[_Pair], result: Replaced) -> None:
        for pair in reversed(pairs):
            try:
                status = await connection.execute(pair.delete(), *pair.arguments, timeout=LOAD_SECONDS)
            except asyncpg.ForeignKeyViolationError as error:
                other = f"{error.schema_name}.{error.table_name}"
                raise BackupError(
                    f"rows of {pair.live} are not in the backup, but rows of {other} refer to them (foreign key"
                    f" {error.constraint_name}): delete those first, or point them elsewhere. Nothing was changed"
                ) from error
            result.deleted += _affected(status)
        for done, pair in enumerate(pairs, start=1):
            with _violated_keys():
                if (update := pair.update()) is not None:
                    result.changed += _affected(await connection.execute(update, timeout=LOAD_SECONDS))
                result.added += _affected(await connection.execute(pair.insert(), timeout=LOAD_SECONDS))
            self._progress(Step("replacing rows", done, len(pairs), "tables"))

    async def _check_counts(self, connection: Connection, pairs: Sequence[_Pair]) -> None:
        """Raise `BackupError` unless every live table has as many rows as its scratch table."""
        for pair in pairs:
            live, scratch = await connection.fetchrow(  # type: ignore[misc] # one row
                f"SELECT (SELECT count(*) FROM {pair.only} AS t WHERE true{pair.scope}),"  # noqa: S608
                f" (SELECT count(*) FROM {pair.scratch})",
                *pair.arguments,
                timeout=LOAD_SECONDS,
            )
            if live != scratch:
                raise BackupError(
                    f"{pair.live} would have {live:,} rows instead of {scratch:,}: does a rule of another program"
                    " change what is written to it? Nothing was changed"
                )

    async def _raise_sequences(self, connection: Connection, tables: Sequence[OwnTable]) -> None:
        for name in await find_sequences(connection, tables):
            if (state := self._sequences.get(name)) is not None:
                quoted = qualified(name)
                await connection.execute(
                    _SQL["raise_sequence"].format(name=quoted), quoted, state.last_value, state.is_called
                )

    # --- the rows of ops

    async def _merge_ops(self, connection: Connection, pairs: Sequence[_Pair], result: Replaced) -> None:
        """Add the backup's rows of `ops` if the live database began anew, and revoke the lease where necessary."""
        if self._guild_id is not None:
            return  # documents have no stamps: neither the leases nor the rest of `ops` concern them
        here = self._place.schemas.ops
        live = await lease.list_epochs(connection)
        epochs = await lease.list_epochs(connection, qualified((here, "leases")))
        result.has_diverged = lease.has_diverged(live, epochs)
        if self._is_partial and not epochs:  # the backup may be of some tables, and not have the leases
            newest = await self._newest_epoch(connection, pairs)
            outranked = {shard: newest for shard, (epoch, _) in live.items() if epoch < newest}
            await lease.raise_epochs(connection, outranked)
            if outranked and not self._revoke_lease:
                await lease.depose(connection)
        if result.has_diverged:
            for schema, name in self._ops_names:
                result.ops_rows[name] = await _add_rows(connection, (here, name), (schema, name))
            # Later stamps must exceed those in the restored rows.
            await lease.raise_epochs(connection, {shard: epoch for shard, (epoch, _) in epochs.items()})
        if result.has_diverged or self._revoke_lease:
            # Nobody holds the new epoch, so the current holder finds that it has lost the lease.
            await lease.depose(connection)

    async def _newest_epoch(self, connection: Connection, pairs: Sequence[_Pair]) -> int:
        """Return the newest epoch in the stamps of the rows that are live now; 0 if they have none."""
        mirrored = {(self._schemas.main, name) for name in mirrored_tables()}
        stamps = [
            await connection.fetchval(f"SELECT max(stamp) FROM {pair.live}", timeout=LOAD_SECONDS)  # noqa: S608
            for pair in pairs
            if pair.name in mirrored
        ]
        return max((stamp >> COUNTER_BITS for stamp in stamps if stamp is not None), default=0)


async def _add_rows(connection: Connection, source: Name, into: Name) -> int:
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
    return _affected(status)


async def _disable_triggers(connection: Connection, tables: Sequence[OwnTable]) -> list[str]:
    """Keep other programs' triggers from firing, as when rows are loaded before triggers are made.

    Returns the statements that enable them again.
    """
    parts = [name for table in tables for name in table.relations]
    enabling = []
    for row in await connection.fetch(_SQL["triggers"], parts):
        await connection.execute(f"ALTER TABLE {row['table']} DISABLE TRIGGER {row['name']}")
        enabling.append(f"ALTER TABLE {row['table']} {_ENABLE[row['state']]} TRIGGER {row['name']}")
    return enabling


@contextlib.contextmanager
def _violated_keys() -> Iterator[None]:
    """Raise `BackupError` for rows of the backup that refer to rows which do not exist."""
    try:
        yield
    except asyncpg.ForeignKeyViolationError as error:
        raise BackupError(
            f"rows of {error.schema_name}.{error.table_name} in the backup refer to rows that do not exist (foreign key"
            f" {error.constraint_name}): restore that table too, or add the rows first. Nothing was changed"
        ) from error


def _affected(status: str) -> int:
    """Return the number of rows in a command tag; 0 for a command that does not count."""
    with contextlib.suppress(ValueError):
        return int(status.rsplit(" ", 1)[-1])
    return 0
