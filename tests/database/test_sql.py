"""Pieces of SQL text: array literals, identifiers, column types, and statements from `.sql` files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import mirrored_tables
from utils.database import Pool
from utils.database.sql import array_literal, load_statements, quote_identifier, sql_type

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(values=st.lists(st.none() | TEXT))
async def test_postgres_reads_text_arrays_back(database: Pool, values: list[str | None]) -> None:
    assert await database.fetchval("SELECT $1::text::text[]", array_literal(values)) == values


@pytest.mark.parametrize(
    ("values", "type_"), [([], "bigint"), ([1, -(2**63), None], "bigint"), ([True, False, None], "boolean")]
)
async def test_postgres_reads_other_arrays_back(database: Pool, values: list[Any], type_: str) -> None:
    assert await database.fetchval(f"SELECT $1::text::{type_}[]", array_literal(values)) == values


@pytest.mark.parametrize(
    ("name", "quoted"), [("nick", "nick"), ("order", '"order"'), ('a"b', '"a""b"'), ("50%", '"50%"'), ("a%b", '"a%b"')]
)
def test_quotes_identifiers_where_needed(name: str, quoted: str) -> None:
    assert quote_identifier(name) == quoted


def test_names_column_types() -> None:
    assert sql_type(mirrored_tables()["members"].columns["roles"]) == "BIGINT[]"
    assert sql_type(mirrored_tables()["users"].columns["username"]) == "TEXT"


def test_loads_statements_by_name(tmp_path: Path) -> None:
    path = tmp_path / "statements.sql"
    path.write_text(
        "-- A file.\n\n-- name: one\n-- Documented.\nSELECT 1\n\n\n-- name: two\nSELECT\n    -- inner\n    2;\n"
    )
    assert load_statements(path) == {"one": "SELECT 1", "two": "SELECT\n    -- inner\n    2"}


def test_rejects_a_statement_name_used_twice(tmp_path: Path) -> None:
    path = tmp_path / "statements.sql"
    path.write_text("-- name: one\nSELECT 1\n-- name: one\nSELECT 2\n")
    with pytest.raises(ValueError, match=r"statements\.sql names a statement twice: one"):
        load_statements(path)
