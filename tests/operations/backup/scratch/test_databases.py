"""Scratch databases: their names, their creation, and the removal of leftovers."""

from __future__ import annotations

import pytest

from tests.operations.backup.helpers import dropping_scratch_databases, execute, fetchval, scratch_databases
from utils.database import ConnectTarget
from utils.database.sessions import connect
from utils.exceptions import BackupError, ForbiddenHere
from utils.operations.backup.scratch import databases
from utils.operations.backup.scratch.locks import new_suffix


def test_names_fit_and_are_unique() -> None:
    suffix = new_suffix()
    long_names = ["d" * 60 + end for end in ("ab", "ac")] + ["ü" * 31]
    names = [databases.scratch_name(name, databases.RESTORE, suffix) for name in long_names]
    assert len(set(names)) == 3
    assert all(len(name.encode()) <= 63 for name in names)
    assert databases.scratch_name("guildbook", databases.BEFORE, suffix) == f"guildbook_before_{suffix}"


async def test_drops_leftovers_but_not_databases_in_use(target: ConnectTarget) -> None:
    name = str(target.database)
    leftover = databases.scratch_name(name, databases.RESTORE, "20200101_000000_abcd")
    foreign = f"{name}_restore_of_mine"
    postgres = target.with_database("postgres")
    await execute(postgres, f"CREATE DATABASE {leftover}", f"CREATE DATABASE {foreign}")
    try:
        async with (
            dropping_scratch_databases(target),
            databases.scratch_database(target, name, new_suffix()) as made,
        ):
            assert await scratch_databases(target, databases.RESTORE) == [made.name]
            with pytest.raises(BackupError, match="another restore"):
                async with databases.scratch_database(target, name, new_suffix()):
                    pass
            assert await scratch_databases(target, databases.RESTORE) == [made.name]
            properties = "(pg_encoding_to_char(encoding), datcollate, datctype)::text"
            query = f"SELECT {properties} FROM pg_database WHERE datname = $1"  # noqa: S608
            assert await fetchval(postgres, query, made.name) == await fetchval(postgres, query, name)
        assert await scratch_databases(target, databases.RESTORE) == []
        assert await fetchval(postgres, "SELECT count(*) FROM pg_database WHERE datname = $1", foreign) == 1
    finally:
        await execute(postgres, f"DROP DATABASE {foreign}")


async def test_says_which_privilege_is_missing(target: ConnectTarget) -> None:
    role = f"poor_{target.database}"
    postgres = target.with_database("postgres")
    await execute(postgres, f"CREATE ROLE {role} LOGIN")
    try:
        ours = ConnectTarget(target.hosts, target.ports, user=role, database=target.database, sslmode="disable")
        with pytest.raises(ForbiddenHere, match="CREATEDB"):
            async with databases.scratch_database(ours, str(target.database), new_suffix()):
                pass
        await execute(postgres, f"ALTER ROLE {role} CREATEDB")
        with pytest.raises(ForbiddenHere, match="may not rename"):
            async with databases.scratch_database(ours, str(target.database), new_suffix()):
                pass
    finally:
        await execute(postgres, f"DROP ROLE {role}")


async def test_connections_replace_the_time_limits_of_a_role(target: ConnectTarget) -> None:
    await execute(target, f"ALTER DATABASE {target.database} SET statement_timeout = '150ms'")
    async with connect(target) as connection:
        await connection.execute("SELECT pg_sleep(0.3)")
