"""Tables, views, foreign keys, triggers and functions of the database, as far as they decide what is written."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from utils.database.cache.tokens import FunctionNames
from utils.database.placement import DEFAULT_PLACEMENT, Placement
from utils.database.pool import Pool
from utils.database.statements import Action

#: Seconds to load the catalog.
_LOAD_SECONDS = 30.0

_RELATIONS = """
SELECT c.oid, n.nspname AS schema, c.relname AS name, c.relkind::text AS kind, c.relrowsecurity AS is_row_secured,
    EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = c.oid AND NOT t.tgisinternal)
    OR EXISTS (SELECT FROM pg_rewrite r WHERE r.ev_class = c.oid AND r.ev_type <> '1')
    OR EXISTS (
        SELECT FROM pg_attrdef a JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = a.oid
            JOIN pg_proc p ON d.refclassid = 'pg_proc'::regclass AND d.refobjid = p.oid
        WHERE a.adrelid = c.oid AND p.provolatile = 'v' AND p.pronamespace <> 'pg_catalog'::regnamespace
    ) AS has_side_effects,
    ARRAY(SELECT i.inhparent FROM pg_inherits i WHERE i.inhrelid = c.oid ORDER BY 1) AS parents,
    CASE WHEN c.relkind = 'v' THEN pg_get_viewdef(c.oid) END AS definition,
    ARRAY(
        SELECT DISTINCT d.refobjid
        FROM pg_rewrite r JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
        WHERE c.relkind = 'v' AND r.ev_class = c.oid AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> c.oid
        ORDER BY 1
    ) AS sources
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND c.relpersistence <> 't'
    AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')
ORDER BY c.oid
"""
_FOREIGN_KEYS = """
SELECT confrelid AS parent, conrelid AS child, confdeltype::text AS on_delete, confupdtype::text AS on_update
FROM pg_constraint WHERE contype = 'f' ORDER BY oid
"""
_FUNCTIONS = """
SELECT p.proname AS name,
    bool_or(p.pronamespace <> 'pg_catalog'::regnamespace) AS is_foreign,
    bool_or(p.provolatile = 'v') AS is_volatile,
    bool_or(p.provolatile = 'v' AND p.pronamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace))
        AS may_write
FROM pg_proc p GROUP BY p.proname
"""  # noqa: E501


@dataclass(frozen=True, slots=True)
class Relation:
    """A table, view or materialized view."""

    name: str
    kind: str
    is_row_secured: bool
    #: Whether a write runs user code: a trigger, a rule, a default with a volatile function.
    has_side_effects: bool
    parents: tuple[int, ...]
    #: The query of a view; None for other relations.
    definition: str | None
    #: The relations that a view reads.
    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Catalog:
    """A snapshot of the catalog. Tables are named "schema.table"; a partition has the name of its topmost parent."""

    relations: Mapping[int, Relation]
    #: (parent, child, ON DELETE action, ON UPDATE action), the actions as letters of pg_constraint.
    foreign_keys: tuple[tuple[int, int, str, str], ...]
    functions: FunctionNames
    #: The schemas in which an unqualified name is looked up, in order.
    search_path: tuple[str, ...]
    placement: Placement = DEFAULT_PLACEMENT
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)
    _children: dict[int, list[int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ids", {relation.name: oid for oid, relation in self.relations.items()})
        children: dict[int, list[int]] = {}
        for oid, relation in self.relations.items():
            for parent in relation.parents:
                children.setdefault(parent, []).append(oid)
        object.__setattr__(self, "_children", children)

    def find(self, schema: str | None, name: str) -> int | None:
        """Return the oid of a relation; None for an unknown name and for system catalogs."""
        if schema is not None:
            return self._ids.get(f"{self.placement.resolve(schema)}.{name}")
        if name.startswith("pg_"):  # pg_catalog precedes the search path
            return None
        return next((found for s in self.search_path if (found := self._ids.get(f"{s}.{name}")) is not None), None)

    def canonical_names(self, tables: Iterable[str]) -> frozenset[str] | None:
        """Return the names under which `tables_read` returns these tables; None when one of them is unknown."""
        names: set[str] = set()
        for table in tables:
            schema, _, name = table.rpartition(".")
            oid = self.find(schema or None, name)
            if oid is None:
                return None
            bases = (
                found
                for found in self._with_sources([oid])
                if found in self.relations and self.relations[found].kind != "v"
            )
            names.update(self.relations[root].name for root in self._roots(bases))
        return frozenset(names)

    def tables_read(self, oids: Iterable[int]) -> frozenset[str] | None:
        """Return the tables behind these relations; None when the result of reading them depends on more than rows."""
        found = set(oids)
        seen = self._with_sources(found)
        for oid in seen:
            relation = self.relations.get(oid)
            if relation is None or relation.kind == "f" or relation.is_row_secured:
                return None
            if relation.definition is not None and not self.functions.effects_of(relation.definition).is_deterministic:
                return None
        bases = (oid for oid in seen if self.relations[oid].kind != "v")
        return frozenset(self.relations[root].name for root in self._roots(bases))

    def tables_written(self, oids: Iterable[int], action: Action) -> frozenset[str] | None:
        """Return the tables that an action on these relations writes; None when a trigger or rule may write others."""
        names: set[str] = set()
        seen: set[tuple[int, Action]] = set()
        open_: list[tuple[int, Action]] = [(oid, action) for oid in oids]
        while open_:
            item = open_.pop()
            if item in seen:
                continue
            seen.add(item)
            oid, does = item
            relation = self.relations.get(oid)
            if relation is None or relation.has_side_effects:
                return None
            if relation.kind == "v":
                open_.extend((source, does) for source in relation.sources)
                continue
            roots = set(self._roots([oid]))
            names.update(self.relations[root].name for root in roots)
            open_.extend((other, does) for other in (*roots, *self._children.get(oid, ())))
            for parent, child, on_delete, on_update in self.foreign_keys:
                if parent != oid:
                    continue
                if does == "DELETE" and on_delete in "cnd":
                    open_.append((child, "DELETE" if on_delete == "c" else "UPDATE"))
                elif does == "UPDATE" and on_update in "cnd":
                    open_.append((child, "UPDATE"))
        return frozenset(names)

    def _with_sources(self, oids: Iterable[int]) -> set[int]:
        """Return the relations and everything that the views among them read."""
        seen: set[int] = set()
        open_ = list(oids)
        while open_:
            oid = open_.pop()
            if oid not in seen:
                seen.add(oid)
                open_.extend(self.relations[oid].sources if oid in self.relations else ())
        return seen

    def _roots(self, oids: Iterable[int]) -> Iterator[int]:
        """Yield the topmost parents of the inheritance trees that contain these relations."""
        seen: set[int] = set()
        open_ = list(oids)
        while open_:
            oid = open_.pop()
            if oid in seen or oid not in self.relations:
                continue
            seen.add(oid)
            parents = self.relations[oid].parents
            open_.extend((*parents, *self._children.get(oid, ())))
            if not parents:
                yield oid


async def load_catalog(pool: Pool) -> Catalog:
    """Load the catalog. Raises `DatabaseError` when the database does not answer."""
    async with pool.transaction(isolation="repeatable_read", readonly=True) as conn:
        async with asyncio.timeout(_LOAD_SECONDS):
            relations = await conn.fetch(_RELATIONS)
            keys = await conn.fetch(_FOREIGN_KEYS)
            functions = await conn.fetch(_FUNCTIONS)
            keywords = await conn.fetchval("SELECT array_agg(word) FROM pg_get_keywords()")
            path = await conn.fetchval("SELECT current_schemas(false)::text[]")
    return Catalog(
        {
            row["oid"]: Relation(
                f"{row['schema']}.{row['name']}", row["kind"], row["is_row_secured"], row["has_side_effects"],
                tuple(row["parents"]), row["definition"], tuple(row["sources"]),
            )
            for row in relations
        },
        tuple((row["parent"], row["child"], row["on_delete"], row["on_update"]) for row in keys),
        FunctionNames(
            builtin=frozenset(row["name"] for row in functions if not row["is_foreign"] and not row["is_volatile"]),
            foreign=frozenset(row["name"] for row in functions if row["is_foreign"]),
            volatile=frozenset(row["name"] for row in functions if row["is_volatile"]),
            writing=frozenset(row["name"] for row in functions if row["may_write"]),
            keywords=frozenset(keywords),
        ),
        tuple(path),
        pool.placement,
    )  # fmt: skip
