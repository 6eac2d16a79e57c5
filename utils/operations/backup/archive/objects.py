"""What a backup contains: our tables, views and sequences, whatever else the database holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from utils import packs
from utils.database import ownership
from utils.database.ownership import VERSION_TABLE
from utils.database.placement import OPS, PUBLIC, Placement
from utils.database.sessions import Connection
from utils.database.sql import quote_identifier

#: A schema and a name in it.
Name = tuple[str, str]

#: Those of the wanted tables that exist, largest first, with their partitions.
_TABLES = """
SELECT n.nspname AS schema, c.relname AS name, format('%I.%I', n.nspname, c.relname) AS quoted,
    ARRAY(SELECT format('%I.%I', pn.nspname, p.relname) FROM pg_partition_tree(c.oid) AS t
        JOIN pg_class AS p ON p.oid = t.relid JOIN pg_namespace AS pn ON pn.oid = p.relnamespace
        WHERE p.oid <> c.oid) AS partitions
FROM unnest($1::text[], $2::text[]) AS wanted (schema, name)
    JOIN pg_namespace AS n ON n.nspname = wanted.schema
    JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = wanted.name
WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence <> 't'
ORDER BY c.relpages DESC, 1, 2
"""
#: The sequences that belong to these tables or that their columns' defaults draw from.
SEQUENCES = """
WITH wanted AS (SELECT to_regclass(name)::oid AS oid FROM unnest($1::text[]) AS name)
SELECT DISTINCT n.nspname AS schema, s.relname AS name
FROM pg_class AS s JOIN pg_namespace AS n ON n.oid = s.relnamespace
WHERE s.relkind = 'S' AND (s.oid IN (
    SELECT d.objid FROM pg_depend AS d JOIN wanted ON d.refobjid = wanted.oid
    WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')
) OR s.oid IN (
    SELECT d.refobjid FROM wanted JOIN pg_attrdef AS a ON a.adrelid = wanted.oid
        JOIN pg_depend AS d ON d.classid = 'pg_attrdef'::regclass AND d.objid = a.oid
    WHERE d.refclassid = 'pg_class'::regclass
)) ORDER BY 1, 2
"""
_DRAWN_COLUMNS = """
SELECT a.attname::text AS name FROM pg_attribute AS a LEFT JOIN pg_attrdef AS d
    ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attrelid = to_regclass($1)
    AND (a.attidentity <> '' OR pg_get_expr(d.adbin, d.adrelid) LIKE 'nextval(%')
"""
_VIEWS = """
SELECT n.nspname AS schema, c.relname AS name
FROM unnest($1::text[], $2::text[]) AS wanted (schema, name)
    JOIN pg_namespace AS n ON n.nspname = wanted.schema
    JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = wanted.name
WHERE c.relkind IN ('v', 'm') ORDER BY 1, 2
"""


@dataclass(frozen=True, slots=True)
class OwnTable:
    """A table of ours that exists."""

    schema: str
    name: str
    #: With its schema, in SQL.
    quoted: str
    #: Its partitions, in the same form.
    partitions: tuple[str, ...] = ()

    @property
    def relations(self) -> list[str]:
        """The table and its partitions."""
        return [self.quoted, *self.partitions]

    @property
    def counted(self) -> str:
        """What to count its rows in, in SQL: what is dumped, without what other programs let inherit from it."""
        parts = " UNION ALL ".join(f"SELECT FROM ONLY {name}" for name in self.relations)
        return f"({parts}) AS t"


@dataclass(frozen=True, slots=True)
class ScratchPlacement(Placement):
    """The scratch schemas that stand for those of a Guildbook, and of its cogs, while a backup is loaded."""

    #: What stands for other schemas with tables of cogs; those that are missing stand for themselves.
    others: Mapping[str, str] = field(default_factory=dict)

    def resolve(self, schema: str | None) -> str:
        found = Placement.resolve(self, schema)
        return self.others.get(found, found)

    def spell(self, schema: str) -> str | None:
        return next((one for one, name in self.others.items() if name == schema), Placement.spell(self, schema))

    def schemas(self) -> list[str]:
        return [*Placement.schemas(self), *self.others.values()]


def placement_of_backup(tables: Iterable[Name]) -> Placement:
    """Return the schemas in which a backup with these tables has ours; a partial one may have any of them."""
    found, owned = list(tables), ownership.owned_tables()
    by_name = {name: schema for schema, name in found if name in (VERSION_TABLE, "guilds", "leases")}
    names = {spelled: {name for schema, name in owned if schema == spelled} for spelled in (None, OPS)}

    def only_in(spelled: str | None) -> str | None:
        others = {name for schema, name in owned if schema != spelled}
        return next((schema for schema, name in found if name in names[spelled] - others), None)

    main = by_name.get(VERSION_TABLE) or by_name.get("guilds") or only_in(None)
    ops = by_name.get("leases") or only_in(OPS)
    if main is None and ops is not None:
        main = PUBLIC if ops == OPS else ops.removesuffix(f"_{OPS}")
    return Placement(main or PUBLIC, ops or Placement.of(main or PUBLIC).ops)


def owned_names(
    schemas: Placement,
    revision: str | None = None,
    pack_revisions: Mapping[str, str] | None = None,
    others: Iterable[ownership.Name] = (),
) -> list[Name]:
    """Return the names of all tables that are ours, whether or not they exist.

    revision: of the database (several: separated by commas), of which also tables count that later revisions drop.
    pack_revisions: the same of each pack, by its name.
    others: names that are ours all the same, such as those of packs whose files are gone.
    """
    former = ownership.tables_at(revision.split(", ")) if revision is not None else frozenset[ownership.Name]()
    for pack in packs.active():
        if (of_pack := (pack_revisions or {}).get(pack.name)) is not None:
            former |= ownership.tables_at(of_pack.split(", "), pack.scripts)
    return sorted((schemas.resolve(schema), name) for schema, name in ownership.owned_tables() | former | {*others})


def qualified(name: Name) -> str:
    """Return a name with its schema, in SQL."""
    return ".".join(map(quote_identifier, name))


async def find_tables(connection: Connection, names: Sequence[Name]) -> list[OwnTable]:
    """Return those of these tables that exist, largest first."""
    rows = await connection.fetch(_TABLES, [schema for schema, _ in names], [name for _, name in names])
    return [OwnTable(row["schema"], row["name"], row["quoted"], tuple(row["partitions"])) for row in rows]


async def find_sequences(connection: Connection, tables: Sequence[OwnTable]) -> list[Name]:
    """Return the sequences that tables draw from."""
    rows = await connection.fetch(SEQUENCES, [name for table in tables for name in table.relations])
    return [(row["schema"], row["name"]) for row in rows]


async def find_drawn_columns(connection: Connection, table: str) -> set[str]:
    """Return the columns of a table that draw from a sequence."""
    return {row["name"] for row in await connection.fetch(_DRAWN_COLUMNS, table)}


async def find_views(connection: Connection, schemas: Placement) -> list[Name]:
    """Return our views that exist."""
    views = [(schemas.resolve(schema), name) for schema, name in ownership.owned().views]
    rows = await connection.fetch(_VIEWS, [schema for schema, _ in views], [name for _, name in views])
    return [(row["schema"], row["name"]) for row in rows]
