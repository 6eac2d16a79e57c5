"""Creates a backup: pg_dump and exact row counts on one snapshot, checksums on the way, and the manifest last."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any

import asyncpg

from utils.database import ConnectTarget, Pool, ownership
from utils.database.locks import describe_lock_holders
from utils.database.placement import Placement
from utils.database.recorded_packs import RecordedPack, fetch_packs, revisions_of_packs
from utils.database.sessions import ATTEMPT_SECONDS, Connection, connect
from utils.exceptions import BackupError, NothingToBackUp, UnknownBackup, UploadFailed, translate_errors
from utils.operations.action import Progress, ignore_progress
from utils.operations.backup.archive import client_tools, encryption
from utils.operations.backup.archive.manifest import (
    ARCHIVE_SUFFIX,
    ENCRYPTED_SUFFIX,
    VERSION_TABLES,
    Kind,
    Manifest,
    Reason,
    new_id,
)
from utils.operations.backup.archive.objects import (
    OwnTable,
    find_sequences,
    find_tables,
    find_views,
    owned_names,
    qualified,
)
from utils.operations.backup.archive.pipeline import Command, Digest, run
from utils.operations.backup.catalog import BackupCatalog
from utils.service import application
from utils.settings import Settings

_log = logging.getLogger(__name__)

#: gzip level. Archives of a mirror are a sixth larger than with pg_dump's default of 6, in half the time.
COMPRESSION = 1
#: Seconds to count one table, and for pg_dump to wait for a locked table.
COUNT_SECONDS, LOCK_SECONDS = 3_600.0, 60
#: Seconds for any other statement of the snapshot's session, and for closing it.
STATEMENT_SECONDS, CLOSE_SECONDS = 60.0, 10.0
#: Timeouts that the server, database or role may set and that a long backup would exceed; only 17 has the last one.
_TIMEOUTS = ["statement_timeout", "idle_in_transaction_session_timeout", "transaction_timeout"]
#: First server version with `client_connection_check_interval`.
_HAS_CLIENT_CHECK = 140_000


@dataclass(frozen=True, slots=True)
class BackupRequest:
    """What to back up, and why."""

    reason: Reason = "manual"
    #: Names of tables, as SQL spells them (`members`, `ops.leases`) or with their schema; empty for all.
    tables: Sequence[str] = ()
    schema_only: bool = False

    @property
    def kind(self) -> Kind:
        """The kind of backup that results."""
        return "schema" if self.schema_only else "tables" if self.tables else "full"


async def create(
    pool: Pool,
    catalog: BackupCatalog,
    request: BackupRequest,
    *,
    progress: Progress = ignore_progress,
    lock_seconds: float = LOCK_SECONDS,
) -> Manifest:
    """Back up the database into every store of the catalog, and return the manifest.

    `lock_seconds` is how long pg_dump waits for a locked table. Raises `BackupError`. A failed or cancelled backup
    leaves nothing behind, unless only the upload failed (`UploadFailed`): then the local copy stays.
    """
    direct = pool.direct
    if direct.pooled:
        raise BackupError(f"{direct} is a pooler, and pg_dump needs a direct connection: set DATABASE_UNPOOLED_URL")
    started = time.monotonic()
    catalog = await catalog.serving(pool)
    local, recipient = catalog.local, catalog.settings.backup_age_recipient
    tools = await client_tools.find_directory(pool.server_version_num // 10_000)
    try:
        await asyncio.to_thread(local.prepare)
    except OSError as exc:
        raise BackupError(f"{local.name} cannot be written to: {exc.strerror}") from exc
    id = new_id(catalog.clock())
    name = id + (ENCRYPTED_SUFFIX if recipient else ARCHIVE_SUFFIX)
    plaintext = catalog.plaintext_path(id)
    with contextlib.ExitStack() as stack:
        unfinished = stack.enter_context(local.unfinished(name))
        async with _snapshot(direct, pool.placement) as snapshot:
            tables = await _select_tables(snapshot, request)
            command = _dump_command(
                tools,
                direct,
                snapshot.name,
                await _list_relations(snapshot, tables, request),
                request,
                lock_seconds=lock_seconds,
                checks_client=pool.server_version_num >= _HAS_CLIENT_CHECK,
            )
            commands = [command]
            if recipient:
                commands.append(Command(encryption.encrypt_command(recipient), dict(os.environ)))
            try:
                digests, rows = await _dump_and_count(
                    run(commands, unfinished, copy=plaintext if catalog.keeps_plaintext else None, progress=progress),
                    _count_rows(snapshot.connection, () if request.schema_only else tables),
                )
            except BaseException as exc:
                await asyncio.to_thread(plaintext.unlink, missing_ok=True)
                relations = [name for table in tables for name in table.relations]
                if isinstance(exc, BackupError) and (
                    holders := await describe_lock_holders(direct, relations, "ACCESS SHARE")
                ):
                    raise BackupError(f"{exc}{holders}") from exc
                raise
        kind = request.kind
        made_at = snapshot.facts["at"].astimezone(UTC)
        manifest = Manifest(
            id=id,
            created_at=made_at.isoformat(timespec="milliseconds"),
            kind=kind,
            reason=request.reason,
            file=name,
            size=digests[-1].size,
            sha256=digests[-1].sha256,
            plain_size=digests[0].size,
            plain_sha256=digests[0].sha256,
            recipient=recipient,
            database=snapshot.facts["database"],
            server=snapshot.facts["version"],
            tool=await client_tools.program_version(tools / "pg_dump") or "",
            revision=snapshot.revision,
            packs=revisions_of_packs(snapshot.packs),
            rows=rows,
            seconds=round(time.monotonic() - started, 2),
            application_id=snapshot.application_id,
            host=direct.location,
            ordered_at=(await catalog.order_after(made_at)).isoformat(timespec="milliseconds"),
        )
        if kind == "full" and not manifest.data_rows:
            if request.reason == "scheduled":
                await asyncio.to_thread(plaintext.unlink, missing_ok=True)
                raise NothingToBackUp(
                    f"the database {manifest.database} has no rows: it was not backed up, because no empty backup may"
                    " replace the others"
                )
            manifest = replace(manifest, kind="empty")
        try:
            await catalog.add(unfinished, manifest, progress=progress)
        except UploadFailed as exc:
            # A safety copy serves to undo what follows, for which the local copy is enough.
            if not manifest.is_safety_copy:
                raise
            _log.warning("%s", exc)
    return manifest


# --- the snapshot


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """An open transaction that sees one moment of the database."""

    connection: Connection
    #: Its name for pg_dump's `--snapshot`.
    name: str
    #: Its time (`at`), `database` and server `version`.
    facts: asyncpg.Record
    revision: str | None
    #: The application that the database belongs to; None before the first login.
    application_id: int | None
    schemas: Placement
    #: What it has tables of besides Guildbook, whether or not `COGS` names it.
    packs: list[RecordedPack]

    def owned_names(self) -> list[tuple[str, str]]:
        """Return the names of all tables that are ours."""
        return owned_names(self.schemas, self.revision, others={name for pack in self.packs for name in pack.names()})


@contextlib.asynccontextmanager
async def _snapshot(target: ConnectTarget, placement: Placement) -> AsyncIterator[_Snapshot]:
    with translate_errors(f"snapshot of {target.database}"):
        connection: Connection = await asyncpg.connect(
            **target.connect_kwargs(), timeout=ATTEMPT_SECONDS, command_timeout=STATEMENT_SECONDS
        )
        try:
            transaction = connection.transaction(isolation="repeatable_read", readonly=True)
            await transaction.start()
            await connection.execute(
                "SELECT set_config(name, '0', true) FROM pg_settings WHERE name = ANY($1::text[])", _TIMEOUTS
            )
            await connection.execute("SELECT set_config('lock_timeout', $1, true)", f"{LOCK_SECONDS}s")
            facts = await connection.fetchrow(
                "SELECT pg_export_snapshot() AS snapshot, now() AS at, current_database() AS database,"
                " current_setting('server_version') AS version"
            )
            assert facts is not None, "one row"
            revision = (await ownership.fetch_version(connection, placement)).revision
            application_id = await application.fetch_owner(connection)
            found = await fetch_packs(connection, placement)
            yield _Snapshot(connection, facts["snapshot"], facts, revision, application_id, placement, found)
        finally:
            # Closing also tells the server to stop a count that was cancelled here.
            with contextlib.suppress(TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await connection.close(timeout=CLOSE_SECONDS)
            connection.terminate()


async def _select_tables(snapshot: _Snapshot, request: BackupRequest) -> list[OwnTable]:
    """Return the tables to dump. Raises `BackupError` for names that are not ours."""
    schemas = snapshot.schemas
    tables = await find_tables(snapshot.connection, snapshot.owned_names())
    if not tables:
        raise BackupError(
            f"database {snapshot.facts['database']} has no tables of Guildbook's in schema {schemas.main}: there is"
            " nothing to back up"
        )
    if not request.tables:
        return tables
    shown = {schemas.shown(table.schema, table.name): table for table in tables}
    by_name = {f"{table.schema}.{table.name}": table for table in tables} | shown
    unknown = [name if "." in name else f"{schemas.main}.{name}" for name in request.tables if name not in by_name]
    if unknown:
        raise UnknownBackup(f"there is no table {', '.join(unknown)}: choose from {', '.join(sorted(shown))}")
    return list(dict.fromkeys(by_name[name] for name in request.tables))


async def _list_relations(snapshot: _Snapshot, tables: Sequence[OwnTable], request: BackupRequest) -> list[str]:
    """Return everything to dump, in SQL: the tables, their partitions and sequences and, of a whole backup, views."""
    relations = [name for table in tables for name in table.relations]
    others = await find_sequences(snapshot.connection, tables)
    if not request.tables:
        others += await find_views(snapshot.connection, snapshot.schemas)
    return [*relations, *map(qualified, others)]


async def _count_rows(connection: Connection, tables: Sequence[OwnTable]) -> dict[str, int]:
    rows: dict[str, int] = {}
    for table in tables:
        query = "SELECT count(*) FROM " + table.counted  # noqa: S608 - quoted by the server
        rows[f"{table.schema}.{table.name}"] = await connection.fetchval(query, timeout=COUNT_SECONDS)
    return dict(sorted(rows.items()))


async def count_live_rows(pool: Pool) -> int:
    """Return the number of rows that a backup made now would have, as in `Manifest.data_rows`.

    Raises `DatabaseError`.
    """
    schemas = pool.placement
    async with connect(pool.direct) as connection:
        with translate_errors("counting rows"):
            revision = (await ownership.fetch_version(connection, schemas)).revision
            found = await fetch_packs(connection, schemas)
            others = {name for pack in found for name in pack.names()}
            tables = await find_tables(connection, owned_names(schemas, revision, others=others))
            versions = {*VERSION_TABLES, *(pack.version_table for pack in found)}
            data = [one for one in tables if one.schema != schemas.ops and one.name not in versions]
            return sum((await _count_rows(connection, data)).values())


# --- dumping


def _dump_command(
    tools: Path,
    target: ConnectTarget,
    snapshot: str,
    relations: Sequence[str],
    request: BackupRequest,
    *,
    lock_seconds: float = LOCK_SECONDS,
    checks_client: bool = True,
) -> Command:
    arguments = [
        str(tools / "pg_dump"), "--format=custom", f"--compress={COMPRESSION}", "--no-owner", "--no-privileges",
        "--no-publications", "--no-subscriptions", "--no-security-labels", "--encoding=UTF8",
        f"--snapshot={snapshot}", f"--lock-wait-timeout={lock_seconds:g}s", "--no-password",
    ]  # fmt: skip
    if request.schema_only:
        arguments.append("--schema-only")
    # As patterns, quoted names match themselves. Without any, pg_dump would dump the whole database.
    arguments += [f"--table={name}" for name in relations]
    arguments += ["--dbname", target.libpq_url()]
    environment = client_tools.environment()
    if checks_client:
        # Without it, the session of a killed pg_dump stays as long as it waits for a lock.
        environment["PGOPTIONS"] = "-c client_connection_check_interval=1s"
    return Command(arguments, {**environment, "LC_ALL": "C", **target.libpq_environment()})


async def _dump_and_count(
    dumping: Coroutine[Any, Any, list[Digest]], counting: Coroutine[Any, Any, dict[str, int]]
) -> tuple[list[Digest], dict[str, int]]:
    """Run both and return both results; the first failure cancels the other."""
    dump, count = asyncio.create_task(dumping), asyncio.create_task(counting)
    try:
        await asyncio.wait({dump, count}, return_when=asyncio.FIRST_EXCEPTION)
        for task in (dump, count):
            if task.done():
                task.result()
        return dump.result(), count.result()
    finally:
        dump.cancel()
        count.cancel()
        await asyncio.wait({dump, count})
        for task in (dump, count):
            if not task.cancelled():
                task.exception()  # marks it as retrieved: the first failure is the one that is raised


# --- before something is destroyed


def backup_before(
    reason: Reason,
    settings: Settings,
    pool: Pool,
    progress: Progress = ignore_progress,
    *,
    reuse: timedelta | None = None,
) -> Callable[[], Awaitable[str]]:
    """Return a function that backs the database up and returns the backup's id; it raises `BackupError`.

    reuse: how old a backup may be that was made for the same reason, at the same revision and with as many rows, so
    that no other one is needed: a bot that starts again and again must not fill the disk. None: always make one.
    """

    async def make() -> str:
        catalog = BackupCatalog(settings)
        found = None if reuse is None else await _find_equal(reason, catalog, pool, reuse)
        return found or (await create(pool, catalog, BackupRequest(reason), progress=progress)).id

    return make


async def _find_equal(reason: Reason, catalog: BackupCatalog, pool: Pool, age: timedelta) -> str | None:
    revision = (await ownership.fetch_version(pool)).revision
    rows = await count_live_rows(pool)
    found = revisions_of_packs(await fetch_packs(pool))
    for entry in await (await catalog.serving(pool)).entries():
        manifest = entry.manifest
        if manifest is None or entry.intact is None or not entry.is_own or not timedelta(0) <= entry.age <= age:
            continue
        of_backup = (manifest.reason, manifest.revision, manifest.packs, manifest.data_rows)
        if of_backup == (reason, revision, found, rows):
            return entry.id
    return None
