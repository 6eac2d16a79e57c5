"""The schema's revisions: up, down, which one, and whether the models have drifted from them.

Alembic works in a thread of its own, so the event loop goes on. The lock, the connection and the comparison are in
`utils.operations.migrations.environment`, where `migrations/env.py` finds them too.
"""

from __future__ import annotations

import asyncio
import io
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.script.revision import RevisionError
from alembic.util import CommandError
from sqlalchemy import Connection, MetaData, text

from models import Base
from models.views import ROLE_MEMBERSHIP
from utils.database import ConnectTarget, Pool
from utils.exceptions import DatabaseUnavailable, MigrationError, driver_error, translate
from utils.operations.migrations.environment import comparison, declare, on_connection, partitions
from utils.operations.migrations.invalid import Dropped

_log = logging.getLogger(__name__)

#: Alembic keeps what it works on in module globals: one at a time.
_alembic = threading.Lock()

#: Seconds for a migration that is called off to end.
INTERRUPT_SECONDS = 5.0
SCRIPTS = Path(__file__).resolve().parents[3] / "migrations"


@dataclass(frozen=True, slots=True)
class Done:
    """What an upgrade or a downgrade did."""

    #: The revision before; None: there was none.
    before: str | None = None
    #: The revisions applied or taken back, in that order.
    revisions: tuple[str, ...] = ()
    #: What became of invalid indexes; an upgrade drops them first.
    invalid: Dropped = field(default_factory=Dropped)
    #: Why nothing was done: the switch was off and was to be heeded. None: it was not, or was not to be.
    kept_off: str | None = None


async def upgrade(
    where: Pool | ConnectTarget,
    revision: str = "head",
    *,
    timeout: float = 300.0,
    heeds_switch: bool = False,
    on_applied: Callable[[str], None] | None = None,
) -> Done:
    """Bring the schema up to a revision; nothing happens when it is there already.

    `timeout`: seconds to wait for another process that migrates. A `Pool` gets fresh connections afterwards.
    `heeds_switch`: do nothing after a downgrade that an operator asked for
    (`utils.operations.migrations.switch`); without it the switch is on again once the newest revision is reached.
    `on_applied` is called on the event loop with each revision
    that is done. Cancelled, it ends the statement under way, which rolls its migration back.
    Raises `MigrationError`, or `DatabaseUnavailable` when the server cannot be reached.
    """
    notes = {"is_upgrade": True, "heeds_switch": heeds_switch}
    work = partial(command.upgrade, revision=revision)
    return await _run(where, f"upgrade to {revision}", work, timeout, notes, on_applied)


async def downgrade(
    where: Pool | ConnectTarget,
    revision: str,
    *,
    timeout: float = 300.0,
    on_applied: Callable[[str], None] | None = None,
) -> Done:
    """Take the schema down to a revision (`base`: nothing of ours is left). Raises like `upgrade`.

    The switch stays as it is: `utils.operations.migrations.admin.downgrade` is what operators use.
    """
    work = partial(command.downgrade, revision=revision)
    return await _run(where, f"downgrade to {revision}", work, timeout, {}, on_applied)


async def current(where: Pool | ConnectTarget) -> str | None:
    """Return the revision that the database is at, or None when it has none of our tables."""

    def ask(connection: Connection) -> str | None:
        return MigrationContext.configure(connection).get_current_revision()

    revision: str | None = await _ask(where, ask)
    return revision


async def pending(where: Pool | ConnectTarget) -> list[str]:
    """Return the revisions that `upgrade` would apply, oldest first.

    Raises `MigrationError` when the database is at a revision that this version does not know.
    """
    at = await current(where)
    scripts = ScriptDirectory.from_config(_config())
    try:
        steps = list(scripts.iterate_revisions("heads", at or "base"))
    except (CommandError, RevisionError) as exc:
        raise MigrationError(_unknown_revision(at)) from exc
    return [step.revision for step in reversed(steps)]


async def check_drift(where: Pool | ConnectTarget, *, metadata: MetaData = Base.metadata) -> list[str]:
    """Return what differs between the database and the models, one line each; nothing is changed."""

    def compare(connection: Connection) -> list[str]:
        if metadata is Base.metadata:
            declare()
        options = comparison(skip=partitions(connection), metadata=metadata)
        migration = MigrationContext.configure(connection, opts=options)
        found = [_line(difference) for difference in _flat(compare_metadata(migration, metadata))]
        found += _view_drift(connection)
        connection.rollback()
        return found

    lines: list[str] = await _ask(where, compare)
    return lines


async def stamp(where: Pool | ConnectTarget, revision: str, *, timeout: float = 300.0) -> None:
    """Write down that the database is at a revision, and change nothing else. Raises like `upgrade`.

    `utils.operations.migrations.admin.stamp` is what operators use: it looks first whether that is true.
    """
    await _run(where, f"stamp {revision}", partial(command.stamp, revision=revision), timeout, {}, None)


def revisions() -> list[tuple[str, str]]:
    """Return every revision that this version knows with the first line of its description, oldest first."""
    scripts = ScriptDirectory.from_config(_config())
    return [(step.revision, (step.doc or "").strip().partition("\n")[0]) for step in scripts.walk_revisions()][::-1]


def offline_sql(revisions: str = "base:head", *, down: bool = False) -> str:
    """Return the SQL of a range of revisions without asking any database; `down`: to take them back."""
    buffer = io.StringIO()
    config = _config()
    config.output_buffer = buffer
    with _alembic:
        (command.downgrade if down else command.upgrade)(config, revisions, sql=True)
    return buffer.getvalue()


def _config() -> Config:
    config = Config(stdout=io.StringIO())
    config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _direct(where: Pool | ConnectTarget) -> ConnectTarget:
    return where.direct if isinstance(where, Pool) else where


async def _run(
    where: Pool | ConnectTarget,
    what: str,
    work: Callable[[Config], None],
    timeout: float,
    notes: Mapping[str, Any],
    on_applied: Callable[[str], None] | None,
) -> Done:
    config = _config()
    config.attributes.update(notes)
    if on_applied is not None:
        loop = asyncio.get_running_loop()
        config.attributes["on_applied"] = lambda revision: loop.call_soon_threadsafe(on_applied, revision)
    config.attributes["target"] = _direct(where)
    config.attributes["timeout"] = timeout
    started = time.monotonic()

    def alone() -> None:
        if not _alembic.acquire(timeout=timeout):
            raise MigrationError(f"this process has been migrating for {timeout:.0f} s already: wait until it is done")
        try:
            work(config)
        finally:
            _alembic.release()

    working = asyncio.ensure_future(asyncio.to_thread(alone))
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        await _interrupt(config, working)
        raise
    except Exception as exc:
        raise _explained(exc, what, config.attributes.get("before")) from exc
    applied: list[str] = config.attributes.get("applied", [])
    if applied:
        seconds = round(time.monotonic() - started, 2)
        before = config.attributes.get("before")
        _log.info("schema migrated: %s", what, extra={"before": before, "revisions": applied, "seconds": seconds})
        if isinstance(where, Pool):
            await where.renew()
    noted = config.attributes
    return Done(noted.get("before"), tuple(applied), noted.get("invalid", Dropped()), noted.get("kept_off"))


async def _interrupt(config: Config, working: asyncio.Future[None]) -> None:
    """End the migration under way: what is not committed is rolled back, and the thread comes to its end."""
    config.attributes["stop"] = True
    working.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        async with asyncio.timeout(INTERRUPT_SECONDS):
            pid = config.attributes.get("pid")
            if pid is not None:
                connection = await asyncpg.connect(**config.attributes["target"].connect_kwargs())
                try:
                    await connection.execute("SELECT pg_terminate_backend($1)", pid)
                finally:
                    await connection.close()
            await asyncio.wait({working})
    except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        _log.warning("a migration could not be interrupted, the server goes on with its statement: %r", error)


async def _ask(where: Pool | ConnectTarget, question: Callable[[Connection], Any]) -> Any:
    """Run a question in a thread and return its answer: reflecting a schema takes longer than the loop may stall."""
    target = _direct(where)
    try:
        return await asyncio.to_thread(lambda: asyncio.run(on_connection(target, question)))
    except Exception as exc:
        raise _explained(exc, "look at the schema", None) from exc


def _explained(exc: Exception, what: str, at: str | None) -> Exception:
    error = translate(exc)
    if isinstance(error, MigrationError) or (isinstance(error, DatabaseUnavailable) and error.sqlstate is None):
        return error
    if isinstance(exc, CommandError) and "Can't locate revision" in str(exc):
        return MigrationError(_unknown_revision(at))
    if error is None and not isinstance(exc, CommandError):
        return exc
    cause = driver_error(exc)
    statement = getattr(exc, "statement", None)
    detail = f"; statement: {' '.join(str(statement).split())[:300]}" if statement else ""
    return MigrationError(
        f"could not {what} from revision {at or 'none'}: {error or exc}{detail}. The database is at the last revision"
        " that was completed: mend the cause and start again",
        sqlstate=getattr(cause, "sqlstate", None),
    )


def _unknown_revision(at: str | None) -> str:
    return (
        f"the database is at revision {at}, which this version does not know: it was migrated by a newer Guildbook."
        " Run that version, or restore a backup"
    )


def _flat(differences: list[Any]) -> list[Any]:
    return [inner for outer in differences for inner in (outer if isinstance(outer, list) else [outer])]


def _line(difference: tuple[Any, ...]) -> str:
    kind, *rest = difference
    return f"{kind}: " + ", ".join(str(part) for part in rest if part is not None and not isinstance(part, dict))


def _view_drift(connection: Connection) -> list[str]:
    """Compare the view with its text in the models, by letting PostgreSQL read both."""
    connection.execute(text(re.sub(r"^CREATE VIEW (\w+)", r"CREATE TEMP VIEW wanted_\1", ROLE_MEMBERSHIP)))
    query = text("SELECT pg_get_viewdef(to_regclass(:name))")
    wanted = connection.scalar(query, {"name": "pg_temp.wanted_role_membership"})
    found = connection.scalar(query, {"name": "role_membership"})
    return [] if wanted == found else ["modify_view: role_membership"]
