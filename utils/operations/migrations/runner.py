"""Run the schema's revisions: upgrade, downgrade, stamp, and which revision a database is at.

Alembic is synchronous and runs in a thread, so the event loop is not blocked.
"""

from __future__ import annotations

import asyncio
import io
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.script.revision import ResolutionError, RevisionError
from alembic.util import CommandError
from sqlalchemy import Connection

from utils.database import ConnectTarget, Pool
from utils.exceptions import DRIVER_ERRORS, DatabaseUnavailable, MigrationError, driver_error, translate
from utils.operations.migrations import history
from utils.operations.migrations.environment import DEFAULTS, MigrationOptions, MigrationRun, run_on_connection
from utils.operations.migrations.history import BOT, Actor, AppliedRevision, Pause
from utils.operations.migrations.invalid_indexes import DroppedIndexes

_log = logging.getLogger(__name__)

#: Alembic keeps its state in module globals: one command at a time.
_alembic = threading.Lock()

#: Seconds for a cancelled migration to end.
INTERRUPT_SECONDS = 5.0
#: Seconds for reading the schema, comparing it with the models included.
READ_SECONDS = 60.0

ResultT = TypeVar("ResultT")


class Revision(NamedTuple):
    """A revision that this version knows."""

    id: str
    #: The first line of its docstring.
    description: str


@dataclass(frozen=True, slots=True)
class MigrationResult:
    """What an upgrade or a downgrade did."""

    #: The revision before; None: the database had no schema.
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

    Cancelling it ends the running statement, which rolls its revision back. A `Pool` gets new connections afterwards.

    Parameters
    ----------
    timeout: seconds to wait for another process that migrates.
    respect_pause: do nothing while AUTO_MIGRATE is paused. Without it, reaching the newest revision ends the pause.
    by: who migrates, for `ops.migrations`.
    on_applied: called on the event loop with each applied revision.

    Raises
    ------
    MigrationError: a revision failed, or the database is at a revision that this version does not know.
    DatabaseUnavailable: the server cannot be reached.
    """
    run = MigrationRun(
        target=_direct(database),
        options=options,
        timeout=timeout,
        by=by,
        is_upgrade=True,
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
    """Record that the database is at a revision, without running anything. Raises like `upgrade`.

    Operators use `admin.stamp`, which first checks that it is true.
    """
    run = MigrationRun(target=_direct(database), options=options, timeout=timeout, by=by)
    await _run(database, f"stamp {revision}", partial(command.stamp, revision=revision), run)


async def prepare_schema(pool: Pool, *, auto_migrate: bool, options: MigrationOptions = DEFAULTS) -> None:
    """Bring the schema up to date at a start, if the settings (`auto_migrate`) and the database allow it.

    Raises `MigrationError` when revisions are missing that may not be applied, or when one fails.
    """
    paused: Pause | None = None
    if auto_migrate:
        paused = (await upgrade(pool, respect_pause=True, options=options)).paused
        if paused is None:
            return
        _log.warning("AUTO_MIGRATE is paused until python bot.py db upgrade: %s", paused)
    if missing := await pending(pool, options=options):
        why = "AUTO_MIGRATE is off" if paused is None else f"AUTO_MIGRATE is paused: {paused}"
        raise MigrationError(f"the schema lacks revision {', '.join(missing)}, and {why}; run python bot.py db upgrade")


async def current(database: Pool | ConnectTarget) -> str | None:
    """Return the revision that the database is at; None: it has no schema."""

    def read(connection: Connection) -> str | None:
        return MigrationContext.configure(connection).get_current_revision()

    return await read_schema(database, read)


async def pending(database: Pool | ConnectTarget, *, options: MigrationOptions = DEFAULTS) -> list[str]:
    """Return the revisions that `upgrade` would apply, oldest first.

    Raises `MigrationError` when the database is at a revision that this version does not know.
    """
    revision = await current(database)
    scripts = ScriptDirectory.from_config(_config(options))
    try:
        steps = list(scripts.iterate_revisions("heads", revision or "base"))
    except (CommandError, RevisionError) as exc:
        raise _unknown_revision(revision) from exc
    return [step.revision for step in reversed(steps)]


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
    is_table_kept = has_history(revision, options=options)

    def write(connection: Connection) -> Pause:
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
    scripts = ScriptDirectory.from_config(_config(options))
    return [Revision(step.revision, (step.doc or "").strip().partition("\n")[0]) for step in scripts.walk_revisions()][
        ::-1
    ]


def has_history(revision: str, *, options: MigrationOptions = DEFAULTS) -> bool:
    """Return whether a database at a revision (or `base`) has the table `ops.migrations`."""
    order = ["base", *(known.id for known in known_revisions(options=options))]
    return order.index(revision) >= order.index(history.TABLE_REVISION)


def resolve_revision(
    current: str | None, revision: str | None, *, down: bool = False, options: MigrationOptions = DEFAULTS
) -> str:
    """Return the id of the revision that an operator means, `base` for no schema at all.

    `current`: where the database is. `revision`: None means the newest or, for a downgrade, the previous one.
    Raises `MigrationError` for an unknown revision, and for one in the other direction.
    """
    order = ["base", *(known.id for known in known_revisions(options=options))]
    here = current or "base"
    if here not in order:
        raise _unknown_revision(here)
    position = order.index(here)
    if revision is None:
        return order[max(position - 1, 0)] if down else order[-1]
    goal = order[-1] if revision in ("head", "heads") else revision
    if goal not in order:
        raise MigrationError(f"there is no revision {revision[:40]!r}: choose one of {', '.join(order)}")
    if (order.index(goal) > position) if down else (order.index(goal) < position):
        raise MigrationError(
            f"the database is at {here}, and {goal} is {'later' if down else 'earlier'}: that is"
            f" {'an upgrade' if down else 'a downgrade'}"
        )
    return goal


def offline_sql(revisions: str = "base:head", *, down: bool = False, options: MigrationOptions = DEFAULTS) -> str:
    """Return the SQL of a range of revisions, or with `down` of reverting it; no database is needed."""
    buffer = io.StringIO()
    config = _config(options)
    config.output_buffer = buffer
    config.attributes["options"] = options
    with _alembic:
        (command.downgrade if down else command.upgrade)(config, revisions, sql=True)
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


def _config(options: MigrationOptions) -> Config:
    config = Config(stdout=io.StringIO())
    config.set_main_option("script_location", str(options.scripts).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


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
    config = _config(run.options)
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
        raise _explain(exc, what, run.before) from exc
    if run.applied:
        seconds = round(time.monotonic() - started, 2)
        _log.info(
            "schema migrated: %s", what, extra={"before": run.before, "revisions": run.applied, "seconds": seconds}
        )
        if isinstance(database, Pool):
            await database.renew()
    return MigrationResult(run.before, tuple(run.applied), run.indexes, run.paused)


async def _interrupt(run: MigrationRun, working: asyncio.Future[None]) -> None:
    """End the running migration: the server rolls back what is not committed, and the thread ends."""
    run.is_cancelled = True
    working.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        async with asyncio.timeout(INTERRUPT_SECONDS):
            if run.pid is not None:
                connection = await asyncpg.connect(**run.target.connect_kwargs())
                try:
                    await connection.execute("SELECT pg_terminate_backend($1)", run.pid)
                finally:
                    await connection.close()
            await asyncio.wait({working})
    except DRIVER_ERRORS as error:
        _log.warning("could not interrupt the migration; the server continues its statement: %r", error)


def _explain(exc: Exception, what: str, before: str | None) -> Exception:
    """Return the error to raise for one that ended Alembic."""
    error = translate(exc)
    if isinstance(error, MigrationError) or (isinstance(error, DatabaseUnavailable) and error.sqlstate is None):
        return error
    if isinstance(exc, CommandError) and isinstance(exc.__cause__, ResolutionError):
        return _unknown_revision(before)
    if error is None and not isinstance(exc, CommandError):
        return exc
    cause = driver_error(exc)
    statement = getattr(exc, "statement", None)
    detail = f"; statement: {' '.join(str(statement).split())[:300]}" if statement else ""
    return MigrationError(
        f"could not {what} from revision {before or 'none'}: {error or exc}{detail}. The database is at the last"
        " revision that was completed: correct the cause and try again",
        sqlstate=getattr(cause, "sqlstate", None),
    )


def _unknown_revision(revision: str | None) -> MigrationError:
    return MigrationError(
        f"the database is at revision {revision}, which this version does not know: a newer Guildbook migrated it."
        " Run that version, or restore a backup"
    )
