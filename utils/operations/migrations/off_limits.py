"""Keeps revisions that run in scratch schemas from reaching the live tables, by names that have a schema in the text.

What a revision makes is found through the `search_path`, which leads to the scratch schemas. A statement that names the
schema of the live tables would change these instead, before anybody knows whether the backup is good.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from sqlalchemy import Connection, event, text

from utils.exceptions import MigrationError

_COMMENT = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)
#: An extension that exists stays where it is.
_EXTENSION = re.compile(r"\s*CREATE\s+EXTENSION\s+IF\s+NOT\s+EXISTS\b", re.IGNORECASE)
_NAME = r'(?:"(?:[^"]|"")+"|[\w$]+)'
#: Objects of extensions, which are where the extension is, whoever uses them.
_OF_EXTENSION = """
SELECT EXISTS (
    SELECT FROM (
        SELECT 'pg_type'::regclass AS class, oid, typname AS name, typnamespace AS schema FROM pg_type
        UNION ALL SELECT 'pg_proc'::regclass, oid, proname, pronamespace FROM pg_proc
        UNION ALL SELECT 'pg_class'::regclass, oid, relname, relnamespace FROM pg_class
        UNION ALL SELECT 'pg_opclass'::regclass, oid, opcname, opcnamespace FROM pg_opclass
        UNION ALL SELECT 'pg_collation'::regclass, oid, collname, collnamespace FROM pg_collation
        UNION ALL SELECT 'pg_ts_config'::regclass, oid, cfgname, cfgnamespace FROM pg_ts_config
        UNION ALL SELECT 'pg_ts_dict'::regclass, oid, dictname, dictnamespace FROM pg_ts_dict
    ) AS found JOIN pg_namespace AS n ON n.oid = found.schema
        JOIN pg_depend AS d ON d.classid = found.class AND d.objid = found.oid AND d.deptype = 'e'
    WHERE n.nspname = :schema AND found.name = :name
)
"""
#: Characters of a statement in an error message.
_SHOWN = 100


def refuse_statements(connection: Connection, schemas: Sequence[str]) -> None:
    """Let a connection raise `MigrationError` for each statement that names one of these schemas.

    Types, functions and the like of extensions may be named.
    """
    patterns = {schema: _pattern(schema) for schema in schemas}
    event.listen(connection, "before_cursor_execute", partial(_check, patterns))


def _pattern(schema: str) -> re.Pattern[str]:
    quoted = '"' + re.escape(schema.replace('"', '""')) + '"'
    names = [quoted]
    if re.fullmatch(r"[a-z_][a-z0-9_$]*", schema):  # any other name must be quoted
        names.append(rf"(?<![\w$]){schema}(?![\w$])")
    name = f"(?:{'|'.join(names)})"
    return re.compile(
        rf"(?<![\w$\"]\.){name}\s*\.\s*(?P<name>{_NAME}|OPERATOR\b)|\bSCHEMA\s+{name}|\bsearch_path\b[^;]*?{name}",
        re.IGNORECASE,
    )


def _check(
    patterns: dict[str, re.Pattern[str]],
    connection: Connection,
    cursor: Any,
    statement: str,
    parameters: Any,
    context: Any,
    executemany: bool,
) -> None:
    sql = _COMMENT.sub(" ", statement)
    if _EXTENSION.match(sql):
        return
    for schema, pattern in patterns.items():
        for match in pattern.finditer(sql):
            if match["name"] is None or not _is_of_extension(connection, schema, match["name"]):
                shown = " ".join(statement.split())
                raise MigrationError(
                    f"a revision names the schema {schema} ({shown[:_SHOWN]}{'…' if len(shown) > _SHOWN else ''}), and"
                    " would change the live tables while it migrates those of a backup: write names without it in the"
                    " revision, or restore with --whole-database. Nothing was changed"
                )


def _is_of_extension(connection: Connection, schema: str, name: str) -> bool:
    plain = name[1:-1].replace('""', '"') if name.startswith('"') else name.lower()
    return bool(connection.scalar(text(_OF_EXTENSION), {"schema": schema, "name": plain}))
