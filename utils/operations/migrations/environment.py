"""What `migrations/env.py` runs: the connection, the migration lock, and which tables Alembic compares."""

from __future__ import annotations

import asyncio
import importlib
import logging
import pkgutil
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from alembic import context
from alembic.runtime.migration import MigrationContext, MigrationInfo
from alembic.util import CommandError
from sqlalchemy import Connection, MetaData, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import models
from models import Base
from utils.database.embedded import open_target
from utils.database.target import ConnectTarget
from utils.exceptions import MigrationError
from utils.operations.migrations import batches, history, invalid_indexes
from utils.operations.migrations.history import ALEMBIC, BOT, SQL_FILE, Actor, MigrationRecorder, Pause
from utils.operations.migrations.invalid_indexes import DroppedIndexes
from utils.settings import load_settings

_log = logging.getLogger(__name__)

#: "guildbook" as a bigint: the advisory lock that lets one process migrate at a time.
LOCK_KEY = 0x6775696C64626F6F
#: Seconds between two attempts to get that lock.
POLL_SECONDS = 0.25
#: Schemas with our tables. Others are not compared.
SCHEMAS = (None, "ops")
_ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = _ROOT / "migrations"
COGS = _ROOT / "cogs"

_DECLARES_TABLE = re.compile(r"^\s+__tablename__\s*[:=]", re.MULTILINE)

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationOptions:
    """How migrations run. Nothing but tests changes the defaults."""

    #: The directory with `env.py` and `versions/`.
    scripts: Path = SCRIPTS
    #: How long a statement waits for a lock before it fails (PostgreSQL's `lock_timeout`).
    lock_timeout: str = "15s"
    #: The same for dropping an invalid index.
    index_lock_timeout: str = invalid_indexes.LOCK_TIMEOUT


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
    #: Do nothing while AUTO_MIGRATE is paused.
    respects_pause: bool = False
    #: Called in the migrating thread with each revision.
    on_applied: Callable[[str], None] | None = None
    #: Set by the caller to stop waiting for the lock.
    is_cancelled: bool = False

    #: The server process that migrates.
    pid: int | None = None
    #: The revision before; None: the database had no schema.
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
        **comparison_options(),
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


def import_models(cogs: Path = COGS) -> None:
    """Import every module that declares tables: all of `models/`, and the cogs with a `__tablename__`.

    Raises `MigrationError` when one cannot be imported: its tables would look as if nothing declared them.
    """
    names = [f"{models.__name__}.{found.name}" for found in pkgutil.iter_modules(models.__path__)]
    for path in sorted(cogs.rglob("*.py")):
        if _DECLARES_TABLE.search(path.read_text(encoding="utf-8")):
            parts = path.relative_to(cogs.parent).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as exc:
            raise MigrationError(
                f"{name} declares tables but cannot be imported: {type(exc).__name__}: {exc}; correct it first"
            ) from exc


async def run_on_connection(target: ConnectTarget, work: Callable[[Connection], ResultT]) -> ResultT:
    """Return what `work` returns, given a SQLAlchemy connection that is closed afterwards."""
    engine = create_async_engine(
        target.sqlalchemy_url(), connect_args=target.sqlalchemy_connect_args(), poolclass=NullPool
    )
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(work)
    finally:
        await engine.dispose()


@contextmanager
def migration_lock(connection: Connection, timeout: float, is_cancelled: Callable[[], bool]) -> Iterator[None]:
    """Hold the migration lock.

    Raises `MigrationError` when another process still holds it after `timeout` seconds, or when `is_cancelled` is true.

    The lock is polled: a session that waits inside `pg_advisory_lock` holds a snapshot, for which a CREATE INDEX
    CONCURRENTLY of the lock's holder waits in turn. (Not stamina: nothing fails, and the wait can be cancelled.)
    """
    started = logged_at = time.monotonic()
    while not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": LOCK_KEY}):
        connection.commit()
        now = time.monotonic()
        if is_cancelled():
            raise MigrationError("the migration was cancelled before it began")
        if now - started > timeout:
            raise MigrationError(
                f"another process has been migrating this database for {timeout:.0f} s: wait until it is done, or end"
                f" it (pg_locks, locktype advisory, key {LOCK_KEY}), then try again"
            )
        if logged_at == started or now - logged_at > 10:
            _log.info("waiting for another process to finish migrating", extra={"seconds": round(now - started, 1)})
            logged_at = now
        time.sleep(POLL_SECONDS)
    connection.commit()
    try:
        yield
    finally:
        if not connection.closed and not connection.invalidated:
            connection.rollback()
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": LOCK_KEY})
            connection.commit()


def list_partitions(connection: Connection) -> frozenset[tuple[str | None, str]]:
    """Return schema and name of every partition: they come and go with the months and are not in the models."""
    rows = connection.execute(
        text(
            "SELECT CASE WHEN pg_table_is_visible(c.oid) THEN NULL ELSE n.nspname END, c.relname"
            " FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.relispartition"
        )
    )
    return frozenset((row[0], row[1]) for row in rows)


def comparison_options(
    *, skip: frozenset[tuple[str | None, str]] = frozenset(), metadata: MetaData = Base.metadata
) -> dict[str, Any]:
    """Return the options that tell Alembic what to compare with the models.

    `skip`: schema and name of tables that are not in the models.
    """

    def include_name(name: str | None, kind: str, parents: Any) -> bool:
        if kind == "schema":
            return name in SCHEMAS
        if kind == "table":
            return name != batches.TABLE and (parents.get("schema_name"), name) not in skip
        return True

    return {
        "target_metadata": metadata,
        "include_schemas": True,
        "include_name": include_name,
        "compare_type": True,
        # Alembic 1.20 evaluates both defaults, and those of a clock never agree: schema_catalog compares them.
        "compare_server_default": False,
    }


async def _migrate_with_settings() -> None:
    settings = load_settings()
    async with open_target(settings.direct_target, settings.data_dir) as target:
        run = MigrationRun(target=target, by=ALEMBIC)
        await run_on_connection(target, lambda connection: _migrate(connection, run))


def _migrate(connection: Connection, run: MigrationRun) -> None:
    run.pid = connection.scalar(text("SELECT pg_backend_pid()"))
    connection.commit()
    with migration_lock(connection, run.timeout, lambda: run.is_cancelled):
        connection.execute(text(f"SET lock_timeout = '{run.options.lock_timeout}'"))
        partitions = list_partitions(connection)
        paused = history.read_pause(connection)
        connection.commit()
        if paused is not None and run.respects_pause:
            run.paused = paused
            return
        if run.is_upgrade:
            _drop_invalid_indexes(connection, run)
        context.configure(
            connection=connection,
            transaction_per_migration=True,
            on_version_apply=_on_version_apply(connection, run),
            **comparison_options(skip=partitions),
        )
        run.before = context.get_context().get_current_revision()
        connection.commit()
        with context.begin_transaction():
            context.run_migrations()
        if run.is_upgrade and context.get_context().get_current_revision() == context.get_head_revision():
            history.resume(connection, run.by)
        connection.commit()


def _on_version_apply(
    connection: Connection, run: MigrationRun
) -> Callable[[MigrationContext, MigrationInfo, Collection[Any], Mapping[str, Any]], None]:
    record = MigrationRecorder(run.by)

    def note(ctx: MigrationContext, step: MigrationInfo, heads: Collection[Any], run_args: Mapping[str, Any]) -> None:
        record(ctx, step, heads, run_args)
        revisions = step.up_revision_ids  # of a downgrade: those that it reverts
        batches.forget(connection, revisions)  # in the transaction that changes the revision
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
