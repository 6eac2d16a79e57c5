"""The ways in which a user decides where the tables are, each as a target of a fresh database."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import asyncpg

from utils.database import ConnectTarget
from utils.database.address import parse_url, resolve_targets

#: The main schema by way; `$user` stands for the name of the role.
WAYS = {
    "search_path of the role": "botx",
    "search_path of the database": "botx",
    "schema named like the user": "$user",
    "?schema= in the address": "botx",
    "DB_SCHEMA": "Bot-X",
}


@contextlib.asynccontextmanager
async def placed(fresh: ConnectTarget, way: str) -> AsyncIterator[tuple[ConnectTarget, str]]:
    """Yield the target of an ordinary role for a database, and the main schema that it leads to."""
    role = f"role_{fresh.database}"
    main = WAYS[way].replace("$user", role)
    admin = await asyncpg.connect(**fresh.connect_kwargs())
    try:
        await admin.execute(f"CREATE ROLE {role} LOGIN; GRANT CREATE, CONNECT ON DATABASE {fresh.database} TO {role}")
        target = replace(fresh, user=role)
        if way == "search_path of the role":
            await admin.execute(
                f"CREATE SCHEMA {main} AUTHORIZATION {role}; ALTER ROLE {role} SET search_path = {main}"
            )
        elif way == "search_path of the database":
            await admin.execute(f"CREATE SCHEMA {main} AUTHORIZATION {role}")
            await admin.execute(f"ALTER DATABASE {fresh.database} SET search_path = {main}, public")
        elif way == "schema named like the user":
            await admin.execute(f"CREATE SCHEMA AUTHORIZATION {role}")
        elif way == "?schema= in the address":
            target = replace(parse_url(f"{target.libpq_url()}&schema={main}"), is_declared=True)
        else:
            found, _ = resolve_targets({"DATABASE_URL": target.libpq_url(), "DB_SCHEMA": main})
            assert found is not None
            target = replace(found, is_declared=True)
        try:
            yield target, main
        finally:
            await admin.execute(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")
    finally:
        await admin.close(timeout=5)


async def list_relations(target: ConnectTarget) -> dict[str, set[str]]:
    """Return the names of all tables, views and sequences by schema."""
    connection = await asyncpg.connect(**target.connect_kwargs())
    try:
        rows = await connection.fetch(
            "SELECT n.nspname AS schema, c.relname AS name FROM pg_class AS c JOIN pg_namespace AS n"
            " ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S')"
            " AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'"
        )
    finally:
        await connection.close(timeout=5)
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row["schema"], set()).add(row["name"])
    return found
