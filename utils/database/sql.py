"""Pieces of SQL text: identifiers, column types, array literals, and statements kept in `.sql` files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sqlalchemy import Column
from sqlalchemy.dialects.postgresql import asyncpg

#: The generic dialect would double each % in an identifier, for drivers that take it for a placeholder.
_DIALECT = asyncpg.dialect()  # type: ignore[no-untyped-call]
_HEADER = re.compile(r"^-- name: (\w+)\n((?:--.*\n)*)", re.MULTILINE)


def quote_identifier(name: str) -> str:
    """Return an identifier as SQL, quoted where PostgreSQL needs it."""
    return _DIALECT.identifier_preparer.quote(name)


def quote_literal(value: str) -> str:
    """Return a string as an SQL literal, for statements that take no parameters."""
    text = value.replace("'", "''")
    return f"E'{text.replace(chr(92), chr(92) * 2)}'" if "\\" in text else f"'{text}'"


def sql_type(column: Column[Any]) -> str:
    """Return a column's type as SQL, such as `bigint` or `text[]`."""
    return column.type.compile(_DIALECT)


def array_literal(values: Iterable[Any]) -> str:
    """Return a one-dimensional array in PostgreSQL's text format (PostgreSQL manual, 8.15.2)."""
    return "{" + ",".join([str(value) if type(value) is int else _array_element(value) for value in values]) + "}"


def _array_element(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return str(value)


def load_statements(path: Path) -> dict[str, str]:
    """Return the statements of a `.sql` file by name.

    A line `-- name: <name>` begins a statement. The comment lines that follow it document the statement and are not
    sent to the server. Raises `ValueError` for a name that is used twice.
    """
    _, *parts = _HEADER.split(path.read_text(encoding="utf-8"))
    names, bodies = parts[::3], parts[2::3]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path.name} names a statement twice: {', '.join(sorted(repeated))}")
    return {name: body.strip().removesuffix(";") for name, body in zip(names, bodies, strict=True)}
