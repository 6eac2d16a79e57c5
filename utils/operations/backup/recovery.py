"""Notices that the database has lost what a backup still has, and holds it until that is restored or it begins anew."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from utils.database import Pool
from utils.exceptions import BackupError
from utils.operations.action import BEGIN_ANEW, Outcome, Progress, ignore_progress, record_action
from utils.operations.backup.archive.manifest import Manifest
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.catalog.entries import Entry, newest_good
from utils.operations.backup.catalog.identity import Identity
from utils.operations.backup.restore.assessment import Assessment, State, assess
from utils.operations.backup.restore.restore import restore
from utils.operations.migrations import Actor, admin
from utils.operations.migrations.history import COMMAND_LINE
from utils.service import application, lease
from utils.service.lease import Lease
from utils.text import format_count

#: Whether an operator has decided, or an application has logged in since the tables were created.
_HAS_BEGUN = """
SELECT EXISTS (SELECT FROM ops.admin_actions WHERE command = $1) OR EXISTS (SELECT FROM ops.application)
"""
#: Seconds to wait for the lease, and to release it afterwards.
LEASE_SECONDS, RELEASE_SECONDS = 120.0, 5.0


@dataclass(frozen=True, slots=True)
class Hold:
    """Why nothing may be written to the database before an operator has decided."""

    state: State
    reason: str
    #: The newest backup of it; None if that is unknown, or if there is none.
    backup: Manifest | None
    #: Why no backup is known, if there may be one.
    problem: str = ""
    #: Whether the backup is known to be of the application of the token.
    is_of_application: bool = False

    @property
    def advice(self) -> str:
        """What to type."""
        id = "ID" if self.backup is None else self.backup.id
        restore = f"to restore it, run python bot.py backup restore {id} (in Discord: /db backup restore)"
        if self.state == "damaged":
            return restore if self.backup is not None else "restore its tables, or recreate the database"
        return f"{restore}; to begin anew, run python bot.py db begin-anew (in Discord: /db begin-anew)"

    @property
    def what_happened(self) -> str:
        """What happened, for people."""
        found = self.problem
        if self.backup is not None:
            found = (
                f"backup {self.backup.id} of {self.backup.made_at:%Y-%m-%d %H:%M} UTC with"
                f" {format_count(self.backup.total_rows, 'row')} is of the same application, host and database"
            )
        known = f", and {found}" if found else ""
        return f"the database is {self.state} ({self.reason}){known}: nothing is written to it"

    @property
    def line(self) -> str:
        """What happened and what to do, for people."""
        return f"{self.what_happened}; {self.advice}"

    def details(self) -> dict[str, Any]:
        """Return what GET /readyz shows."""
        return {
            "reason": f"the database is {self.state}: {self.reason}",
            "backup": None if self.backup is None else self.backup.id,
            "problem": self.problem or None,
            "todo": self.advice,
        }


async def suggest_restore(pool: Pool, catalog: BackupCatalog) -> str | None:
    """Return a line with the command to type if the database has lost what a backup has; None otherwise.

    Raises `DatabaseUnavailable`, and `BackupError` if the backups cannot be read.
    """
    assessment = await assess(pool)
    if assessment.is_fine:
        return None
    serving = await catalog.serving(pool)
    entries, database = await serving.entries(), serving.identity.database
    found = newest_good(entries) or next((entry for entry in entries if _may_be_meant(entry, database)), None)
    newest = None if found is None else found.manifest
    if found is None or newest is None:
        return None
    return (
        f"the database is {assessment.state} ({assessment.reason}), and there is backup {newest.id} of"
        f" {newest.made_at:%Y-%m-%d %H:%M} UTC with {format_count(newest.total_rows, 'row')}: to restore it, run"
        f" python bot.py backup restore {newest.id}"
        + (
            ""
            if found.is_own
            else " --from-other, if it is of this bot: version 0.1.0 made it, and did not record whose"
        )
    )


def _may_be_meant(entry: Entry, database: str) -> bool:
    """Return whether a backup of 0.1.0 may be of a database, although nothing says whose it is."""
    manifest = entry.manifest
    is_unknown = manifest is not None and manifest.host is None and manifest.database == database
    return entry.is_restorable and is_unknown


async def find_loss(pool: Pool) -> Assessment | None:
    """Return the assessment of a database that must not be written to if a backup of it exists; None if it may.

    It must not if some tables are missing, that of the leases among them, and if it is empty and nobody has begun anew.
    Raises `DatabaseError`.
    """
    assessment = await assess(pool)
    if assessment.state == "fine" or (assessment.state == "damaged" and await lease.has_table(pool)):
        return None
    if assessment.state == "empty" and assessment.has_tables and await _has_begun(pool):
        return None
    return assessment


async def find_hold(
    pool: Pool,
    catalog: BackupCatalog,
    loss: Assessment,
    fetch_application: Callable[[], Awaitable[int | None]] | None = None,
) -> Hold | None:
    """Return why a database with this loss must be held, or None if nothing is known that could be restored into it.

    An empty one is held if there is a backup of the same application, host and database, also one that is damaged or
    not signed: that proves that there was data. A store that does not answer may have one, and an application that is
    unknown (there is no `fetch_application`, or it returns None) may be the same. Raises `DatabaseError`, and
    `BackupError` if the local backups cannot be read.
    """
    # Whatever the lost database said about its application: the token decides.
    identity = Identity(None, pool.direct.location, await pool.fetchval("SELECT current_database()"))
    entries, errors = await catalog.scan()
    found = [entry for entry in entries if _may_be_of(entry, identity)]
    application_id = await fetch_application() if found and fetch_application is not None else None
    if application_id is not None:
        found = [it for it in found if it.manifest is None or it.manifest.application_id == application_id]
    newest = next((entry.manifest for entry in found if entry.is_restorable), None)
    if newest is not None or loss.state == "damaged":
        is_of_application = newest is not None and application_id is not None
        return Hold(loss.state, loss.reason, newest, is_of_application=is_of_application)
    if errors:
        return Hold(loss.state, loss.reason, None, problem=f"backups cannot be listed: {errors[0]}")
    if found:
        return Hold(loss.state, loss.reason, None, problem=f"no backup is usable: {found[0].problem}")
    return None


def _may_be_of(entry: Entry, identity: Identity) -> bool:
    """Return whether a backup may be a full one of a database with guilds; those of 0.1.0 do not say of which."""
    manifest = entry.manifest
    if manifest is None:
        return entry.is_local
    has_guilds = manifest.is_regular and manifest.guilds > 0
    return has_guilds and manifest.host is not None and identity.owns(manifest, is_local=entry.is_local)


async def require_no_hold(pool: Pool, catalog: BackupCatalog) -> None:
    """Raise `BackupError` if the database is empty and must be held: what fills it would hide the loss."""
    loss = await find_loss(pool)
    if loss is not None and loss.state == "empty":
        hold = await find_hold(pool, catalog, loss)
        if hold is not None:
            raise BackupError(hold.line)


async def _has_begun(pool: Pool) -> bool:
    # Without the table an older version made the schema, and began to use it.
    return not await application.has_table(pool) or bool(await pool.fetchval(_HAS_BEGUN, BEGIN_ANEW))


async def require_empty(pool: Pool) -> None:
    """Raise `BackupError` if the database is not empty, so that it cannot begin anew."""
    assessment = await assess(pool)
    if assessment.state != "empty":
        what = "has guilds in it" if assessment.is_fine else f"is damaged: {assessment.reason}"
        raise BackupError(f"the database is not empty, it {what}: nothing was changed. To replace it, restore a backup")


async def begin_anew(pool: Pool, *, by: Actor = COMMAND_LINE, progress: Progress = ignore_progress) -> Outcome:
    """Create the schema in an empty database, and record the decision not to restore a backup into it.

    A bot that holds the database continues. Raises `BackupError` if the database is not empty, `MigrationError` if the
    schema cannot be created.
    """
    await require_empty(pool)
    applied = await admin.upgrade(pool, by=by, progress=progress)
    text = f"The database begins anew: {applied.text}. A running bot fills it within seconds, others at their start."
    await record_action(pool, BEGIN_ANEW, {}, text, user_id=by.user_id)
    return Outcome(text, applied.data)


async def restore_lost(pool: Pool, catalog: BackupCatalog, hold: Hold, lease: Lease) -> Outcome | None:
    """Restore the backup of a held empty database, under the lease (RECOVER=auto); None: another process has done so.

    Raises `BackupError` unless the backup is of the application, the server and the database, `GuildbookError` if it
    cannot be restored.
    """
    if hold.state != "empty" or hold.backup is None or not hold.is_of_application:
        raise BackupError(f"nothing is restored without an operator: {hold.line}")
    await admin.upgrade(pool)
    try:
        try:
            async with asyncio.timeout(LEASE_SECONDS):
                await lease.wait()
        except TimeoutError:
            return None
        if (await assess(pool)).state != "empty":
            return None
        return await restore(pool, catalog, hold.backup.id, from_other=True)  # the hold has compared whose it is
    finally:
        await lease.release(RELEASE_SECONDS)
