"""What the database says about its tables, views, foreign keys, triggers and functions: enough to follow a write."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from utils.database.cache.tokens import Words
from utils.database.pool import Pool

Action = Literal["INSERT", "UPDATE", "DELETE", "TRUNCATE"]

#: Seconds that the catalogue may take to answer.
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
#: The harmless ones only: what is not among them may be volatile, of somebody's own, or not there at all.
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
    #: Whether a write runs code of somebody's own: a trigger, a rule, a default with a volatile function.
    has_side_effects: bool
    parents: tuple[int, ...]
    #: A view's text, None for what is no view.
    definition: str | None
    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Catalog:
    """One state of the catalogue. Tables are named "schema.table"; a partition goes by its topmost parent's name."""

    relations: Mapping[int, Relation]
    #: (parent, child, what the child does ON DELETE, ON UPDATE), in the letters of pg_constraint.
    foreign_keys: tuple[tuple[int, int, str, str], ...]
    words: Words
    #: The schemas that a bare name is looked for in, in their order.
    search_path: tuple[str, ...]
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
        """Return a relation's oid, None when there is none that a query of ours may read."""
        if schema is not None:
            return self._ids.get(f"{schema}.{name}")
        if name.startswith("pg_"):  # pg_catalog comes before the search path
            return None
        return next((found for s in self.search_path if (found := self._ids.get(f"{s}.{name}")) is not None), None)

    def names(self, tables: Iterable[str]) -> frozenset[str] | None:
        """Return the names by which reads go for tables that were written; None when one of them is unknown."""
        names: set[str] = set()
        for table in tables:
            schema, _, name = table.rpartition(".")
            oid = self.find(schema or None, name)
            if oid is None:
                return None
            tables_below = (
                found for found in self._below([oid]) if found in self.relations and self.relations[found].kind != "v"
            )
            names.update(self.relations[root].name for root in self._roots(tables_below))
        return frozenset(names)

    def read(self, oids: Iterable[int]) -> frozenset[str] | None:
        """Return the tables that reading these relations reads; None when that depends on more than their rows."""
        found = set(oids)
        seen = self._below(found)
        for oid in seen:
            relation = self.relations.get(oid)
            if relation is None or relation.kind == "f" or relation.is_row_secured:
                return None
            if relation.definition is not None and not self.words.judge(relation.definition).is_steady:
                return None
        bases = (oid for oid in seen if self.relations[oid].kind != "v")
        return frozenset(self.relations[root].name for root in self._roots(bases))

    def written(self, oids: Iterable[int], action: Action, *, cascades: bool = False) -> frozenset[str] | None:
        """Return the tables that an action writes; None when triggers, rules or views of others do it unseen.

        `cascades` is for TRUNCATE … CASCADE: whatever refers to the tables is emptied as well.
        """
        names: set[str] = set()
        seen: set[tuple[int, Action]] = set()
        open_: list[tuple[int, Action]] = [(oid, action) for oid in oids]
        while open_:
            at = open_.pop()
            if at in seen:
                continue
            seen.add(at)
            oid, does = at
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
                if does == "TRUNCATE" and cascades:
                    open_.append((child, "TRUNCATE"))
                elif does == "DELETE" and on_delete in "cnd":
                    open_.append((child, "DELETE" if on_delete == "c" else "UPDATE"))
                elif does == "UPDATE" and on_update in "cnd":
                    open_.append((child, "UPDATE"))
        return frozenset(names)

    def _below(self, oids: Iterable[int]) -> set[int]:
        """Return the relations with everything that the views among them stand on."""
        seen: set[int] = set()
        open_ = list(oids)
        while open_:
            oid = open_.pop()
            if oid not in seen:
                seen.add(oid)
                open_.extend(self.relations[oid].sources if oid in self.relations else ())
        return seen

    def _roots(self, oids: Iterable[int]) -> Iterator[int]:
        """Yield the topmost parents of all relations that have a parent or a child with these in common."""
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


async def load_catalog(database: Pool) -> Catalog:
    """Read the catalogue; raises `DatabaseError` when the database does not answer."""
    async with database.transaction(isolation="repeatable_read", readonly=True) as conn:
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
        Words(
            steady=frozenset(row["name"] for row in functions if not row["is_foreign"] and not row["is_volatile"]),
            foreign=frozenset(row["name"] for row in functions if row["is_foreign"]),
            volatile=frozenset(row["name"] for row in functions if row["is_volatile"]),
            writing=frozenset(row["name"] for row in functions if row["may_write"]),
            keywords=frozenset(keywords),
        ),
        tuple(path),
    )  # fmt: skip
