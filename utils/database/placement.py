"""Which schemas of a database hold our tables, and connections that find them there.

In all SQL the mirror's and the cogs' tables are written without a schema, and the bot's own as `ops.name`. The former
are found through `search_path`. Where the schema of the latter has another name than `ops`, the connection replaces it
in the text of each statement. So a database can hold several Guildbooks, each in a pair of schemas of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, cast

import asyncpg
from sqlalchemy import Connection as SyncConnection

from utils.database.sql import quote_identifier
from utils.exceptions import DatabaseError

if TYPE_CHECKING:
    Base = asyncpg.Connection[asyncpg.Record]
else:
    Base = asyncpg.Connection

#: The schema of the main tables unless something else is decided, and that of the bot's own, as all SQL spells it.
PUBLIC, OPS = "public", "ops"
_SUFFIX = "_ops"
#: PostgreSQL's limit for a name, in bytes (manual, 4.1.1).
_NAME_BYTES = 63
#: Characters that SQLAlchemy does not read back from the catalog.
_REFUSED = frozenset("\"'\\%:")


@dataclass(frozen=True, slots=True)
class Placement:
    """The schemas of one Guildbook."""

    #: The mirror's tables, those of cogs, and the version table.
    main: str = PUBLIC
    #: The bot's own tables.
    ops: str = OPS

    @classmethod
    def of(cls, main: str) -> Placement:
        """Return where a new Guildbook in the schema `main` has its tables."""
        return cls(main, OPS if main == PUBLIC else main + _SUFFIX)

    def adapt(self, sql: str) -> str:
        """Return SQL with the name of this database's schema for every `ops`.

        Literals, comments and quoted names stay as they are, except literals that name a relation for `to_regclass`,
        `nextval` and their like.
        """
        return sql if self.ops == OPS else _adapt(sql, self.ops)

    def resolve(self, schema: str | None) -> str:
        """Return the schema of this database for one as SQL spells it; None: the main one."""
        return self.main if schema is None else self.ops if schema == OPS else schema

    def spell(self, schema: str) -> str | None:
        """Return a schema of this database as SQL spells it; None: the main one. The reverse of `resolve`."""
        return None if schema == self.main else OPS if schema == self.ops else schema

    def shown(self, schema: str, name: str) -> str:
        """Return a relation's name as SQL spells it: without the main schema, and with `ops` for the other."""
        spelled = self.spell(schema)
        return name if spelled is None else f"{spelled}.{name}"

    def schemas(self) -> list[str]:
        """Return the names of both schemas."""
        return [self.main, self.ops]

    def lock_key(self, key: int) -> int:
        """Return the advisory lock of this Guildbook for one that all would share."""
        if self.main == PUBLIC:
            return key
        digest = hashlib.sha256(self.main.encode()).digest()
        return (key ^ int.from_bytes(digest[:8])) - 2**63

    def channel(self, name: str) -> str:
        """Return the notification channel of this Guildbook for one that all would share."""
        if self.main == PUBLIC:
            return name
        return f"{name}_{hashlib.sha256(self.main.encode()).hexdigest()[:16]}"


DEFAULT_PLACEMENT = Placement()


def check_schema(name: str) -> str | None:
    """Return what is wrong with the name of a main schema; None: nothing."""
    if not name:
        return "must not be empty"
    if refused := sorted(set(name) & _REFUSED) or [character for character in name if not character.isprintable()]:
        return f"must not contain {refused[0]!r}"
    if len(name.encode()) > _NAME_BYTES - len(_SUFFIX):
        return f"must not be longer than {_NAME_BYTES - len(_SUFFIX)} bytes"
    if name.lower().startswith("pg_") or name.lower() == "information_schema":
        return "must not be one of PostgreSQL's own (pg_*, information_schema)"
    if name == OPS:
        return "must not be ops, which is the schema of the bot's own tables beside public"
    return None


# --- finding it

#: Each schema that may be the main one, and the schema of the sequence behind the ids of its `changes`. Tables that the
#: user may not read are another user's Guildbook.
_FIND = """
SELECT candidate.name, current_schema()::text AS current, current_setting('search_path') AS path,
    coalesce(has_table_privilege(
        to_regclass(format('%I.guildbook_version', candidate.name))::oid, 'SELECT'
    ), false) AS is_ours,
    coalesce(has_table_privilege(
        to_regclass(format('%I.alembic_version', candidate.name))::oid, 'SELECT'
    ), false) AND EXISTS (
        SELECT FROM pg_attribute AS a
        WHERE a.attrelid = to_regclass(format('%I.guilds', candidate.name)) AND a.attname = 'stamp'
    ) AS is_former,
    (
        SELECT n.nspname::text FROM pg_attrdef AS d
            JOIN pg_depend AS p ON p.classid = 'pg_attrdef'::regclass AND p.objid = d.oid
            JOIN pg_class AS s ON p.refclassid = 'pg_class'::regclass AND s.oid = p.refobjid AND s.relkind = 'S'
            JOIN pg_namespace AS n ON n.oid = s.relnamespace
        WHERE d.adrelid = to_regclass(format('%I.changes', candidate.name)) AND s.relname = 'change_ids' LIMIT 1
    ) AS ops
FROM unnest(CASE WHEN $1::text IS NULL THEN current_schemas(false)::text[] ELSE ARRAY[$1::text] END)
    WITH ORDINALITY AS candidate (name, position)
ORDER BY candidate.position
"""


@dataclass(frozen=True, slots=True)
class Found:
    """A placement, and what a session's `search_path` has to do with it."""

    placement: Placement
    #: Whether an unqualified name leads to the main schema without our doing.
    is_current: bool
    #: The `search_path` of a new session.
    path: str


async def find_placement(connection: Any, schema: str | None = None) -> Found:
    """Find out where our tables are or, in a database without them, where a migration creates them.

    It is `schema` if one is given; otherwise the schema on the `search_path` of this asyncpg connection that has our
    version table, or the one in which new tables are created. Raises `DatabaseError` if there is none, or if its name
    is one that cannot be used.
    """
    async with connection.transaction(readonly=True):  # a pooler keeps its backend for the whole of it
        rows: Sequence[asyncpg.Record] = await connection.fetch(_FIND, schema)
        if not rows:
            user, path = await connection.fetchrow("SELECT current_user, current_setting('search_path')")
            raise DatabaseError(
                f"the search_path of the user {user} ({path}) leads to no schema that exists and that the user may use:"
                " make one with that user as its owner, or set DB_SCHEMA"
            )
    found = next(
        (row for mark in ("is_ours", "is_former") for row in rows if row[mark]),
        next((row for row in rows if row["name"] == row["current"]), rows[0]),
    )
    main: str = found["name"]
    if problem := check_schema(main):
        raise DatabaseError(
            f"the search_path of this user leads to the schema {main!r}, and the name of Guildbook's schema {problem}:"
            " set DB_SCHEMA to another name"
        )
    placement = Placement(main, found["ops"]) if found["ops"] else Placement.of(main)
    return Found(placement, main == found["current"], found["path"])


# --- connections

#: The key in the `info` of a SQLAlchemy connection.
_INFO = "guildbook_placement"


def with_placement(connection: SyncConnection, placement: Placement) -> SyncConnection:
    """Note on a SQLAlchemy connection where our tables are, and return it."""
    connection.info[_INFO] = placement
    return connection


def placement_of(connection: SyncConnection) -> Placement:
    """Return where our tables are, according to a SQLAlchemy connection."""
    placement: Placement = connection.info.get(_INFO) or Placement()
    return placement


@lru_cache(maxsize=64)
def connection_class(placement: Placement, local_path: str | None = None) -> type[Base]:
    """Return a class of connections that adapt statements to a placement.

    local_path: the `search_path` to set in each transaction, where a session cannot have one of its own; a single
        statement gets a transaction for it.
    """
    if local_path is None and placement == DEFAULT_PLACEMENT:
        return _PlainConnection
    return cast(
        type[Base],
        type("PlacedConnection", (_PlacedConnection,), {"placement": placement, "local_path": local_path}),
    )


class _PlacedConnection(Base):
    """A connection that adapts the text of each statement to `placement`."""

    placement: ClassVar[Placement] = Placement()
    local_path: ClassVar[str | None] = None

    async def execute(self, query: str, *args: Any, **kwargs: Any) -> str:
        query = self.placement.adapt(query)
        if self.local_path is not None and (begun := _BEGIN.match(query)) is not None and not args:
            query = f"{begun[0]}; SET LOCAL search_path TO {self.local_path};"
            return await super().execute(query, **kwargs)
        async with self._in_schema(query):
            return await super().execute(query, *args, **kwargs)

    async def executemany(self, command: str, args: Any, **kwargs: Any) -> Any:
        async with self._in_schema(command):
            return await super().executemany(self.placement.adapt(command), args, **kwargs)

    async def fetch(self, query: str, *args: Any, **kwargs: Any) -> Any:
        async with self._in_schema(query):
            return await super().fetch(self.placement.adapt(query), *args, **kwargs)

    async def fetchrow(self, query: str, *args: Any, **kwargs: Any) -> Any:
        async with self._in_schema(query):
            return await super().fetchrow(self.placement.adapt(query), *args, **kwargs)

    async def fetchval(self, query: str, *args: Any, **kwargs: Any) -> Any:
        async with self._in_schema(query):
            return await super().fetchval(self.placement.adapt(query), *args, **kwargs)

    async def fetchmany(self, query: str, args: Any, **kwargs: Any) -> Any:
        async with self._in_schema(query):
            return await super().fetchmany(self.placement.adapt(query), args, **kwargs)

    async def prepare(self, query: str, **kwargs: Any) -> Any:
        return await super().prepare(self.placement.adapt(query), **kwargs)

    def cursor(self, query: str, *args: Any, **kwargs: Any) -> Any:
        return super().cursor(self.placement.adapt(query), *args, **kwargs)

    async def copy_from_query(self, query: str, *args: Any, **kwargs: Any) -> Any:
        async with self._in_schema(query):
            return await super().copy_from_query(self.placement.adapt(query), *args, **kwargs)

    async def copy_from_table(self, table_name: str, *, schema_name: str | None = None, **kwargs: Any) -> Any:
        async with self._in_schema("COPY"):
            return await super().copy_from_table(table_name, schema_name=self._schema(schema_name), **kwargs)

    async def copy_to_table(self, table_name: str, *, schema_name: str | None = None, **kwargs: Any) -> Any:
        async with self._in_schema("COPY"):
            return await super().copy_to_table(table_name, schema_name=self._schema(schema_name), **kwargs)

    async def copy_records_to_table(self, table_name: str, *, schema_name: str | None = None, **kwargs: Any) -> Any:
        async with self._in_schema("COPY"):
            return await super().copy_records_to_table(table_name, schema_name=self._schema(schema_name), **kwargs)

    def _schema(self, name: str | None) -> str | None:
        return self.placement.ops if name == OPS else name

    def _in_schema(self, query: str) -> AbstractAsyncContextManager[Any]:
        """Return a transaction if the statement needs one for its `search_path`."""
        if self.local_path is None or self.is_in_transaction() or _NEEDS_NO_PATH.match(query) is not None:
            return contextlib.nullcontext()
        return self.transaction()


_BEGIN = re.compile(r"\s*BEGIN\b[^;]*(?=;?\s*\Z)", re.IGNORECASE)
#: Statements without names of relations or that cannot run in a transaction, and the one that resets a session.
_NEEDS_NO_PATH = re.compile(
    r"\s*(?:BEGIN|START|COMMIT|END|ROLLBACK|ABORT|SAVEPOINT|RELEASE|SET|RESET|SHOW|DISCARD|LISTEN|UNLISTEN|DEALLOCATE"
    r"|VACUUM|REINDEX|(?:CREATE|DROP|ALTER)\s+(?:DATABASE|TABLESPACE|SYSTEM)|(?:CREATE|DROP)\s+(?:UNIQUE\s+)?INDEX"
    r"\s+CONCURRENTLY|SELECT\s+pg_advisory_unlock_all\(\)|;)",
    re.IGNORECASE,
)


class _PlainConnection(Base):
    """A connection whose statements need not be adapted, because our tables are where all SQL says."""

    placement: ClassVar[Placement] = DEFAULT_PLACEMENT


def placement_on(connection: Any) -> Placement:
    """Return where our tables are, according to an asyncpg connection of ours or to a `Pool`.

    Raises `DatabaseError` for a connection that was not opened with `ConnectTarget.connect_kwargs`, and does not know.
    """
    placement: Placement | None = getattr(connection, "placement", None)
    if placement is None:
        raise DatabaseError(
            "this connection does not say where Guildbook's tables are: open it with a ConnectTarget's connect_kwargs()"
        )
    return placement


# --- adapting SQL

_TOKEN = re.compile(
    r"""
    (?<!\w)e'(?:[^'\\]|\\.|'')*'          # what is kept: literals with escapes,
    | "(?:[^"]|"")*"                      # quoted names,
    | --[^\n]* | /\*.*?\*/                # and comments
    | (?P<literal>'(?:[^']|'')*')
    | (?<![\w$])\$(?P<tag>(?:[^\W\d]\w*)?)\$(?P<body>.*?)\$(?P=tag)\$
    | (?<![\w.$])ops(?=\s*\.\s*["*\w])
    | (?P<clause>(?<![\w.$])schema\s+(?:if\s+(?:not\s+)?exists\s+)?)ops(?![\w$])(?!\s*\.)
    """,
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)
#: Where a literal is the name of a relation or a schema: behind these functions, and before a cast.
_NAME_FUNCTION = re.compile(
    r"\b(?:to_reg(?:class|namespace)|(?:next|curr|set)val|has_(?:table|any_column|column|sequence|schema)_privilege"
    r"|regclass|regnamespace|cast)\s*\(\s*\Z",
    re.IGNORECASE,
)
_NAME_CAST = re.compile(r"\s*(?:::\s*text\s*)?(?:::|\bas\b)\s*(?:pg_catalog\.)?reg(?:class|namespace)\b", re.IGNORECASE)
#: What comes before a body that is code.
_CODE = re.compile(
    r"(?:\A|;|\n)\s*(?:do\b|create\s+(?:or\s+replace\s+)?(?:function|procedure)\b)[^;$]*\Z", re.IGNORECASE
)
#: Characters that are looked at before a literal.
_BEFORE = 60


@lru_cache(maxsize=2_048)
def _adapt(sql: str, ops: str) -> str:
    name = quote_identifier(ops)

    def replace(match: re.Match[str]) -> str:
        found = match[0]
        if (literal := match["literal"]) is not None:
            if not literal[1:].lower().startswith((f"{OPS}.", f"{OPS}'")):
                return found
            before, is_cast = sql[max(0, match.start() - _BEFORE) : match.start()], _NAME_CAST.match(sql, match.end())
            called = _NAME_FUNCTION.search(before)
            if not is_cast and (called is None or called[0].lower().startswith("cast")):
                return found
            return "'" + name.replace("'", "''") + literal[1 + len(OPS) :]
        if match["body"] is not None:
            delimiter, is_code = f"${match['tag']}$", _CODE.search(sql[: match.start()]) is not None
            return f"{delimiter}{_adapt(match['body'], ops)}{delimiter}" if is_code else found
        if (clause := match["clause"]) is not None:
            return clause + name
        return name if found.lower() == OPS else found

    return _TOKEN.sub(replace, sql)
