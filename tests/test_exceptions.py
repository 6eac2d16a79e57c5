"""Driver errors become errors of the public hierarchy at one boundary."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from utils.exceptions import (
    BackupError,
    Conflict,
    DatabaseError,
    DatabaseUnavailable,
    TransactionConflict,
    ValidationError,
    expect_tables,
    is_transient,
    translate,
    translate_errors,
)


@pytest.mark.parametrize(
    ("raised", "kind", "sqlstate"),
    [
        (asyncpg.UndefinedTableError("no table"), DatabaseError, "42P01"),
        (asyncpg.DeadlockDetectedError("deadlock"), TransactionConflict, "40P01"),
        (asyncpg.InterfaceError("connection is closed"), DatabaseUnavailable, None),
        (asyncpg.InterfaceError("wrong argument"), DatabaseError, None),
        (asyncpg.InternalClientError("cannot switch to state 12"), DatabaseUnavailable, None),
        (ConnectionRefusedError(111, "Connection refused"), DatabaseUnavailable, None),
        (TimeoutError(), DatabaseUnavailable, None),
    ],
)
def test_translates_driver_errors(raised: Exception, kind: type[DatabaseError], sqlstate: str | None) -> None:
    with pytest.raises(DatabaseError) as caught, translate_errors():
        raise raised
    assert type(caught.value) is kind
    assert caught.value.sqlstate == sqlstate
    assert caught.value.__cause__ is raised
    assert is_transient(raised) == issubclass(kind, DatabaseUnavailable)


def test_names_the_action_in_the_message() -> None:
    expected = r"^counting rows: no table \[42P01\]: .*migrations"
    with pytest.raises(DatabaseError, match=expected), translate_errors("counting rows"):
        raise asyncpg.UndefinedTableError("no table")


@pytest.mark.parametrize("raised", [KeyError("x"), Conflict("taken"), BackupError("x"), asyncio.CancelledError()])
def test_passes_other_errors_unchanged(raised: BaseException) -> None:
    with pytest.raises(type(raised)) as caught, translate_errors("anything"):
        raise raised
    assert caught.value is raised


@pytest.mark.parametrize("raised", [OSError(28, "No space left"), DatabaseUnavailable("down")])
def test_raises_the_requested_class(raised: Exception) -> None:
    with pytest.raises(BackupError, match=r"^dumping: ") as caught, translate_errors("dumping", error=BackupError):
        raise raised
    assert caught.value.__cause__ is raised


def test_can_leave_file_errors_alone() -> None:
    with pytest.raises(FileNotFoundError), translate_errors(files=False):
        raise FileNotFoundError(2, "No such file")
    with pytest.raises(DatabaseUnavailable), translate_errors(files=False):
        raise ConnectionResetError(104, "reset")


def test_a_missing_database_is_transient_once_it_existed() -> None:
    with pytest.raises(DatabaseUnavailable), translate_errors(was_connected=True):
        raise asyncpg.InvalidCatalogNameError("gone")
    with pytest.raises(DatabaseError) as caught, translate_errors():
        raise asyncpg.InvalidCatalogNameError("gone")
    assert not isinstance(caught.value, DatabaseUnavailable)


def test_a_validation_error_is_a_database_error() -> None:
    assert issubclass(ValidationError, DatabaseError)


def test_a_table_that_was_there_before_is_not_one_to_migrate() -> None:
    def text(name: str) -> str:
        return str(translate(asyncpg.UndefinedTableError(f'relation "{name}" does not exist')))

    assert "run the migrations" in text("changes")
    expect_tables({"changes", "ops.leases", "ops"})
    try:
        for name in ("changes", "ops.leases"):
            assert text(name).startswith(f'relation "{name}" does not exist [42P01]: the table was there before')
            assert "run the migrations" not in text(name)
            assert "backup restore" in text(name)
            assert "db begin-anew" in text(name)
        assert "run the migrations" in text("table_of_a_cog")
        gone = asyncpg.InvalidSchemaNameError('schema "ops" does not exist')
        assert "the table was there before" in str(translate(gone))
    finally:
        expect_tables(())
