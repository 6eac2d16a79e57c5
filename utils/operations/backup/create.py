"""Make a backup: pg_dump and exact counts on one snapshot, checksums on the way, and the manifest last."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import Any

import asyncpg

from utils.database import ConnectTarget, Pool
from utils.database.pool import ATTEMPT_SECONDS
from utils.exceptions import BackupError, translate
from utils.operations.action import Progress, Step, ignore_progress
from utils.operations.backup import encryption, tools
from utils.operations.backup.manifest import ARCHIVE, ENCRYPTED, SUFFIX, Kind, Manifest, new_id
from utils.operations.backup.pipeline import Command, Passed, run
from utils.operations.backup.retention import SAFETY
from utils.operations.backup.store import Directory, Remote

_log = logging.getLogger(__name__)

#: gzip's fastest: on rows of a mirror its archives are a sixth larger than those of pg_dump's own 6, in half the time.
COMPRESSION = 1
#: Seconds for one table to be counted; for pg_dump to wait for a table that is locked.
COUNT_SECONDS, LOCK_SECONDS = 3_600.0, 60
#: Seconds for any other statement of the snapshot's session, and for its end.
STATEMENT_SECONDS, GOODBYE_SECONDS = 60.0, 10.0
#: Limits that the server, the database or the role may set, and that a long backup would run into; 17 has the last.
_LIMITS = ["statement_timeout", "idle_in_transaction_session_timeout", "transaction_timeout"]
#: PostgreSQL 14 has `client_connection_check_interval`.
_CHECKS_CLIENT = 140_000
#: The archive before encryption, for drills without an identity; begins with a dot, so that no store lists it.
PLAIN = ".plain-"

#: Tables that pg_dump dumps rows of, partitions through their parents.
_TABLES = """
SELECT n.nspname AS schema, c.relname AS name, format('%I.%I', n.nspname, c.relname) AS quoted,
    ARRAY(SELECT format('%I.%I', pn.nspname, p.relname) FROM pg_partition_tree(c.oid) AS t
        JOIN pg_class AS p ON p.oid = t.relid JOIN pg_namespace AS pn ON pn.oid = p.relnamespace) AS parts
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence <> 't'
    AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\\_%'
    AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
        AND d.deptype = 'e')
ORDER BY c.relpages DESC, 1, 2
"""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to back up."""

    reason: str = "manual"
    #: Names, with a schema or without; empty: everything.
    tables: Sequence[str] = ()
    schema_only: bool = False

    @property
    def kind(self) -> Kind:
        """What that makes it."""
        return "schema" if self.schema_only else "tables" if self.tables else "full"


@dataclass(frozen=True, slots=True)
class Places:
    """Where it goes, and how."""

    local: Directory
    #: None: nowhere else.
    remote: Remote | None = None
    #: The age recipient; None: it is not encrypted.
    recipient: str | None = None
    #: Whether the archive before encryption stays beside it until the next one.
    keeps_plain: bool = False


async def create(database: Pool, places: Places, wanted: Wanted, *, progress: Progress = ignore_progress) -> Manifest:
    """Back the database up and return the manifest.

    Raises `BackupError`; nothing is left of a backup that failed or was called off, unless all that failed was to store
    it elsewhere as well.
    """
    direct = database.direct
    if direct.pooled:
        raise BackupError(f"{direct} is a pooler, and pg_dump needs the server itself: set DATABASE_UNPOOLED_URL")
    started = time.monotonic()
    local = places.local
    directory = await tools.found(database.server_version_num // 10_000)
    try:
        await asyncio.to_thread(local.prepare)
    except OSError as exc:
        raise BackupError(f"{local.name} cannot be written to: {exc.strerror}") from exc
    id = new_id()
    name = id + (ENCRYPTED if places.recipient else ARCHIVE)
    with contextlib.ExitStack() as stack:
        unfinished = stack.enter_context(local.unfinished(name))
        plain = local.path / f"{PLAIN}{id}"
        async with _snapshot(direct) as (connection, snapshot, facts):
            tables = await _chosen(connection, wanted)
            checks = database.server_version_num >= _CHECKS_CLIENT
            programs = [_dump(directory, direct, snapshot, tables, wanted, checks_client=checks)]
            if places.recipient:
                programs.append(Command(encryption.encryption(places.recipient), dict(os.environ)))
            copy = plain if places.recipient and places.keeps_plain else None
            try:
                passed, rows = await _both(
                    run(programs, unfinished, copy=copy, progress=progress),
                    _counted(connection, () if wanted.schema_only else tables),
                )
            except BaseException as exc:
                await asyncio.to_thread(plain.unlink, missing_ok=True)
                if isinstance(exc, BackupError) and "LOCK TABLE" in str(exc):
                    raise BackupError(
                        f"a table stayed locked by somebody else for {LOCK_SECONDS} s: try again later ({exc})"
                    ) from exc
                raise
        manifest = Manifest(
            id=id,
            created_at=facts["at"].astimezone(UTC).isoformat(timespec="milliseconds"),
            kind=wanted.kind,
            reason=wanted.reason,
            file=name,
            size=passed[-1].size,
            sha256=passed[-1].sha256,
            plain_size=passed[0].size,
            plain_sha256=passed[0].sha256,
            recipient=places.recipient,
            database=facts["database"],
            server=facts["version"],
            tool=await tools.version(directory / "pg_dump") or "",
            revision=facts["revision"],
            rows=rows,
            seconds=round(time.monotonic() - started, 2),
        )
        await asyncio.to_thread(local.finish, unfinished, name)
        await local.write(f"{id}{SUFFIX}", manifest.packed())
    await asyncio.to_thread(_forget_plain, local.path, id)
    if places.remote is not None:
        try:
            await _upload(places.remote, local.path / name, manifest, progress)
        except BackupError as exc:
            told = f"backup {id} is whole in {local.name}, but not stored elsewhere: {exc}"
            if not wanted.reason.startswith(SAFETY):  # for taking something back, the one that is here is enough
                raise BackupError(told) from exc
            _log.warning("%s", told)
    return manifest


async def _both(
    dumping: Coroutine[Any, Any, list[Passed]], counting: Coroutine[Any, Any, dict[str, int]]
) -> tuple[list[Passed], dict[str, int]]:
    """Return what both return; as soon as one fails, the other is called off."""
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
                task.exception()  # what the other one failed with is told; this one's is not missed


def _forget_plain(directory: Path, but: str) -> None:
    for path in directory.glob(f"{PLAIN}*"):
        if path.name != f"{PLAIN}{but}":
            path.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def _snapshot(target: ConnectTarget) -> AsyncIterator[tuple[Any, str, dict[str, Any]]]:
    """Lend a connection whose transaction sees one moment, that moment's name for pg_dump, and what it is."""
    try:
        connection = await asyncpg.connect(
            **target.connect_kwargs(), timeout=ATTEMPT_SECONDS, command_timeout=STATEMENT_SECONDS
        )
        try:
            transaction = connection.transaction(isolation="repeatable_read", readonly=True)
            await transaction.start()
            await connection.execute(
                "SELECT set_config(name, '0', true) FROM pg_settings WHERE name = ANY($1::text[])", _LIMITS
            )
            await connection.execute("SELECT set_config('lock_timeout', $1, true)", f"{LOCK_SECONDS}s")
            facts = await connection.fetchrow(
                "SELECT pg_export_snapshot() AS snapshot, now() AS at, current_database() AS database,"
                " current_setting('server_version') AS version,"
                " to_regclass('public.alembic_version') IS NOT NULL AS is_ours"
            )
            assert facts is not None, "one row"
            revision = None
            if facts["is_ours"]:
                revision = await connection.fetchval("SELECT version_num FROM public.alembic_version")
            yield connection, facts["snapshot"], {**facts, "revision": revision}
        finally:
            # A count that was called off goes on in the server unless it is told so, which closing does.
            with contextlib.suppress(TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await connection.close(timeout=GOODBYE_SECONDS)
            connection.terminate()
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as exc:
        raise translate(exc) or exc from exc


async def _chosen(connection: Any, wanted: Wanted) -> list[Any]:
    """Return the tables to be dumped. Raises `BackupError` for names that are none."""
    found = await connection.fetch(_TABLES)
    if not wanted.tables:
        return list(found)
    by_name = {f"{row['schema']}.{row['name']}": row for row in found}
    names = [name if "." in name else f"public.{name}" for name in wanted.tables]
    unknown = [name for name in names if name not in by_name]
    if unknown:
        there = ", ".join(sorted(name.removeprefix("public.") for name in by_name))
        raise BackupError(f"there is no table {', '.join(unknown)}; there is {there}")
    return [by_name[name] for name in dict.fromkeys(names)]


async def _counted(connection: Any, tables: Sequence[Any]) -> dict[str, int]:
    rows = {}
    for table in tables:
        query = "SELECT count(*) FROM " + table["quoted"]  # noqa: S608 - quoted by the server
        rows[f"{table['schema']}.{table['name']}"] = await connection.fetchval(query, timeout=COUNT_SECONDS)
    return dict(sorted(rows.items()))


def _dump(
    directory: Path,
    target: ConnectTarget,
    snapshot: str,
    tables: Sequence[Any],
    wanted: Wanted,
    *,
    checks_client: bool = True,
) -> Command:
    arguments = [
        str(directory / "pg_dump"), "--format=custom", f"--compress={COMPRESSION}", "--no-owner", "--no-privileges",
        f"--snapshot={snapshot}", f"--lock-wait-timeout={LOCK_SECONDS}s", "--no-password",
    ]  # fmt: skip
    if wanted.schema_only:
        arguments.append("--schema-only")
    if wanted.tables:
        names = [name for table in tables for name in (table["parts"] or [table["quoted"]])]
        arguments += [f"--table={name}" for name in names]  # as patterns, quoted names stand for themselves
    arguments += ["--dbname", target.libpq_url()]
    environment = tools.environment()
    if checks_client:
        # Else the session of a pg_dump that was killed stays for as long as it waits for a lock.
        environment["PGOPTIONS"] = "-c client_connection_check_interval=1s"
    return Command(arguments, {**environment, "LC_ALL": "C", **target.libpq_environment()})


async def _upload(remote: Remote, path: Path, manifest: Manifest, progress: Progress) -> None:
    """Put it into the remote store, read it back, and only then its manifest."""
    progress(Step(f"uploading to {remote.name}"))
    await remote.upload(path, manifest.file)
    there = await remote.checksum(manifest.file, progress)
    if (there.size, there.sha256) != (manifest.size, manifest.sha256):
        await remote.delete(manifest.file)
        raise BackupError(
            f"{remote.name} holds something else than was sent as {manifest.file} ({there.size:,} bytes, expected"
            f" {manifest.size:,}): it was deleted there; try again"
        )
    await remote.write(f"{manifest.id}{SUFFIX}", manifest.packed())
