"""What a database records of packs: which revisions each is at, what it needs, and which tables are its own.

A pack whose files are gone is known by this alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
from sqlalchemy import Connection, text

from utils import packs
from utils.database import ownership
from utils.database.placement import Placement, placement_of, placement_on
from utils.database.sql import quote_literal
from utils.packs import Pack

#: How the comment on a pack's version table begins. It goes where the table goes, also into dumps.
PACK_COMMENT = "Guildbook pack: "
_PACKS = """
SELECT c.relname::text AS name, quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS qualified,
    obj_description(c.oid, 'pg_class') AS comment
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = CAST($1 AS text) AND c.relkind = 'r' AND c.relname LIKE '%\\_version'
    AND obj_description(c.oid, 'pg_class') LIKE 'Guildbook pack: %'
ORDER BY 1
"""


@dataclass(frozen=True, slots=True)
class RecordedPack:
    """A pack that a database has tables of, whether or not its files still exist."""

    name: str
    #: The revisions that it is at.
    revisions: tuple[str, ...]
    #: The least revision of Guildbook's schema that it needs.
    requires: str
    #: Its tables and views, without the version table.
    relations: tuple[ownership.Name, ...] = ()

    @property
    def is_active(self) -> bool:
        """Whether `COGS` names it."""
        return any(pack.name == self.name for pack in packs.active())

    @property
    def version_table(self) -> str:
        """The table that records its revisions."""
        return f"{self.name}_version"

    def names(self) -> set[ownership.Name]:
        """Return all of its tables and views."""
        return {*self.relations, (None, self.version_table)}


def record_pack_sql(pack: Pack, revisions: Iterable[str]) -> str:
    """Return the SQL that notes what a pack has in a database at some of its revisions."""
    files = ownership.files_at(revisions, pack.scripts)
    relations = sorted(ownership.relations_of(files), key=lambda name: (name[0] or "", name[1]))
    noted = json.dumps({"requires": pack.requires, "relations": relations})
    return " ".join(("COMMENT ON TABLE", pack.version_table, "IS", quote_literal(PACK_COMMENT + noted)))


def read_packs(connection: Connection) -> list[RecordedPack]:
    """Return the packs that the database of a SQLAlchemy connection has tables of."""
    parameters = {"main": placement_of(connection).main}
    rows = connection.execute(text(_PACKS.replace("$1", ":main")), parameters).mappings().all()
    found = [
        _pack_of(
            row["name"],
            row["comment"],
            [value for (value,) in connection.exec_driver_sql(ownership.select_revisions(row["qualified"]))],
        )
        for row in rows
    ]
    return [pack for pack in found if pack is not None]


async def fetch_packs(
    connection: asyncpg.Connection[Any] | Any, placement: Placement | None = None
) -> list[RecordedPack]:
    """Return the packs that the database of an asyncpg connection of ours, or of a `Pool`, has tables of."""
    main = (placement_on(connection) if placement is None else placement).main
    found = [
        _pack_of(
            row["name"],
            row["comment"],
            [value for (value,) in await connection.fetch(ownership.select_revisions(row["qualified"]))],
        )
        for row in await connection.fetch(_PACKS, main)
    ]
    return [pack for pack in found if pack is not None]


def revisions_of_packs(recorded: Iterable[RecordedPack]) -> dict[str, str]:
    """Return the revisions that packs are at (several separated by commas), by the packs' names."""
    return {pack.name: ", ".join(sorted(pack.revisions)) for pack in recorded if pack.revisions}


def _pack_of(table: str, comment: str, revisions: Sequence[str]) -> RecordedPack | None:
    try:
        noted = json.loads(comment.removeprefix(PACK_COMMENT))
        relations = tuple((schema, name) for schema, name in noted["relations"])
        return RecordedPack(table.removesuffix("_version"), tuple(revisions), str(noted["requires"]), relations)
    except (ValueError, KeyError, TypeError):
        return None  # a comment of somebody else's
