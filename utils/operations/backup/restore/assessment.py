"""The state of the live database: whether it has what the mirror needs, is empty, or is damaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models import Base
from utils.database import Pool
from utils.database.ownership import VERSION_TABLE, fetch_version, tables_of_packs
from utils.database.placement import Placement
from utils.exceptions import MISSING_TABLE, DatabaseError, DatabaseUnavailable
from utils.operations import migrations
from utils.operations.backup.archive.objects import qualified

#: Tables that every revision has (migration 0001).
_ESSENTIAL_TABLES = frozenset((VERSION_TABLE, "guilds", "users", "members", "roles", "channels", "ops.leases"))
#: SQLSTATEs of a database that is itself damaged: internal error, corrupted data or index, missing or unreadable file
#: (PostgreSQL manual, appendix A).
_CORRUPTION = ("XX000", "XX001", "XX002", "58030", "58P01")
_MISSING = "ARRAY(SELECT name FROM unnest($1::text[]) AS expected(name) WHERE to_regclass(name) IS NULL) AS missing"
_FIND_MISSING = "SELECT " + _MISSING
_ASSESS = "SELECT " + _MISSING + ", NOT EXISTS (SELECT FROM guilds) AS is_empty"  # noqa: S608 - constants
#: Seconds for the query, which must not hold up a start.
TIMEOUT_SECONDS = 10.0

#: Of a database: whether it has what the mirror needs, no guilds or no tables at all, or only some of the tables.
State = Literal["fine", "empty", "damaged"]


@dataclass(frozen=True, slots=True)
class Assessment:
    """The state of the live database."""

    state: State
    #: Why it is not fine, for people; empty if it is.
    reason: str = ""
    #: False if it has no tables of Guildbook's, so that nothing can be lost.
    has_tables: bool = True

    @property
    def is_fine(self) -> bool:
        """Whether there is nothing to recover."""
        return self.state == "fine"


def _qualified_tables(placement: Placement) -> dict[str, str]:
    """Return the tables of the schema: their names as SQL of this database spells them, and as the models do."""
    of_packs = tables_of_packs()  # without one of them, that pack is not loaded
    tables = [(None, VERSION_TABLE), *((table.schema, table.name) for table in Base.metadata.sorted_tables)]
    tables = [name for name in tables if name not in of_packs]
    return {
        qualified((placement.resolve(schema), name)): f"{schema}.{name}" if schema else name for schema, name in tables
    }


async def assess(pool: Pool) -> Assessment:
    """Return whether the database is empty (no tables of Guildbook's, or no guild in them), damaged, or fine.

    One query if it is fine. Raises `DatabaseUnavailable` if it does not answer.
    """
    expected = _qualified_tables(pool.placement)
    try:
        try:
            row = await pool.fetchrow(_ASSESS, list(expected), timeout=TIMEOUT_SECONDS)
            assert row is not None, "one row"
            absent, is_empty = row["missing"], bool(row["is_empty"])
        except DatabaseError as error:
            if error.sqlstate not in MISSING_TABLE:
                raise
            absent, is_empty = await pool.fetchval(_FIND_MISSING, list(expected), timeout=TIMEOUT_SECONDS), True
        missing = [expected[name] for name in absent]
        if VERSION_TABLE in missing and (await fetch_version(pool)).revisions:  # those of the former version table
            missing.remove(VERSION_TABLE)
        if len(missing) == len(expected):
            return Assessment("empty", "it has no tables yet", has_tables=False)
        lost = [name for name in missing if name in _ESSENTIAL_TABLES]
        # A schema at the newest revision must have every table.
        if missing and not lost and not await migrations.pending(pool):
            lost = missing
    except DatabaseUnavailable:
        raise
    except DatabaseError as error:
        if error.sqlstate not in _CORRUPTION:
            raise
        return Assessment("damaged", str(error))
    if lost:
        return Assessment("damaged", f"tables are missing: {', '.join(lost[:5])}{', …' if len(lost) > 5 else ''}")
    return Assessment("empty", "it has no guilds") if is_empty else Assessment("fine")
