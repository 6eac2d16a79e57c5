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
from pathlib import Path

import asyncpg
import stamina

from models import mirrored_tables
from utils.database import ConnectTarget
from utils.database.cache.channel import announce
from utils.database.locks import LOCK_STATES, describe_lock_holders
from utils.database.ownership import VERSION_TABLE
from utils.database.placement import Placement
from utils.database.sessions import Connection, connect
from utils.database.sql import load_statements, quote_identifier
from utils.exceptions import BackupError, DatabaseError, DatabaseUnavailable, translate_errors
from utils.mirror.records.rows import COUNTER_BITS
from utils.operations.action import Progress, Step, ignore_progress
from utils.operations.backup.archive.objects import (
    Name,
    OwnTable,
    find_sequences,
    find_tables,
    owned_names,
    qualified,
)
from utils.operations.backup.archive.script import SequenceState
from utils.operations.backup.restore.foreign_keys import check_keys_from, check_keys_onto
from utils.operations.backup.restore.missing_tables import add_missing_tables
from utils.operations.backup.restore.pairs import Pair, add_rows, affected, find_pairs
from utils.operations.backup.scratch.load import LOAD_SECONDS, Place
from utils.service import lease

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

#: How a trigger is enabled again, by pg_trigger.tgenabled.
_ENABLE = {"O": "ENABLE", "R": "ENABLE REPLICA", "A": "ENABLE ALWAYS"}


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
        scratch = [(self._place.schemas.resolve(self._schemas.spell(table.schema)), table.name) for table in tables]
        pairs = await find_pairs(connection, tables, scratch, self._guild_id)
        await check_keys_onto(connection, self._schemas, tables, pairs)
        await check_keys_from(connection, self._schemas, pairs)
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

    async def _replace(self, connection: Connection, pairs: Sequence[Pair], result: Replaced) -> None:
        for pair in reversed(pairs):
            try:
                status = await connection.execute(pair.delete(), *pair.arguments, timeout=LOAD_SECONDS)
            except asyncpg.ForeignKeyViolationError as error:
                other = f"{error.schema_name}.{error.table_name}"
                raise BackupError(
                    f"rows of {pair.live} are not in the backup, but rows of {other} refer to them (foreign key"
                    f" {error.constraint_name}): delete those first, or point them elsewhere. Nothing was changed"
                ) from error
            result.deleted += affected(status)
        for done, pair in enumerate(pairs, start=1):
            with _violated_keys():
                if (update := pair.update()) is not None:
                    result.changed += affected(await connection.execute(update, timeout=LOAD_SECONDS))
                result.added += affected(await connection.execute(pair.insert(), timeout=LOAD_SECONDS))
            self._progress(Step("replacing rows", done, len(pairs), "tables"))

    async def _check_counts(self, connection: Connection, pairs: Sequence[Pair]) -> None:
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

    async def _merge_ops(self, connection: Connection, pairs: Sequence[Pair], result: Replaced) -> None:
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
                result.ops_rows[name] = await add_rows(connection, (here, name), (schema, name))
            # Later stamps must exceed those in the restored rows.
            await lease.raise_epochs(connection, {shard: epoch for shard, (epoch, _) in epochs.items()})
        if result.has_diverged or self._revoke_lease:
            # Nobody holds the new epoch, so the current holder finds that it has lost the lease.
            await lease.depose(connection)

    async def _newest_epoch(self, connection: Connection, pairs: Sequence[Pair]) -> int:
        """Return the newest epoch in the stamps of the rows that are live now; 0 if they have none."""
        mirrored = {(self._schemas.main, name) for name in mirrored_tables()}
        stamps = [
            await connection.fetchval(f"SELECT max(stamp) FROM {pair.live}", timeout=LOAD_SECONDS)  # noqa: S608
            for pair in pairs
            if pair.name in mirrored
        ]
        return max((stamp >> COUNTER_BITS for stamp in stamps if stamp is not None), default=0)


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
