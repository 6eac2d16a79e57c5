"""What `migrations/env.py` runs: one connection, one lock, and what belongs to us among the tables that are there."""

from __future__ import annotations

import asyncio
import importlib
import logging
import pkgutil
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from utils.operations.migrations.batches import TABLE as BATCHES
from utils.operations.migrations.batches import forget
from utils.operations.migrations.invalid import drop
from utils.operations.migrations.switch import clear, read
from utils.settings import load_settings

_log = logging.getLogger(__name__)

#: "guildbook" in a bigint: the advisory lock that keeps two processes from migrating at once.
LOCK_KEY = 0x6775696C64626F6F
#: Schemas that hold our tables; what others keep in theirs is not looked at.
SCHEMAS = (None, "ops")
#: How long one statement of a migration waits for other people's locks before it gives up.
LOCK_TIMEOUT = "15s"
#: Seconds between two attempts to get the lock.
POLL_SECONDS = 0.25
COGS = Path(__file__).resolve().parents[3] / "cogs"

_DECLARES = re.compile(r"^\s+__tablename__\s*[:=]", re.MULTILINE)


def run_offline() -> None:
    """Write the SQL instead of running it."""
    context.configure(dialect_name="postgresql", literal_binds=True, transaction_per_migration=True, **comparison())
    context.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    """Run what Alembic was asked for: on the target that the bot hands over, or on the one of the settings."""
    attributes = context.config.attributes
    target: ConnectTarget | None = attributes.get("target")
    if target is not None:
        asyncio.run(on_connection(target, lambda connection: _migrate(connection, attributes)))
    else:
        try:
            declare()  # asked from the command line, perhaps to compare: the bot itself only goes up and down
        except MigrationError as exc:
            raise CommandError(str(exc)) from exc  # Alembic shows it as one line
        asyncio.run(_with_settings(lambda connection: _migrate(connection, attributes)))


def declare(cogs: Path = COGS) -> None:
    """Import what declares tables beside the framework's own: all of `models/`, and cogs with tables in their files.

    Raises `MigrationError` when one of them is broken: without it its tables would seem to be superfluous.
    """
    names = [f"{models.__name__}.{found.name}" for found in pkgutil.iter_modules(models.__path__)]
    for path in sorted(cogs.rglob("*.py")):
        if _DECLARES.search(path.read_text(encoding="utf-8")):
            parts = path.relative_to(cogs.parent).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as exc:
            raise MigrationError(
                f"{name} declares tables, but cannot be imported: {type(exc).__name__}: {exc}"
            ) from exc


async def on_connection(target: ConnectTarget, work: Callable[[Connection], Any]) -> Any:
    """Run `work` on a connection of SQLAlchemy's that is closed afterwards."""
    engine = create_async_engine(
        target.sqlalchemy_url(), connect_args=target.sqlalchemy_connect_args(), poolclass=NullPool
    )
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(work)
    finally:
        await engine.dispose()


async def _with_settings(work: Callable[[Connection], Any]) -> None:
    settings = load_settings()
    async with open_target(settings.direct_target, settings.data_dir) as target:
        await on_connection(target, work)


def _migrate(connection: Connection, attributes: dict[str, Any]) -> None:
    """Migrate, and note in `attributes` where the database was (`before`) and what was done (`applied`).

    Further notes to and fro: `target`, `timeout` and `stop`; `is_upgrade`; `heeds_switch`: do nothing while the switch
    is off, and say so in `kept_off`; `on_applied`: called with each revision; `invalid`: the indexes dropped.
    """

    def note(ctx: MigrationContext, step: MigrationInfo, heads: Any, run_args: Any) -> None:
        done = step.up_revision_ids  # also of a step down: what it takes back
        forget(connection, done)  # in the same transaction as the revision's number
        attributes.setdefault("applied", []).extend(done)
        for revision in done:
            attributes.get("on_applied", _unheard)(revision)

    attributes["pid"] = connection.scalar(text("SELECT pg_backend_pid()"))
    connection.commit()
    with locked(connection, attributes.get("timeout", 300.0), lambda: attributes.get("stop", False)):
        connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT}'"))
        foreign = partitions(connection)
        off = read(connection)
        connection.commit()
        if off is not None and attributes.get("heeds_switch"):
            attributes["kept_off"] = off
            return
        if attributes.get("is_upgrade"):
            _drop_invalid(connection, attributes)
        context.configure(
            connection=connection,
            transaction_per_migration=True,
            on_version_apply=note,
            **comparison(skip=foreign),
        )
        attributes["before"] = context.get_context().get_current_revision()
        connection.commit()
        with context.begin_transaction():
            context.run_migrations()
        if attributes.get("is_upgrade"):
            if context.get_context().get_current_revision() == context.get_head_revision():
                clear(connection)
            connection.commit()


def _unheard(revision: str) -> None:
    """Tell nobody."""


def _drop_invalid(connection: Connection, attributes: dict[str, Any]) -> None:
    done = attributes["invalid"] = drop(connection)
    for name in done.gone:
        _log.warning("index %s was invalid, left by a CREATE INDEX CONCURRENTLY that failed: dropped", name)
    for name, why in done.left:
        _log.warning("index %s is invalid and could not be dropped: %s", name, why)


@contextmanager
def locked(connection: Connection, timeout: float, is_called_off: Callable[[], bool]) -> Iterator[None]:
    """Hold the migration lock.

    Raises `MigrationError` when another process still has it after `timeout` seconds, or when it is called off.

    Polled: a session that waits inside the lock function holds a snapshot, which CREATE INDEX CONCURRENTLY of the
    lock's holder then waits for.
    """
    started = told = time.monotonic()
    while not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": LOCK_KEY}):
        connection.commit()
        now = time.monotonic()
        if is_called_off():
            raise MigrationError("the migration was called off before it began")
        if now - started > timeout:
            raise MigrationError(
                f"another process has been migrating this database for {timeout:.0f} s: wait until it is done, or end"
                f" it (pg_locks, locktype advisory, key {LOCK_KEY}), then start again"
            )
        if told == started or now - told > 10:
            _log.info("waiting for another process to finish migrating", extra={"seconds": round(now - started, 1)})
            told = now
        time.sleep(POLL_SECONDS)
    connection.commit()
    try:
        yield
    finally:
        if not connection.closed and not connection.invalidated:
            connection.rollback()
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": LOCK_KEY})
            connection.commit()


def partitions(connection: Connection) -> frozenset[tuple[str | None, str]]:
    """Return schema and name of every partition: they come and go with the months and are no part of the models."""
    rows = connection.execute(
        text(
            "SELECT CASE WHEN pg_table_is_visible(c.oid) THEN NULL ELSE n.nspname END, c.relname"
            " FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.relispartition"
        )
    )
    return frozenset((row[0], row[1]) for row in rows)


def comparison(
    *, skip: frozenset[tuple[str | None, str]] = frozenset(), metadata: MetaData = Base.metadata
) -> dict[str, Any]:
    """Return the options that say what Alembic compares with the models, and how."""

    def include_name(name: str | None, kind: str, parents: Any) -> bool:
        if kind == "schema":
            return name in SCHEMAS
        if kind == "table":
            return name != BATCHES and (parents.get("schema_name"), name) not in skip
        return True

    return {
        "target_metadata": metadata,
        "include_schemas": True,
        "include_name": include_name,
        "compare_type": True,
        # Alembic 1.20 evaluates both defaults, and a clock's never agree: schema_catalog compares them.
        "compare_server_default": False,
    }
