"""Run the schema's revisions: upgrade, downgrade, stamp, and which revision a database is at.

Alembic is synchronous and runs in a thread, so the event loop is not blocked.
"""

from __future__ import annotations

import asyncio
import io
import logging
import re
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from alembic.script.revision import ResolutionError
from alembic.util import CommandError
from sqlalchemy import Connection

from utils import packs
from utils.database import ConnectTarget, Pool, ownership
from utils.database.locks import LOCK_STATES, describe_lock_holders
from utils.database.placement import Placement
from utils.database.sql import quote_identifier
from utils.database.target import located
from utils.exceptions import (
    DRIVER_ERRORS,
    BackupError,
    DatabaseUnavailable,
    GuildbookError,
    MigrationError,
    driver_error,
    translate,
)
from utils.operations.migrations import history
from utils.operations.migrations.environment import (
    DEFAULTS,
    MigrationOptions,
    MigrationRun,
    adopt_version_table,
    run_on_connection,
)
from utils.operations.migrations.environment import find_obstacle as _find_obstacle
from utils.operations.migrations.history import BOT, Actor, AppliedRevision, Pause
from utils.operations.migrations.invalid_indexes import DroppedIndexes
from utils.operations.migrations.revisions import (
    Revision,
    Revisions,
    alembic_config,
    raised_in,
    unknown_revision,
)
from utils.operations.migrations.statements import parse

_log = logging.getLogger(__name__)

#: Alembic keeps its state in module globals: one command at a time.
_alembic = threading.Lock()

#: SQLSTATE of a missing right (PostgreSQL manual, appendix A).
_NOT_ALLOWED = "42501"
#: Seconds for a cancelled migration to end.
INTERRUPT_SECONDS = 5.0
#: Seconds for reading the schema, comparing it with the models included.
READ_SECONDS = 60.0

#: Makes a backup and returns a line that names it. Raises `GuildbookError`.
Backup = Callable[[], Awaitable[str]]
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class MigrationResult:
    """What an upgrade or a downgrade did."""

    #: The revision before (several, of unmerged branches: separated by commas); None: the database had no schema.
    before: str | None = None
    #: The revisions applied or reverted, in that order.
    revisions: tuple[str, ...] = ()
    #: The invalid indexes that an upgrade found and dropped first.
    indexes: DroppedIndexes = field(default_factory=DroppedIndexes)
    #: The pause that kept an upgrade with `respect_pause` from doing anything; None otherwise.
    paused: Pause | None = None


async def upgrade(
    database: Pool | ConnectTarget,
    revision: str = "head",
    *,
    timeout: float = 300.0,
    respect_pause: bool = False,
    by: Actor = BOT,
    on_applied: Callable[[str], None] | None = None,
    options: MigrationOptions = DEFAULTS,
) -> MigrationResult:
    """Upgrade the schema to a revision; does nothing when it is there already.

    `head` needs one newest revision; `heads` applies all branches.

    Cancelling it ends the running statement, which rolls its revision back. A `Pool` gets new connections afterwards.

    Parameters
    ----------
    timeout: seconds to wait for another process that migrates.
    respect_pause: do nothing while AUTO_MIGRATE is paused. Without it, reaching the newest revision ends the pause.
    by: who migrates, for `ops.migrations`.
    on_applied: called on the event loop with each applied revision.

    Raises
    ------
    MigrationError: a revision failed, the database is at a revision that this version does not know or belongs to
        another program, or several heads need a merge.
    DatabaseUnavailable: the server cannot be reached.
    """
    run = MigrationRun(
        target=_direct(database),
        options=options,
        timeout=timeout,
        by=by,
        is_upgrade=True,
        needs_one_head=revision == "head",
        respects_pause=respect_pause,
        on_applied=_on_loop(on_applied),
    )
    return await _run(database, f"upgrade to {revision}", partial(command.upgrade, revision=revision), run)


async def downgrade(
    database: Pool | ConnectTarget,
    revision: str,
    *,
    timeout: float = 300.0,
    by: Actor = BOT,
    on_applied: Callable[[str], None] | None = None,
    options: MigrationOptions = DEFAULTS,
) -> MigrationResult:
    """Downgrade the schema to a revision; `base` removes everything of ours. Raises like `upgrade`.

    Does not pause AUTO_MIGRATE: operators use `admin.downgrade`, which does.
    """
    run = MigrationRun(
        target=_direct(database), options=options, timeout=timeout, by=by, on_applied=_on_loop(on_applied)
    )
    return await _run(database, f"downgrade to {revision}", partial(command.downgrade, revision=revision), run)


async def stamp(
    database: Pool | ConnectTarget,
    revision: str,
    *,
    timeout: float = 300.0,
    by: Actor = BOT,
    options: MigrationOptions = DEFAULTS,
) -> None:
    """Record that the database is at a revision, whatever is recorded now; runs nothing. Raises like `upgrade`.

    Operators use `admin.stamp`, which first checks that it is true.
    """
    run = MigrationRun(target=_direct(database), options=options, timeout=timeout, by=by, is_stamp=True)
    await _run(database, f"stamp {revision}", partial(command.stamp, revision=revision, purge=True), run)


async def prepare_schema(
    pool: Pool, *, auto_migrate: bool, backup: Backup | None = None, options: MigrationOptions = DEFAULTS
) -> None:
    """Bring the schema up to date at a start, if the settings (`auto_migrate`) and the database allow it.

    `backup` makes the backup that comes before revisions which destroy rows; None for no backup. Raises
    `MigrationError` when revisions are missing that may not be applied, when one fails, or when that backup fails.
    """
    paused: Pause | None = None
    if auto_migrate:
        if backup is not None and await find_pause(pool) is None:
            await back_up_losses(pool, await find_losses(pool, options=options), backup)
        paused = (await upgrade(pool, respect_pause=True, options=options)).paused
        if paused is None:
            return
        _log.warning("AUTO_MIGRATE is paused until python bot.py db upgrade: %s", paused)
    if obstacle := await find_obstacle(pool, options=options):
        raise MigrationError(obstacle)
    if missing := await pending(pool, options=options):
        why = "AUTO_MIGRATE is off" if paused is None else f"AUTO_MIGRATE is paused: {paused}"
        raise MigrationError(f"the schema lacks revision {', '.join(missing)}, and {why}; run python bot.py db upgrade")


async def find_losses(
    database: Pool | ConnectTarget, goal: str = "heads", *, options: MigrationOptions = DEFAULTS
) -> list[str]:
    """Return the statements of an upgrade that destroy rows or values, shortened; none for a database without a schema.

    `goal`: as `Revisions.resolve` returns it. If the SQL of a revision cannot be written, the reason stands for what it
    may destroy. Raises `MigrationError` when the database is at a revision that this version does not know.
    """
    revisions = Revisions(options.scripts)
    heads = revisions.newest(await current_heads(database, options=options))
    if not heads or not revisions.pending(heads) or revisions.is_at(heads, goal):
        return []

    def read() -> list[str]:
        sql = offline_sql(goal, current=heads, options=options)
        return [statement.title for statement in parse(sql) if statement.loses_rows]

    try:
        return await asyncio.to_thread(read)
    except MigrationError as exc:
        return [f"unknown, because {exc}"]


async def back_up_first(backup: Backup) -> str:
    """Make the backup that comes before something is destroyed, and return its id. Raises `BackupError`."""
    try:
        return await backup()
    except GuildbookError as exc:
        raise BackupError(
            f"the backup that comes first failed: {exc}. Nothing was changed: correct the cause, or pass --no-backup in"
            " a shell"
        ) from exc


async def back_up_losses(database: Pool, losses: Sequence[str], backup: Backup) -> str | None:
    """Make a backup before an upgrade with these losses, if there are any, and return its id.

    Raises `MigrationError` if it cannot be made.
    """
    if not losses:
        return None
    shown = "; ".join(losses[:3]) + (f"; and {len(losses) - 3} more" if len(losses) > 3 else "")
    try:
        saved = await back_up_first(backup)
    except BackupError as exc:
        raise MigrationError(f"the upgrade destroys data ({shown}): {exc}") from exc
    _log.warning("made backup %s before an upgrade that destroys data: %s", saved, shown)
    return saved


async def current(database: Pool | ConnectTarget, *, options: MigrationOptions = DEFAULTS) -> str | None:
    """Return the revision that the database is at, or several separated by commas; None: it has no schema."""
    return ", ".join(await current_heads(database, options=options)) or None


async def current_heads(database: Pool | ConnectTarget, *, options: MigrationOptions = DEFAULTS) -> tuple[str, ...]:
    """Return the revisions that the database is at: several with unmerged branches, none without a schema."""
    read = partial(ownership.read_version, scripts=options.scripts)
    return (await read_schema(database, read)).revisions


async def find_obstacle(database: Pool | ConnectTarget, *, options: MigrationOptions = DEFAULTS) -> str | None:
    """Return why the database must not be migrated, such as tables of another program, and what to do; None: it may."""

    def read(connection: Connection) -> str | None:
        return _find_obstacle(connection, ownership.read_version(connection, options.scripts), options.scripts)

    return await read_schema(database, read)


async def pending(database: Pool | ConnectTarget, *, options: MigrationOptions = DEFAULTS) -> list[str]:
    """Return the revisions that `upgrade` would apply, oldest first.

    Raises `MigrationError` when the database is at a revision that this version does not know.
    """
    return Revisions(options.scripts).pending(await current_heads(database, options=options))


async def applied(database: Pool | ConnectTarget) -> dict[str, AppliedRevision]:
    """Return when each revision was applied and by whom, as far as the database knows."""
    return await read_schema(database, history.read_applied)


async def find_pause(database: Pool | ConnectTarget) -> Pause | None:
    """Return why AUTO_MIGRATE is paused; None: it is not. Raises `DatabaseError`."""
    return await read_schema(database, history.read_pause)


async def pause_auto_migrate(
    database: Pool | ConnectTarget, revision: str, *, by: Actor = BOT, options: MigrationOptions = DEFAULTS
) -> Pause:
    """Keep the bot from migrating this database by itself, because it is downgraded to `revision`.

    Raises `MigrationError` for a database that never had a schema.
    """
    revisions = Revisions(options.scripts)
    is_table_kept = revisions.pack is not None or revisions.builds_on(revision, history.TABLE_REVISION)

    def write(connection: Connection) -> Pause:
        adopt_version_table(connection, ownership.read_version(connection, options.scripts), revisions)
        paused = history.pause(connection, revision, by, is_table_kept=is_table_kept)
        connection.commit()
        return paused

    return await read_schema(database, write)


async def resume_auto_migrate(database: Pool | ConnectTarget, *, by: Actor = BOT) -> None:
    """Let the bot migrate this database by itself again. Raises `DatabaseError`."""

    def write(connection: Connection) -> None:
        history.resume(connection, by)
        connection.commit()

    await read_schema(database, write)


def known_revisions(*, options: MigrationOptions = DEFAULTS) -> list[Revision]:
    """Return every revision that this version knows, oldest first."""
    return Revisions(options.scripts).known


def offline_sql(
    goal: str = "heads",
    *,
    current: Sequence[str] = (),
    down: bool = False,
    options: MigrationOptions = DEFAULTS,
) -> str:
    """Return the SQL of an upgrade or a downgrade from the current revisions (none: base); no database is needed.

    Raises `MigrationError` if a revision fails, such as one that reads rows.
    """
    config = alembic_config(options.scripts)
    config.output_buffer = buffer = io.StringIO()
    config.attributes["options"] = options
    Revisions(options.scripts)  # raises for files that cannot be read
    scripts = ScriptDirectory.from_config(config)

    def steps(revisions: Any, context: Any) -> Any:
        return (scripts._downgrade_revs if down else scripts._upgrade_revs)(goal, revisions)

    # alembic.command takes one current revision only.
    environment = EnvironmentContext(
        config, scripts, fn=steps, as_sql=True, starting_rev=tuple(current) or None, destination_rev=goal
    )
    with _alembic, environment:
        try:
            scripts.run_env()
        except MigrationError:
            raise
        except Exception as exc:
            where = raised_in(exc, options.scripts)
            raise MigrationError(f"the SQL cannot be written: {type(exc).__name__}: {exc}{where}") from exc
    return buffer.getvalue()


async def read_schema(database: Pool | ConnectTarget, read: Callable[[Connection], ResultT]) -> ResultT:
    """Return what `read` returns, run in a thread: reflecting a schema takes longer than the event loop may stall.

    Raises `DatabaseUnavailable`, or `MigrationError` for what else the server says.
    """
    target = _direct(database)

    async def bounded() -> ResultT:
        async with asyncio.timeout(READ_SECONDS):
            return await run_on_connection(target, read)

    try:
        return await asyncio.to_thread(lambda: asyncio.run(bounded()))
    except Exception as exc:
        error = translate(exc)
        if isinstance(error, MigrationError | DatabaseUnavailable):
            raise error from exc
        if error is None:
            raise
        raise MigrationError(f"could not read the schema: {error}", sqlstate=getattr(error, "sqlstate", None)) from exc


def _direct(database: Pool | ConnectTarget) -> ConnectTarget:
    return database.direct if isinstance(database, Pool) else database


def _on_loop(callback: Callable[[str], None] | None) -> Callable[[str], None] | None:
    """Return a callback for the migrating thread that calls this one on the event loop."""
    if callback is None:
        return None
    loop = asyncio.get_running_loop()

    def call(revision: str) -> None:
        loop.call_soon_threadsafe(callback, revision)

    return call


async def _run(
    database: Pool | ConnectTarget, what: str, alembic_command: Callable[[Config], None], run: MigrationRun
) -> MigrationResult:
    config = alembic_config(run.options.scripts)
    config.attributes["run"] = run
    started = time.monotonic()

    def run_alone() -> None:
        if not _alembic.acquire(timeout=run.timeout):
            raise MigrationError(
                f"this process has been migrating for {run.timeout:.0f} s already: wait until it is done"
            )
        try:
            alembic_command(config)
        finally:
            _alembic.release()

    working = asyncio.ensure_future(asyncio.to_thread(run_alone))
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        await _interrupt(run, working)
        raise
    except Exception as exc:
        raise _explain(exc, what, run, await _describe_lock_holders(exc, run)) from exc
    if run.applied:
        seconds = round(time.monotonic() - started, 2)
        _log.info(
            "schema migrated: %s", what, extra={"before": run.before, "revisions": run.applied, "seconds": seconds}
        )
        if isinstance(database, Pool):
            await database.renew()
    return MigrationResult(run.before, tuple(run.applied), run.indexes, run.paused)


_INTERRUPT = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND (pid = $1 OR application_name = $2)
"""


async def _interrupt(run: MigrationRun, working: asyncio.Future[None]) -> None:
    """End the running migration: the server rolls back what is not committed, and the thread ends."""
    run.is_cancelled = True
    working.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        async with asyncio.timeout(INTERRUPT_SECONDS):
            connection = await asyncpg.connect(**run.target.connect_kwargs())
            try:
                await connection.execute(_INTERRUPT, run.pid, run.application_name)
            finally:
                await connection.close()
            await asyncio.wait({working})
    except DRIVER_ERRORS as error:
        _log.warning("could not interrupt the migration; the server continues its statement: %r", error)


async def _describe_lock_holders(exc: Exception, run: MigrationRun) -> str:
    """Return which sessions hold the lock that a statement waited for, as the end of a message; empty otherwise."""
    if getattr(driver_error(exc), "sqlstate", None) not in LOCK_STATES:
        return ""
    statement = str(getattr(exc, "statement", None) or "")
    try:
        placement = (await located(run.target)).placement or Placement()
    except GuildbookError:
        return ""
    ours = ownership.owned(run.options.scripts).qualified_relations(placement)
    named = [name for name in ours if re.search(rf"\b{re.escape(name[1])}\b", statement)] or ours
    return await describe_lock_holders(run.target, [".".join(map(quote_identifier, name)) for name in named])


def _explain(exc: Exception, what: str, run: MigrationRun, locks: str = "") -> Exception:
    """Return the error to raise for one that ended Alembic. `locks`: which sessions it waited for."""
    before = run.before
    error = translate(exc)
    if isinstance(error, MigrationError) or (isinstance(error, DatabaseUnavailable) and error.sqlstate is None):
        return error
    if isinstance(exc, CommandError) and isinstance(exc.__cause__, ResolutionError):
        return unknown_revision(before or "none", packs.pack_of_scripts(run.options.scripts))
    if error is None and not isinstance(exc, CommandError):  # the revision itself may raise anything
        where = raised_in(exc, run.options.scripts)
        error = MigrationError(f"{type(exc).__name__}: {exc}{where}")
    cause = driver_error(exc)
    statement = getattr(exc, "statement", None)
    detail = f"; statement: {' '.join(str(statement).split())[:300]}" if statement else ""
    advice = "correct the cause and try again"
    if getattr(cause, "sqlstate", None) == _NOT_ALLOWED:
        advice = (
            "python bot.py doctor says which rights are missing; or set DB_SCHEMA to a schema that the user may use"
        )
    pack = packs.pack_of_scripts(run.options.scripts)
    whose = "" if pack is None else f"pack {pack.name}: "
    return MigrationError(
        f"{whose}could not {what} from revision {before or 'none'}: {error or exc}{detail}{locks}. The database is at"
        f" the last revision that was completed: {advice}",
        sqlstate=getattr(cause, "sqlstate", None),
    )
