"""What in a database is ours: the tables, columns and indexes that the models and the revisions declare.

What a pack declares is ours too, and known by which pack it is of.

Everything that compares, drops, copies or replaces objects asks here. A database may hold other programs' tables beside
ours, and even a version table of Alembic's that another program uses: nothing that no revision of ours made is touched.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import asyncpg
from sqlalchemy import Connection, MetaData, Table, text

from models import Base
from utils import packs
from utils.database.placement import OPS, PUBLIC, Placement, placement_of, placement_on
from utils.database.sql import quote_literal
from utils.exceptions import MigrationError

#: Alembic's table in a database of ours.
VERSION_TABLE = "guildbook_version"
#: Alembic's default, which we used until revision 0005, and which any other program may use.
FORMER_VERSION_TABLE = "alembic_version"
#: Recorded in the former table once ours exists: a Guildbook that still reads it refuses an unknown revision.
MOVED = VERSION_TABLE
#: How the comment on that table begins that pauses AUTO_MIGRATE where `ops.migrations` does not exist.
PAUSE_COMMENT = "AUTO_MIGRATE is off: "
#: Progress of `in_batches`; exists only while a migration runs.
BATCHES_TABLE = "guildbook_batches"
VIEWS = ("role_membership",)
SCRIPTS = Path(__file__).resolve().parents[2] / "migrations"

#: A table: the schema as models and revisions spell it (None: the main schema), and the name.
Name = tuple[str | None, str]

# --- what the models and the revisions declare


@dataclass(frozen=True, slots=True)
class Owned:
    """The objects that are ours, by name. A partition belongs to whom its parent belongs."""

    tables: frozenset[Name]
    #: Tables that a revision creates, which must not exist before the first one runs.
    created: frozenset[Name]
    #: Columns that a revision made.
    columns: Mapping[Name, frozenset[str]]
    #: Indexes and constraints that a revision made.
    indexes: frozenset[str]
    #: Views, materialized or not, that a revision made.
    views: frozenset[Name] = frozenset((None, name) for name in VIEWS)

    def qualified(self, placement: Placement) -> list[tuple[str, str]]:
        """Return the schema and the name of every table, given the schemas of this database."""
        return sorted((placement.resolve(schema), name) for schema, name in self.tables)

    def qualified_relations(self, placement: Placement) -> list[tuple[str, str]]:
        """Return the same for every table and view."""
        return sorted((placement.resolve(schema), name) for schema, name in self.tables | self.views)


def owned(scripts: Path = SCRIPTS, metadata: MetaData = Base.metadata) -> Owned:
    """Return what is ours according to the models that are imported and to the files of the revisions.

    That includes what belongs to the active packs, except in `created`.
    """
    own = owned_by(scripts, metadata)
    parts = [own, *(owned_by(pack.scripts, metadata) for pack in packs.active())]
    return Owned(
        frozenset().union(*(part.tables for part in parts)),
        own.created,
        {table: columns for part in parts for table, columns in part.columns.items()},
        frozenset().union(*(part.indexes for part in parts)),
        frozenset().union(*(part.views for part in parts)),
    )


def owned_by(scripts: Path = SCRIPTS, metadata: MetaData = Base.metadata) -> Owned:
    """Return what is Guildbook's own or, given the directory of a pack's revisions, what is that pack's."""
    pack = packs.pack_of_scripts(scripts)
    made = _read_revisions(
        tuple((path, path.stat().st_mtime_ns) for path in sorted((scripts / "versions").glob("*.py")))
    )
    of_packs = tables_of_packs()
    if pack is None:
        declared = {(table.schema, table.name) for table in metadata.tables.values()} - of_packs.keys()
        declared |= {(None, VERSION_TABLE), (None, BATCHES_TABLE)}
        views = made.views | {(None, name) for name in VIEWS}
    else:
        declared = {name for name, owner in of_packs.items() if owner == pack.name} | {(None, pack.version_table)}
        views = made.views
    return Owned(
        frozenset(declared | made.tables.keys()),
        frozenset(made.created),
        {table: frozenset(columns) for table, columns in made.tables.items()},
        frozenset(made.indexes),
        frozenset(views),
    )


def tables_of_packs() -> dict[Name, str]:
    """Return the tables that the imported models of active packs declare, with the pack's name."""
    if not packs.active():
        return {}
    found: dict[Name, str] = {}
    for mapper in list(Base.registry.mappers):
        pack, table = packs.module_owner(mapper.class_.__module__), mapper.local_table
        if pack is not None and isinstance(table, Table):
            found[table.schema, table.name] = pack.name
    return found


def version_table(scripts: Path = SCRIPTS) -> str:
    """Return the table that records which revisions of a directory were applied."""
    pack = packs.pack_of_scripts(scripts)
    return VERSION_TABLE if pack is None else pack.version_table


def own_names(placement: Placement) -> set[str]:
    """Return the names of Guildbook's own tables, and of the schema of some, as the server's messages spell them."""
    tables = owned_by().tables - {(None, BATCHES_TABLE)}
    return {name for schema, name in tables if schema is None} | {
        placement.ops,
        *(f"{placement.resolve(schema)}.{name}" for schema, name in tables),
    }


def owned_tables(scripts: Path = SCRIPTS, metadata: MetaData = Base.metadata) -> frozenset[Name]:
    """Return the tables that are ours, partitions left out; see `Owned`."""
    return owned(scripts, metadata).tables


def tables_at(revisions: Iterable[str], scripts: Path = SCRIPTS) -> frozenset[Name]:
    """Return the tables of a database at some revisions, also those that later revisions drop."""
    files = files_at(revisions, scripts)
    return frozenset(_read_revisions(tuple((path, path.stat().st_mtime_ns) for path in files)).tables)


def files_at(revisions: Iterable[str], scripts: Path) -> list[Path]:
    """Return the files of some revisions and of all that they build on."""
    headers = _headers(tuple((path, path.stat().st_mtime_ns) for path in sorted((scripts / "versions").glob("*.py"))))
    files = {header.get("revision"): path for path, header in headers.items()}
    found: set[Path] = set()
    remaining: list[Any] = list(revisions)
    while remaining:
        path = files.get(remaining.pop())
        if path is not None and path not in found:
            found.add(path)
            remaining += [*_as_tuple(headers[path].get("down_revision")), *_as_tuple(headers[path].get("depends_on"))]
    return sorted(found)


def created_by(revisions: Iterable[Path]) -> frozenset[Name]:
    """Return the tables that the files of some revisions create."""
    return frozenset(_read_revisions(tuple((path, path.stat().st_mtime_ns) for path in revisions)).created)


def relations_of(revisions: Iterable[Path]) -> frozenset[Name]:
    """Return the tables and views that the files of some revisions make and do not drop again."""
    made = _read_revisions(tuple((path, path.stat().st_mtime_ns) for path in revisions))
    return frozenset(made.tables.keys() | made.views)


@dataclass(slots=True)
class _Made:
    """What the revisions read so far have made and not dropped again."""

    tables: dict[Name, set[str]] = field(default_factory=dict)
    created: set[Name] = field(default_factory=set)
    indexes: set[str] = field(default_factory=set)
    views: set[Name] = field(default_factory=set)


_NAME = r'(?:IF\s+NOT\s+EXISTS\s+)?"?(?:(?P<schema>\w+)"?\."?)?(?P<name>\w+)"?'
_CREATE_TABLE_SQL = re.compile(rf"\bCREATE\s+(?:UNLOGGED\s+)?TABLE\s+{_NAME}", re.IGNORECASE)
_ADD_COLUMN_SQL = re.compile(
    rf"\bALTER\s+TABLE\s+(?:ONLY\s+)?{_NAME}\s+ADD\s+(?:COLUMN\s+)?(?:IF\s+NOT\s+EXISTS\s+)?\"?(?P<column>\w+)",
    re.IGNORECASE,
)
_CREATE_INDEX_SQL = re.compile(rf"\bCREATE\s+(?:UNIQUE\s+)?INDEX\s+(?:CONCURRENTLY\s+)?{_NAME}", re.IGNORECASE)
_CREATE_VIEW_SQL = re.compile(
    rf"\bCREATE\s+(?:OR\s+REPLACE\s+)?(?:MATERIALIZED\s+|RECURSIVE\s+)?VIEW\s+{_NAME}", re.IGNORECASE
)
_WORD = re.compile(r"\w+")


@lru_cache(maxsize=64)
def _headers(files: tuple[tuple[Path, int], ...]) -> Mapping[Path, dict[str, Any]]:
    """Return what revisions say of themselves. `files`: with the time of their last change."""
    return {path: _header(_parse(path)) for path, _ in files}


@lru_cache(maxsize=64)
def _read_revisions(files: tuple[tuple[Path, int], ...]) -> _Made:
    """Read the revisions' source, oldest first. What has a name only at run time is not found, and so is not ours."""
    made = _Made()
    for tree in _in_order([_parse(path) for path, _ in files]):
        _Reader(tree).add_to(made)
    return made


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), str(path))
    except SyntaxError as exc:
        line = "" if exc.lineno is None else f"line {exc.lineno}: "
        raise MigrationError(f"revision {path} does not parse: {line}{exc.msg}; correct or remove that file") from exc
    except (OSError, ValueError) as exc:
        raise MigrationError(f"revision {path} cannot be read: {exc}; correct or remove that file") from exc


def _in_order(trees: Sequence[ast.Module]) -> Iterator[ast.Module]:
    """Yield the revisions so that each comes after those that it revises."""
    headers = [(_header(tree), tree) for tree in trees]
    remaining = {header.get("revision"): (header.get("down_revision"), tree) for header, tree in headers}
    while remaining:
        ready = [revision for revision, (down, _) in remaining.items() if not set(_as_tuple(down)) & remaining.keys()]
        for revision in ready or list(remaining):  # a circle is for Alembic to complain about
            yield remaining.pop(revision)[1]


def _header(tree: ast.Module) -> dict[str, Any]:
    """Return the constants that a revision assigns, by name."""
    found: dict[str, Any] = {}
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and value is not None:
            with contextlib.suppress(ValueError):
                found[target.id] = ast.literal_eval(value)
    return found


def _as_tuple(value: Any) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


class _Reader:
    """Reads what one revision makes and drops, from everything in it but `downgrade`."""

    def __init__(self, tree: ast.Module) -> None:
        body = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name == "downgrade")]
        self._nodes = [node for statement in body for node in ast.walk(statement)]
        self._calls = [node for node in self._nodes if isinstance(node, ast.Call)]
        #: The values of constants and of loop variables.
        self._values: dict[str, tuple[Any, ...]] = {
            name: _as_tuple(value) for name, value in _header(tree).items() if isinstance(value, str | tuple | list)
        }
        for node in self._nodes:
            if isinstance(node, ast.For | ast.comprehension) and isinstance(node.target, ast.Name):
                values = self._evaluate(node.iter)
                self._values[node.target.id] = (*self._values.get(node.target.id, ()), *values)
        #: Columns that helpers return, for every table of the revision.
        self._shared = {
            column
            for node in self._nodes
            if isinstance(node, ast.Return) and node.value is not None
            for column in self._columns(node.value)
        }

    def add_to(self, made: _Made) -> None:
        for call in self._calls:
            self._drop(made, call)
        for call in self._calls:
            self._create(made, call)
        for node in self._nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                _read_sql(made, node.value)

    def _drop(self, made: _Made, call: ast.Call) -> None:
        schema, function = self._keyword(call, "schema"), _function(call)
        for name in self._strings(call, 0):
            if function == "drop_table":
                made.tables.pop((schema, name), None)
                made.created.discard((schema, name))
            elif function == "drop_column":
                made.tables.get((schema, name), set()).difference_update(self._strings(call, 1))
            elif function in ("drop_index", "drop_constraint"):
                made.indexes.discard(name)
            elif function == "rename_table":
                for new in self._strings(call, 1):
                    made.tables[schema, new] = made.tables.pop((schema, name), set())
                    made.created.discard((schema, name))
                    made.created.add((schema, new))

    def _create(self, made: _Made, call: ast.Call) -> None:
        schema, function = self._keyword(call, "schema"), _function(call)
        for name in self._strings(call, 0):
            if function == "create_table":
                made.tables.setdefault((schema, name), set()).update(self._columns(call), self._shared)
                if self._keyword(call, "if_not_exists") is None:
                    made.created.add((schema, name))
            elif function == "add_column":
                made.tables.setdefault((schema, name), set()).update(self._columns(call))
            elif function == "alter_column" and (new := self._keyword(call, "new_column_name")):
                made.tables.setdefault((schema, name), set()).add(new)
            elif function in ("f", "Index") or function.startswith("create_"):
                made.indexes.add(name)
        if constraint := self._keyword(call, "name"):
            made.indexes.add(constraint)

    def _columns(self, node: ast.AST) -> set[str]:
        calls = (inner for inner in ast.walk(node) if isinstance(inner, ast.Call) and _function(inner) == "Column")
        return {name for call in calls for name in self._strings(call, 0)}

    def _strings(self, call: ast.Call, position: int) -> tuple[str, ...]:
        return self._evaluate(call.args[position]) if len(call.args) > position else ()

    def _keyword(self, call: ast.Call, name: str) -> str | None:
        for keyword in call.keywords:
            if keyword.arg != name:
                continue
            if isinstance(keyword.value, ast.Constant):
                return str(keyword.value.value) if keyword.value.value not in (None, False) else None
            return next(iter(self._evaluate(keyword.value)), None)
        return None

    def _evaluate(self, node: ast.AST) -> tuple[str, ...]:
        """Return the strings that an expression may stand for; none if only running it would tell."""
        match node:
            case ast.Constant(value=str(value)):
                return (value,)
            case ast.Name(id=name):
                return tuple(value for value in self._values.get(name, ()) if isinstance(value, str))
            case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items):
                return tuple(value for item in items for value in self._evaluate(item))
            case ast.Call(args=[first, *_]) if _function(node) == "f":
                return self._evaluate(first)
            case _:
                return ()


def _read_sql(made: _Made, sql: str) -> None:
    for match in _CREATE_TABLE_SQL.finditer(sql):
        made.tables.setdefault((match["schema"], match["name"]), set()).update(_WORD.findall(sql))
    for match in _ADD_COLUMN_SQL.finditer(sql):
        made.tables.setdefault((match["schema"], match["name"]), set()).add(match["column"])
    made.indexes.update(match["name"] for match in _CREATE_INDEX_SQL.finditer(sql))
    made.views.update((match["schema"], match["name"]) for match in _CREATE_VIEW_SQL.finditer(sql))


def _function(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


# --- what a database records


@dataclass(frozen=True, slots=True)
class RecordedVersion:
    """What a database says about its schema, read without changing anything."""

    #: The revisions recorded as current; several for unmerged branches, none for a database without our schema.
    revisions: tuple[str, ...] = ()
    #: The table that says so, in SQL and with its schema; None: there is none of ours.
    table: str | None = None
    #: Whether that is the former table, which the next migration replaces by `VERSION_TABLE`.
    is_former: bool = False
    #: A comment on that table.
    comment: str | None = None
    #: The schema that it is in or, without one, in which a migration creates tables.
    schema: str = PUBLIC
    #: Which of the tables that every revision of ours has are missing there.
    missing: tuple[str, ...] = ()
    #: Whether any of them exists.
    has_tables: bool = False
    #: Whether the table says so with revisions that one of `revisions` replaces.
    is_replaced: bool = False

    @property
    def revision(self) -> str | None:
        """The recorded revisions, separated by commas; None if there are none."""
        return ", ".join(self.revisions) or None

    @property
    def is_complete(self) -> bool:
        """Whether every table exists that every revision has."""
        return not self.missing


#: Tables since revision 0001, each with a column that another program's table of that name does not have.
MARKERS = {
    "guilds": "stamp",
    "users": "stamp",
    "members": "stamp",
    "roles": "stamp",
    "channels": "stamp",
    "ops.leases": "epoch",
}
_FIND = """
WITH candidate AS (
    SELECT n.nspname::text AS schema, c.relname::text AS name,
        quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS qualified,
        obj_description(c.oid, 'pg_class') AS comment
    FROM pg_namespace AS n LEFT JOIN pg_class AS c
        ON c.relnamespace = n.oid AND c.relkind IN ('r', 'p')
        AND c.relname IN ('guildbook_version', 'alembic_version')
        AND EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attname = 'version_num')
    WHERE n.nspname = CAST($1 AS text)
)
SELECT candidate.*, ARRAY(
    SELECT marker.name FROM (
        VALUES ('guilds', format('%I.guilds', schema), 'stamp'), ('users', format('%I.users', schema), 'stamp'),
            ('members', format('%I.members', schema), 'stamp'), ('roles', format('%I.roles', schema), 'stamp'),
            ('channels', format('%I.channels', schema), 'stamp'),
            ('ops' || '.leases', to_regclass('ops.leases')::text, 'epoch')
    ) AS marker (name, qualified, attribute)
    WHERE NOT EXISTS (
        SELECT FROM pg_attribute AS a
        WHERE a.attrelid = to_regclass(marker.qualified) AND a.attname = marker.attribute AND NOT a.attisdropped
    )
) AS missing
FROM candidate ORDER BY candidate.name = 'guildbook_version' DESC NULLS LAST
"""


#: A table of that name without this column is another program's.
_TABLE = """
SELECT a.attrelid::regclass::text FROM pg_attribute AS a
WHERE a.attrelid = to_regclass(format('%I.%I', CAST(:main AS text), CAST(:name AS text)))
    AND a.attname = 'version_num'
"""


def read_version(connection: Connection, scripts: Path = SCRIPTS) -> RecordedVersion:
    """Return what the database of a SQLAlchemy connection says about its schema, or about that of a pack."""
    main = placement_of(connection).main
    pack = packs.pack_of_scripts(scripts)
    if pack is not None:
        parameters = {"main": main, "name": pack.version_table}
        table = connection.scalar(text(_TABLE), parameters)
        if table is None:
            return RecordedVersion(schema=main)
        recorded = tuple(value for (value,) in connection.exec_driver_sql(select_revisions(table)))
        revisions = without_replaced(recorded, scripts)
        is_replaced = revisions != recorded
        return RecordedVersion(revisions, table, schema=main, has_tables=bool(revisions), is_replaced=is_replaced)
    rows = [dict(row) for row in connection.execute(text(_FIND.replace("$1", ":main")), {"main": main}).mappings()]
    contents = {
        row["qualified"]: [value for (value,) in connection.exec_driver_sql(select_revisions(row["qualified"]))]
        for row in rows
        if row["name"]
    }
    return _interpret(main, rows, contents, scripts)


async def fetch_version(
    connection: asyncpg.Connection[Any] | Any, placement: Placement | None = None
) -> RecordedVersion:
    """Return what the database of an asyncpg connection of ours, or of a `Pool`, says about its schema.

    placement: where our tables are; None: the connection knows.
    """
    if placement is None:
        placement = placement_on(connection)
    main = placement.main
    rows = await connection.fetch(_FIND, main)
    contents = {
        row["qualified"]: [value for (value,) in await connection.fetch(select_revisions(row["qualified"]))]
        for row in rows
        if row["name"]
    }
    return _interpret(main, rows, contents)


def select_revisions(table: str) -> str:
    """Return the query for the revisions in a version table, given its name in SQL."""
    return " ".join(("SELECT DISTINCT version_num FROM", table, "WHERE version_num <> '' ORDER BY 1"))


def without_replaced(revisions: Sequence[str], scripts: Path = SCRIPTS) -> tuple[str, ...]:
    """Return recorded revisions with those that replace them: revisions that say `replaces = (…)` of older ones.

    A revision that was made from several stands for what a database records that had all of them.
    """
    files = tuple((path, path.stat().st_mtime_ns) for path in sorted((scripts / "versions").glob("*.py")))
    found = set(revisions)
    for header in _headers(files).values():
        replaced = set(_as_tuple(header.get("replaces")))
        if replaced and replaced <= found:
            found = (found - replaced) | {header["revision"]}
    return tuple(sorted(found)) if found != set(revisions) else tuple(revisions)


def _interpret(
    main: str, rows: Sequence[Mapping[str, Any]], contents: Mapping[str, Sequence[str]], scripts: Path = SCRIPTS
) -> RecordedVersion:
    """Choose the table that is ours: `VERSION_TABLE`, or the former one if marker tables of ours are beside it."""
    empty: RecordedVersion | None = None
    for row in rows:
        if row["name"] is None:
            continue
        is_former, recorded = row["name"] == FORMER_VERSION_TABLE, contents[row["qualified"]]
        stated = tuple(value for value in recorded if not (is_former and value == MOVED))
        revisions = without_replaced(stated, scripts)
        found = RecordedVersion(
            revisions,
            row["qualified"],
            is_former,
            row["comment"],
            **_describe_tables(row),
            is_replaced=revisions != stated,
        )
        if revisions and (found.has_tables or not is_former):
            return found
        is_paused = not recorded and (row["comment"] or "").startswith(PAUSE_COMMENT)
        if empty is None and (not is_former or is_paused):
            empty = found
    if empty is not None:
        return empty
    return RecordedVersion(**_describe_tables(rows[0])) if rows else RecordedVersion(schema=main)


def _describe_tables(row: Mapping[str, Any]) -> dict[str, Any]:
    missing = tuple(row["missing"])
    # `ops` alone proves nothing about what is beside another program's version table.
    has_tables = any(name not in missing for name in MARKERS if not name.startswith(f"{OPS}."))
    return {"schema": row["schema"], "missing": missing, "has_tables": has_tables}


def adoption_statements(version: RecordedVersion) -> list[str]:
    """Return the SQL that replaces the former version table, of which `version` was read, by ours.

    The former table stays, with a revision that no Guildbook knows: one that still reads it then refuses to act.
    """
    assert version.is_former, "only the former table is replaced"
    assert version.table is not None, "it was read from a table"
    former, ours = version.table, version.table.removesuffix(FORMER_VERSION_TABLE) + VERSION_TABLE
    statements = [
        " ".join(
            (
                *("CREATE TABLE IF NOT EXISTS", ours, "(version_num varchar(32) NOT NULL, CONSTRAINT"),
                *(f"{VERSION_TABLE}_pkc", "PRIMARY KEY (version_num))"),
            )
        ),
        *(
            " ".join(("INSERT INTO", ours, "(version_num) VALUES (", quote_literal(one), ")"))
            for one in version.revisions
        ),
    ]
    if version.comment and version.comment.startswith(PAUSE_COMMENT):
        statements.append(f"COMMENT ON TABLE {ours} IS {quote_literal(version.comment)}")
        statements.append(f"COMMENT ON TABLE {former} IS NULL")
    return [
        *statements,
        " ".join(("DELETE FROM", former)),
        " ".join(("INSERT INTO", former, "(version_num) VALUES (", quote_literal(MOVED), ")")),
    ]


def find_collisions(connection: Connection, created: Iterable[Name]) -> list[str]:
    """Return the tables that another program has where the first revisions would create ours, in SQL."""
    placement = placement_of(connection)
    names = [(placement.resolve(schema), name) for schema, name in created]
    rows = connection.execute(
        text(
            "SELECT wanted.schema, wanted.name FROM unnest(CAST(:schemas AS text[]), CAST(:names AS text[]))"
            " AS wanted (schema, name) JOIN pg_class AS c ON c.relname = wanted.name"
            " JOIN pg_namespace AS n ON n.oid = c.relnamespace AND n.nspname = wanted.schema"
            " WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') ORDER BY 1, 2"
        ),
        {"schemas": [schema for schema, _ in names], "names": [name for _, name in names]},
    )
    return [f"{row.schema}.{row.name}" for row in rows]
