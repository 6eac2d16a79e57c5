"""What `migrations/env.py` runs: the connection, the migration lock, and the version table."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from alembic import context
from alembic.runtime.migration import MigrationContext, MigrationInfo
from alembic.util import CommandError
from sqlalchemy import Connection, event, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from utils import packs
from utils.database import ownership, recorded_packs
from utils.database.address import open_target
from utils.database.locks import ADVISORY_HOLDER
from utils.database.orm import apply_local_settings, apply_settings_of_driver
from utils.database.ownership import SCRIPTS, VERSION_TABLE, RecordedVersion
from utils.database.placement import OPS, Placement, placement_of, with_placement
from utils.database.sessions import is_behind_pooler
from utils.database.sql import quote_identifier
from utils.database.target import ConnectTarget, located
from utils.exceptions import MigrationError
from utils.operations.migrations import batches, history, invalid_indexes
from utils.operations.migrations.comparison import comparison_options, import_models, list_partitions
from utils.operations.migrations.history import ALEMBIC, BOT, SQL_FILE, Actor, MigrationRecorder, Pause
from utils.operations.migrations.invalid_indexes import DroppedIndexes
from utils.operations.migrations.off_limits import refuse_statements
from utils.operations.migrations.revisions import Revisions
from utils.packs import Pack
from utils.settings import load_settings

_log = logging.getLogger(__name__)

#: "guildbook" as a bigint: the advisory lock that lets one process migrate at a time.
LOCK_KEY = 0x6775696C64626F6F
#: Seconds between two attempts to get that lock.
POLL_SECONDS = 0.25

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationOptions:
    """How migrations run. Only tests, and restores into scratch schemas, change the defaults."""

    #: The directory with `env.py` and `versions/`.
    scripts: Path = SCRIPTS
    #: How long a statement waits for a lock before it fails (PostgreSQL's `lock_timeout`).
    lock_timeout: str = "15s"
    #: The same for dropping an invalid index.
    index_lock_timeout: str = invalid_indexes.LOCK_TIMEOUT
    #: Schemas that no statement may name: those of the live tables, while revisions run in scratch schemas.
    off_limits: tuple[str, ...] = ()
    #: For the revisions of a pack: the directory of those of Guildbook, which the pack needs.
    base: Path = SCRIPTS
    #: Whether a pack's revisions need those of Guildbook that the pack names.
    needs_base: bool = True

    def of_pack(self, pack: Pack) -> MigrationOptions:
        """Return the same options for the revisions of a pack."""
        return replace(self, scripts=pack.scripts, base=self.scripts)


DEFAULTS = MigrationOptions()


@dataclass(slots=True, kw_only=True)
class MigrationRun:
    """One run of Alembic: what was asked for and, filled in by this module, what was done."""

    target: ConnectTarget
    options: MigrationOptions = DEFAULTS
    #: Seconds to wait for another process that migrates.
    timeout: float = 300.0
    by: Actor = BOT
    is_upgrade: bool = False
    #: Upgrade to the newest revision, of which there must be one.
    needs_one_head: bool = False
    #: Record a revision whatever is recorded now.
    is_stamp: bool = False
    #: Do nothing while AUTO_MIGRATE is paused.
    respects_pause: bool = False
    #: Called in the migrating thread with each revision.
    on_applied: Callable[[str], None] | None = None
    #: Set by the caller to stop waiting for the lock.
    is_cancelled: bool = False

    #: The server process that migrates; None through a pooler, where it changes with each transaction.
    pid: int | None = None
    #: The `application_name` of the transactions through a pooler.
    application_name: str = field(default_factory=lambda: f"guildbook-migration-{secrets.token_hex(8)}")
    #: The revision before (several, of unmerged branches: separated by commas); None: the database had no schema.
    before: str | None = None
    applied: list[str] = field(default_factory=list)
    indexes: DroppedIndexes = field(default_factory=DroppedIndexes)
    #: Why nothing was done; None unless `respects_pause`.
    paused: Pause | None = None


def run_offline() -> None:
    """Write the SQL instead of running it."""
    options: MigrationOptions = context.config.attributes.get("options", DEFAULTS)
    context.configure(
        dialect_name="postgresql",
        literal_binds=True,
        transaction_per_migration=True,
        on_version_apply=MigrationRecorder(SQL_FILE),
        **comparison_options(scripts=options.scripts),
    )
    context.execute(f"SET lock_timeout = '{options.lock_timeout}'")
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    """Run Alembic's command on the database of the `MigrationRun`; from Alembic's own command line, of the settings."""
    run: MigrationRun | None = context.config.attributes.get("run")
    if run is not None:
        asyncio.run(run_on_connection(run.target, lambda connection: _migrate(connection, run)))
        return
    try:
        import_models()  # `alembic check` compares; the bot's own runs only go up and down
    except MigrationError as exc:
        raise CommandError(str(exc)) from exc  # Alembic prints it as one line
    asyncio.run(_migrate_with_settings())


async def run_on_connection(target: ConnectTarget, work: Callable[[Connection], ResultT]) -> ResultT:
    """Return what `work` returns, given a SQLAlchemy connection that is closed afterwards.

    Where our tables are is found out first; `placement_of` returns it for the connection.
    """
    target = await located(target)
    engine = create_async_engine(
        target.sqlalchemy_url(), connect_args=target.sqlalchemy_connect_args(), poolclass=NullPool
    )
    if target.pooled:
        event.listen(engine.sync_engine, "begin", apply_local_settings)
    else:
        # First: before what SQLAlchemy asks a new connection.
        event.listen(engine.sync_engine, "connect", apply_settings_of_driver, insert=True)
    placement = target.placement or Placement()
    if placement.ops != OPS:
        event.listen(engine.sync_engine, "before_cursor_execute", partial(_rename_schemas, placement), retval=True)
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(lambda sync: work(with_placement(sync, placement)))
    finally:
        await engine.dispose()


_SCHEMA_COLUMN = "pg_catalog.pg_namespace.nspname"


def _rename_schemas(
    placement: Placement, _: Connection, __: Any, statement: str, parameters: Any, ___: Any, ____: bool
) -> tuple[str, Any]:
    """Give the schema of the bot's own tables the models' name for it wherever SQLAlchemy reads the catalog."""
    if _SCHEMA_COLUMN in statement:
        own = "'" + placement.ops.replace("'", "''") + "'"
        # A schema that really is called `ops` belongs to another Guildbook, or to another program.
        renamed = f"(CASE {_SCHEMA_COLUMN} WHEN {own} THEN 'ops' WHEN 'ops' THEN {own} ELSE {_SCHEMA_COLUMN} END)"
        statement = statement.replace(_SCHEMA_COLUMN, renamed)
    return statement, parameters


def create_main_schema(connection: Connection) -> None:
    """Create the schema of the main tables if it does not exist. The caller commits."""
    main = placement_of(connection).main
    if connection.scalar(text("SELECT to_regnamespace(quote_ident(:name)) IS NULL"), {"name": main}):
        connection.exec_driver_sql("CREATE SCHEMA " + quote_identifier(main))
        _log.info("created schema %s", main)


@contextmanager
def migration_lock(
    connection: Connection, timeout: float, is_cancelled: Callable[[], bool], *, is_pooled: bool = False
) -> Iterator[None]:
    """Hold the migration lock: through a pooler in a transaction of its own, because sessions are shared there.

    Raises `MigrationError` when another process still holds it after `timeout` seconds, or when `is_cancelled` is true.

    The lock is polled: a session that waits inside `pg_advisory_lock` holds a snapshot, for which a CREATE INDEX
    CONCURRENTLY of the lock's holder waits in turn. (Not stamina: nothing fails, and the wait can be cancelled.)
    """
    key = placement_of(connection).lock_key(LOCK_KEY)
    if is_pooled:
        with connection.engine.connect() as holder:
            _acquire_lock(holder, key, timeout, is_cancelled, "pg_try_advisory_xact_lock")
            holder.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
            yield
        return
    _acquire_lock(connection, key, timeout, is_cancelled, "pg_try_advisory_lock")
    connection.commit()
    try:
        yield
    finally:
        if not connection.closed and not connection.invalidated:
            connection.rollback()
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": key})
            connection.commit()


def _acquire_lock(
    connection: Connection, key: int, timeout: float, is_cancelled: Callable[[], bool], function: str
) -> None:
    started = logged_at = time.monotonic()
    while not connection.scalar(text(f"SELECT {function}(:key)"), {"key": key}):
        connection.commit()
        now = time.monotonic()
        if is_cancelled():
            raise MigrationError("the migration was cancelled before it began")
        if now - started > timeout:
            holder = connection.scalar(text(ADVISORY_HOLDER.format(key=":key")), {"key": key})
            raise MigrationError(
                f"another process has been migrating this database for {timeout:.0f} s: wait until {holder or 'it'} is"
                " done, or end it, then try again"
            )
        if logged_at == started or now - logged_at > 10:
            _log.info("waiting for another process to finish migrating", extra={"seconds": round(now - started, 1)})
            logged_at = now
        time.sleep(POLL_SECONDS)


async def _migrate_with_settings() -> None:
    settings = load_settings()
    async with open_target(settings.direct_target, settings.data_dir, schema=settings.db_schema) as opened:
        is_pooler = not (opened.pooled or opened.is_declared) and await is_behind_pooler(opened)
        target = opened.through_pooler() if is_pooler else opened
        command: Any = getattr(context.config.cmd_opts, "cmd", None)
        name = None if command is None else command[0].__name__
        run = MigrationRun(target=target, by=ALEMBIC, is_upgrade=name == "upgrade", is_stamp=name == "stamp")
        try:
            await run_on_connection(target, lambda connection: _migrate(connection, run))
        except MigrationError as exc:
            raise CommandError(str(exc)) from exc


def _migrate(connection: Connection, run: MigrationRun) -> None:
    if not run.target.pooled:
        run.pid = connection.scalar(text("SELECT pg_backend_pid()"))
        connection.commit()
    with migration_lock(connection, run.timeout, lambda: run.is_cancelled, is_pooled=run.target.pooled):
        _set_lock_timeout(connection, run)
        partitions = list_partitions(connection)
        paused = history.read_pause(connection)
        connection.commit()
        if paused is not None and run.respects_pause:
            run.paused = paused
            return
        recorded = prepare_version_table(connection, run)
        if recorded is None:
            return
        pack = packs.pack_of_scripts(run.options.scripts)
        if run.is_upgrade or run.is_stamp:
            create_main_schema(connection)
            connection.commit()
        if run.is_upgrade:
            _drop_invalid_indexes(connection, run)
        refuse_statements(connection, run.options.off_limits)
        context.configure(
            connection=connection,
            transaction_per_migration=True,
            on_version_apply=_on_version_apply(connection, run),
            version_table_schema=placement_of(connection).main,
            **comparison_options(skip=partitions, scripts=run.options.scripts),
        )
        with context.begin_transaction():
            context.run_migrations()
        if (
            pack is None
            and run.is_upgrade
            and not Revisions(run.options.scripts).pending(context.get_context().get_current_heads())
        ):
            history.resume(connection, run.by)
        connection.commit()


def _set_lock_timeout(connection: Connection, run: MigrationRun) -> None:
    """Limit how long the migration's statements wait for locks: through a pooler in each of its transactions."""
    if not run.target.pooled:
        connection.execute(text(f"SET lock_timeout = '{run.options.lock_timeout}'"))
        return
    settings = text("SELECT set_config('lock_timeout', :timeout, true), set_config('application_name', :name, true)")

    @event.listens_for(connection, "begin")
    def set_in_transaction(beginning: Connection) -> None:
        if beginning.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
            beginning.execute(settings, {"timeout": run.options.lock_timeout, "name": run.application_name})


def prepare_version_table(connection: Connection, run: MigrationRun) -> tuple[str, ...] | None:
    """Make the version table one that Alembic can work with, and return the revisions that it has.

    The former table is replaced by ours, and revisions that others in the table build on are removed. None: an upgrade
    to the newest revision has nothing to do, because there are several and the database is at all of them. Raises
    `MigrationError` for a database that the run must not touch.
    """
    version = ownership.read_version(connection, run.options.scripts)
    revisions = Revisions(run.options.scripts)
    if revisions.pack is not None and run.is_upgrade and run.options.needs_base:
        require_base(connection, revisions.pack, run.options)
    run.before = version.revision
    if run.is_upgrade or (version.revisions and not run.is_stamp):
        obstacle = find_obstacle(connection, version, run.options.scripts)
        if obstacle is not None:
            raise MigrationError(obstacle)
        revisions.require_known(version.revisions)
        if run.needs_one_head and len(revisions.heads) > 1:
            if not revisions.needs_merge(version.revisions):
                return None
            raise MigrationError(revisions.merge_advice())
    adopt_version_table(connection, version, revisions, is_forced=run.is_stamp)
    newest = revisions.newest(version.revisions)
    if (len(newest) < len(version.revisions) or version.is_replaced) and set(version.revisions) <= set(revisions.ids):
        _replace_revisions(connection, ownership.version_table(run.options.scripts), newest)
        _log.warning(
            "removed revisions from the version table that others in it build on",
            extra={"before": version.revisions, "after": newest},
        )
    connection.commit()
    return newest


def require_base(connection: Connection, pack: Pack, options: MigrationOptions) -> None:
    """Raise `MigrationError` if this Guildbook, or its schema in the database, lacks the revision that a pack needs."""
    base = Revisions(options.base)
    if (missing := find_missing_base(pack, base)) is not None:
        raise MigrationError(missing)
    current = ownership.read_version(connection, options.base).revisions
    if pack.requires not in base.including_ancestors(current):
        raise MigrationError(
            f"pack {pack.name} needs revision {pack.requires} of Guildbook, and the database is at"
            f" {', '.join(current) or 'none'}: run python bot.py db upgrade"
        )


def find_missing_base(pack: Pack, base: Revisions) -> str | None:
    """Return what a pack needs and these revisions of Guildbook do not have; None: they have it."""
    if pack.requires in base.ids:
        return None
    return (
        f"pack {pack.name} needs revision {pack.requires} of Guildbook, which this version does not have (its newest is"
        f" {', '.join(base.heads)}): use the Guildbook that has it, or a version of the pack for this one"
    )


def _replace_revisions(connection: Connection, table: str, revisions: Sequence[str]) -> None:
    connection.exec_driver_sql(" ".join(("DELETE FROM", table)))
    insert = " ".join(("INSERT INTO", table, "(version_num) VALUES (:revision)"))
    for revision in revisions:
        connection.execute(text(insert), {"revision": revision})


def adopt_version_table(
    connection: Connection, version: RecordedVersion, revisions: Revisions, *, is_forced: bool = False
) -> None:
    """Replace the former version table by ours, if both its revisions and the tables beside it are ours.

    `is_forced`: also with unknown revisions, which the caller then replaces. The caller commits.
    """
    if not version.is_former:
        return
    is_ours = version.is_complete and set(version.revisions) <= set(revisions.ids)
    if is_ours or not version.revisions or (is_forced and version.has_tables):
        for statement in ownership.adoption_statements(version):
            connection.exec_driver_sql(statement)
        _log.info("the version table is now %s", VERSION_TABLE, extra={"revisions": version.revisions})


def find_obstacle(connection: Connection, version: RecordedVersion, scripts: Path = SCRIPTS) -> str | None:
    """Return why this database must not be migrated, and what to do; None: it may."""
    if (pack := packs.pack_of_scripts(scripts)) is not None:
        return _find_obstacle_of_pack(connection, version, pack)
    where = f"schema {version.schema}"
    if version.revisions or version.has_tables:
        if not version.is_complete:
            return (
                f"the database has only a part of Guildbook's tables ({where}: no {', '.join(version.missing)}), such"
                " as a dump of one schema leaves: restore a backup, or load the whole dump into an empty database"
            )
        if not version.revisions:
            return (
                f"{where} has Guildbook's tables, but no revision is recorded: python bot.py db stamp head compares"
                " them with the newest revision and records it"
            )
        return _find_later_tables(connection, version, scripts)
    created = ownership.owned(scripts).created
    if version.table is None:
        created |= {(None, VERSION_TABLE)}
    collisions = ownership.find_collisions(connection, created)
    if not collisions:
        return None
    names = ", ".join(collisions[:5]) + (f" and {len(collisions) - 5} more" if len(collisions) > 5 else "")
    return (
        f"another program has tables where Guildbook would create its own: {names}. Nothing was changed. Set"
        " DB_SCHEMA=guildbook, and Guildbook creates its tables in a schema of that name beside them"
    )


def _find_obstacle_of_pack(connection: Connection, version: RecordedVersion, pack: Pack) -> str | None:
    """Return why a pack's revisions would fail: tables exist that they create. None: they may go on."""
    revisions = Revisions(pack.scripts)
    if not set(version.revisions) <= set(revisions.ids):
        return None
    created = ownership.created_by(revisions.files(revisions.pending(version.revisions)))
    if version.table is None:
        created |= {(None, pack.version_table)}
    collisions = ownership.find_collisions(connection, created)
    if not collisions:
        return None
    placement = placement_of(connection)
    owners = {
        f"{placement.resolve(schema)}.{name}": other.name
        for other in recorded_packs.read_packs(connection)
        for schema, name in other.names()
    }
    shown = [f"{name} (of pack {owners[name]})" if name in owners else name for name in collisions[:5]]
    advice = "" if owners.keys() & set(collisions) else ", or drop these"
    return (
        f"pack {pack.name} would create tables that exist already, and are not its own: {', '.join(shown)}."
        f" Nothing was changed: rename the pack's tables{advice}"
    )


def _find_later_tables(connection: Connection, version: RecordedVersion, scripts: Path) -> str | None:
    """Return why the next upgrade would fail, if tables exist that it would create; None: it can go on."""
    revisions = Revisions(scripts)
    if not set(version.revisions) <= set(revisions.ids) or not (missing := revisions.pending(version.revisions)):
        return None
    collisions = ownership.find_collisions(connection, ownership.created_by(revisions.files(missing)))
    if not collisions:
        return None
    names = ", ".join(collisions)
    statement = " ".join(("DROP TABLE", names))
    return (
        f"the database is at revision {', '.join(version.revisions)}, but has tables that later revisions create:"
        f" {names}. That happens if a backup of an older revision is restored with pg_restore over a newer schema"
        " instead of with python bot.py backup restore. Nothing was changed: drop these tables, whose rows are newer"
        f" than that backup ({statement}), and try again"
    )


def _on_version_apply(
    connection: Connection, run: MigrationRun
) -> Callable[[MigrationContext, MigrationInfo, Collection[Any], Mapping[str, Any]], None]:
    record = MigrationRecorder(run.by)
    pack = packs.pack_of_scripts(run.options.scripts)

    def note(ctx: MigrationContext, step: MigrationInfo, heads: Collection[Any], run_args: Mapping[str, Any]) -> None:
        record(ctx, step, heads, run_args)
        revisions = step.up_revision_ids  # of a downgrade: those that it reverts
        batches.forget(connection, revisions)  # in the transaction that changes the revision
        if pack is not None:
            connection.exec_driver_sql(recorded_packs.record_pack_sql(pack, map(str, heads)))
        run.applied.extend(revisions)
        if run.on_applied is not None:
            for revision in revisions:
                run.on_applied(revision)

    return note


def _drop_invalid_indexes(connection: Connection, run: MigrationRun) -> None:
    run.indexes = invalid_indexes.drop(connection, lock_timeout=run.options.index_lock_timeout)
    for name in run.indexes.dropped:
        _log.warning("dropped invalid index %s, left by a failed CREATE INDEX CONCURRENTLY", name)
    for name, error in run.indexes.remaining:
        _log.warning("could not drop invalid index %s: %s", name, error)
