"""Whether the database has lost what a backup still has, and what to type then."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from models import Base
from utils.database import Pool
from utils.exceptions import DatabaseError, DatabaseUnavailable
from utils.operations.backup.source import Backups

_log = logging.getLogger(__name__)

#: Tables that every revision has (migration 0001).
_ALWAYS = frozenset(("alembic_version", "guilds", "users", "members", "roles", "channels", "ops.leases"))
#: SQLSTATEs of a database that is broken itself: internal error, corrupted data or index, a file that is gone or
#: unreadable (PostgreSQL manual, appendix A).
_BROKEN = ("XX000", "XX001", "XX002", "58030", "58P01")
_UNDEFINED_TABLE = "42P01"
_MISSING = "ARRAY(SELECT name FROM unnest($1::text[]) AS wanted(name) WHERE to_regclass(name) IS NULL) AS missing"
_LOOK = "SELECT " + _MISSING + ", NOT EXISTS (SELECT FROM guilds) AS is_empty"  # noqa: S608 - constants
#: Seconds: a start must not hang on it.
SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Assessment:
    """What a look at the database says of it."""

    state: Literal["fine", "empty", "damaged"]
    #: Why it is not fine, for people; empty when it is.
    reason: str = ""
    #: False: there are no tables of ours, so nothing of ours can be lost.
    has_tables: bool = True

    @property
    def is_fine(self) -> bool:
        """Whether there is nothing to recover."""
        return self.state == "fine"


async def assess(database: Pool) -> Assessment:
    """Say whether the database is empty (no tables of ours, or no guild in them), damaged, or fine: in one query then.

    Raises `DatabaseUnavailable` when it does not answer.
    """
    wanted = sorted({"alembic_version", *(table.fullname for table in Base.metadata.sorted_tables)})
    try:
        try:
            found = await database.fetchrow(_LOOK, wanted, timeout=SECONDS)
            assert found is not None, "one row"
            missing, is_empty = list(found["missing"]), bool(found["is_empty"])
        except DatabaseError as error:
            if error.sqlstate != _UNDEFINED_TABLE:
                raise
            missing, is_empty = list(await database.fetchval("SELECT " + _MISSING, wanted, timeout=SECONDS)), True
        if len(missing) == len(wanted):
            return Assessment("empty", "there are no tables yet", has_tables=False)
        lost = [name for name in missing if name in _ALWAYS]
        if missing and not lost and await _is_up_to_date(database):
            lost = missing
    except DatabaseUnavailable:
        raise
    except DatabaseError as error:
        if error.sqlstate not in _BROKEN:
            raise
        return Assessment("damaged", str(error))
    if lost:
        return Assessment("damaged", f"tables are missing: {', '.join(lost[:5])}{', …' if len(lost) > 5 else ''}")
    return Assessment("empty", "there is no guild in it") if is_empty else Assessment("fine")


async def _is_up_to_date(database: Pool) -> bool:
    """Return whether the schema claims to be at the newest revision: then all tables should be there."""
    from utils.operations import migrations

    return not await migrations.pending(database)


async def offer(database: Pool, backups: Backups) -> str | None:
    """Return the line to log at a start, with what to type, when the database has lost what a backup has.

    None: it is fine, or there is no backup with rows. Raises `DatabaseUnavailable`, and `BackupError` when the backups
    cannot be read.
    """
    found = await assess(database)
    if found.is_fine:
        return None
    newest = await backups.newest()
    if newest is None or not newest.rows:
        return None
    return (
        f"the database is {found.state} ({found.reason}), and backup {newest.id} of {newest.made_at:%Y-%m-%d %H:%M} UTC"
        f" is there, with {newest.rows:,} rows: python bot.py backup restore {newest.id} brings it back"
    )
