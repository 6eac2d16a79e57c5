"""The kinds of databases that people have: each world is one, as the bot gets it."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace

import asyncpg

from tests.conftest import admin_execute, cloned
from tests.database.placements import WAYS, placed
from tests.database.pooler import PROGRAM, pgbouncer
from tests.operations.migrations.support import KNOWN
from tests.worlds import foreign
from utils.database import ConnectTarget, Pool
from utils.database.embedded import EmbeddedServer
from utils.database.placement import Placement
from utils.operations import migrations

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class World:
    """A database without our tables."""

    server: EmbeddedServer
    #: How the bot reaches it.
    target: ConnectTarget
    #: How its superuser does.
    admin: ConnectTarget
    #: Whether it has the objects of tests/worlds/foreign.py.
    is_shared: bool = False
    #: Checks of `doctor` that do not have to be ok.
    warned_by: frozenset[str] = field(default=frozenset())

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Pool]:
        """Yield a pool on the database, as the bot and the command line make it. Raises its errors."""
        pool = Pool(self.target, pool_max=6, connect_timeout=10, acquire_timeout=10)
        await pool.connect()
        try:
            yield pool
        finally:
            await pool.close()


Creator = Callable[[EmbeddedServer], AbstractAsyncContextManager[World]]
#: Worlds in which everything works.
WORLDS: dict[str, Creator] = {}
#: Worlds that are refused, and what the refusal says.
REFUSED: dict[str, tuple[Creator, str]] = {}


def _world(
    create: Callable[[EmbeddedServer], AsyncIterator[World]],
) -> Callable[[EmbeddedServer], AsyncIterator[World]]:
    WORLDS[create.__name__] = asynccontextmanager(create)
    return create


async def run(target: ConnectTarget, *statements: str) -> None:
    """Run statements in one session."""
    connection = await asyncpg.connect(**target.connect_kwargs(), timeout=10)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close(timeout=5)


@asynccontextmanager
async def _owned(server: EmbeddedServer, *settings: str) -> AsyncIterator[World]:
    """Yield the database of a role that may do nothing but log in; `settings` are SET clauses for the role."""
    role = f"owner_{os.getpid()}_{next(_numbers)}"
    await admin_execute(server, f"CREATE ROLE {role} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE")
    try:
        for setting in settings:
            await admin_execute(server, f"ALTER ROLE {role} SET {setting}")
        async with cloned(server, "template1") as admin:
            await run(admin, f"ALTER DATABASE {admin.database} OWNER TO {role}")
            if server.version < 15:  # later, `public` belongs to the database's owner
                await run(admin, f"GRANT ALL ON SCHEMA public TO {role}")
            yield World(server, replace(admin, user=role), admin, warned_by=frozenset({"rights"}))
    finally:
        await admin_execute(server, f"DROP ROLE {role}")


# --- worlds in which everything works


@_world
async def empty(server: EmbeddedServer) -> AsyncIterator[World]:
    """A superuser's database with nothing in it."""
    async with cloned(server, "template1") as target:
        yield World(server, target, target)


@_world
async def shared(server: EmbeddedServer) -> AsyncIterator[World]:
    """Other bots' schemas, their tables in `public`, and a publication of all tables."""
    async with cloned(server, "template1") as target:
        await run(target, foreign.CREATE, "CREATE PUBLICATION everything FOR ALL TABLES")
        yield World(server, target, target, is_shared=True)


@_world
async def managed(server: EmbeddedServer) -> AsyncIterator[World]:
    """A host's database: its owner may not create databases, nor see the schemas and views of the host."""
    async with _owned(server) as world:
        await run(
            world.admin,
            "CREATE SCHEMA auth; CREATE TABLE auth.users (id bigint PRIMARY KEY, token text);"
            "REVOKE ALL ON SCHEMA auth FROM PUBLIC",
            # As pg_stat_statements, which a superuser creates in `public`.
            "CREATE FUNCTION public.statement_statistics(OUT query text, OUT calls bigint) RETURNS SETOF record"
            " LANGUAGE sql AS 'SELECT query, pid::bigint FROM pg_stat_activity';"
            "CREATE VIEW public.statement_statistics AS SELECT * FROM public.statement_statistics();"
            "REVOKE ALL ON public.statement_statistics FROM PUBLIC;"
            "REVOKE ALL ON FUNCTION public.statement_statistics FROM PUBLIC",
            "CREATE TABLE public.host_settings (name text PRIMARY KEY); REVOKE ALL ON public.host_settings FROM PUBLIC",
            "CREATE PUBLICATION everything FOR ALL TABLES",
            "CREATE FUNCTION auth.log_ddl() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER AS"
            " 'BEGIN PERFORM count(*) FROM auth.users; END';"
            "CREATE EVENT TRIGGER host_log ON ddl_command_end EXECUTE FUNCTION auth.log_ddl()",
        )
        yield world


@_world
async def pooler(server: EmbeddedServer) -> AsyncIterator[World]:
    """A PgBouncer in transaction mode that nothing announces."""
    async with cloned(server, "template1") as target, pgbouncer(target, size=10) as behind:
        yield World(server, behind, target, warned_by=frozenset({"pooler"}))


@_world
async def role_limits(server: EmbeddedServer) -> AsyncIterator[World]:
    """A role with time limits below what migrations, listings and backups take."""
    limits = ["statement_timeout = 200", "lock_timeout = 20", "idle_in_transaction_session_timeout = 200"]
    limits += ["idle_session_timeout = 500"]
    limits += ["transaction_timeout = 200"] if server.version >= 17 else []
    async with _owned(server, *limits) as world:
        yield world


@_world
async def role_settings(server: EmbeddedServer) -> AsyncIterator[World]:
    """A role whose settings change how values and identifiers are written, and what transactions see."""
    settings = [
        *("TimeZone = 'Asia/Kathmandu'", "DateStyle = 'German, DMY'", "IntervalStyle = 'iso_8601'"),
        *("bytea_output = 'escape'", "extra_float_digits = -15", "client_encoding = 'LATIN1'"),
        *("quote_all_identifiers = on", "standard_conforming_strings = off", "array_nulls = off"),
        *("default_transaction_isolation = 'serializable'", "default_transaction_deferrable = on"),
        *("client_min_messages = 'debug1'", "row_security = off", "plan_cache_mode = 'force_generic_plan'"),
    ]
    async with _owned(server, *settings) as world:
        yield world


@_world
async def restored_snapshot(server: EmbeddedServer) -> AsyncIterator[World]:
    """A database that its host set back to a state of an older revision, after a newer one was in use."""
    async with cloned(server, "template1") as target:
        snapshot = f"{target.database}_snapshot"
        await migrations.upgrade(target, KNOWN[-2])
        await admin_execute(server, f"CREATE DATABASE {snapshot} TEMPLATE {target.database} STRATEGY file_copy")
        try:
            await migrations.upgrade(target)
            await run(target, foreign.OUR_ROWS)
            await admin_execute(server, f"DROP DATABASE {target.database} WITH (FORCE)")
            await admin_execute(server, f"ALTER DATABASE {snapshot} RENAME TO {target.database}")
            yield World(server, target, target)
        finally:
            await admin_execute(server, f"DROP DATABASE IF EXISTS {snapshot} WITH (FORCE)")


#: Tables of another program with the names of ours.
_NAMESAKES = "CREATE TABLE users (id serial PRIMARY KEY, email text); CREATE TABLE guilds (id int)"


def _placed(way: str) -> Creator:
    @asynccontextmanager
    async def create(server: EmbeddedServer) -> AsyncIterator[World]:
        async with cloned(server, "template1") as admin:
            await migrations.upgrade(admin.with_placement(Placement.of("another_bot")))
            await run(admin, foreign.CREATE)
            async with placed(admin, way) as (target, _):
                yield World(server, target, admin, is_shared=True, warned_by=frozenset({"rights"}))

    return create


#: Worlds in which other bots and a second Guildbook are, and the tables of ours are in a schema that the user decides.
WORLDS.update({way: _placed(way) for way in WAYS})


@_world
async def schema_behind_pooler(server: EmbeddedServer) -> AsyncIterator[World]:
    """DB_SCHEMA behind a PgBouncer in transaction mode, with another Guildbook in `public`."""
    async with cloned(server, "template1") as target, pgbouncer(target, size=10) as behind:
        await migrations.upgrade(target)
        yield World(server, replace(behind, schema="Bot-X"), target, warned_by=frozenset({"pooler"}))


# --- worlds that are refused


def _encoded(encoding: str) -> Creator:
    @asynccontextmanager
    async def create(server: EmbeddedServer) -> AsyncIterator[World]:
        name = f"encoded_{os.getpid()}_{next(_numbers)}"
        provider = "LOCALE_PROVIDER libc" if server.version >= 15 else ""
        await admin_execute(
            server, f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' {provider} LOCALE 'C'"
        )
        try:
            yield World(server, server.target(name), server.target(name))
        finally:
            await admin_execute(server, f"DROP DATABASE {name} WITH (FORCE)")

    return create


REFUSED["sql_ascii"] = _encoded("SQL_ASCII"), r"has the encoding SQL_ASCII.*createdb -E UTF8"
REFUSED["latin1"] = _encoded("LATIN1"), r"has the encoding LATIN1.*createdb -E UTF8"


@asynccontextmanager
async def _read_only(server: EmbeddedServer) -> AsyncIterator[World]:
    async with _owned(server) as world:
        await migrations.upgrade(world.target)
        await run(world.admin, f"ALTER ROLE {world.target.user} SET default_transaction_read_only = on")
        yield world


REFUSED["read_only"] = _read_only, r"read-only"


@asynccontextmanager
async def _their_users(server: EmbeddedServer) -> AsyncIterator[World]:
    async with cloned(server, "template1") as target:
        await run(target, _NAMESAKES)
        yield World(server, target, target)


REFUSED["their_users"] = (
    _their_users,
    r"another program has tables where Guildbook would create its own: .*public\.users.* DB_SCHEMA",
)


@asynccontextmanager
async def _unusable_schema(server: EmbeddedServer) -> AsyncIterator[World]:
    async with _owned(server, 'search_path = "Bot\'s"') as world:
        await run(world.admin, f'CREATE SCHEMA "Bot\'s" AUTHORIZATION {world.target.user}')
        yield world


REFUSED["schema_with_a_quote"] = _unusable_schema, r"leads to the schema \"Bot's\", .* must not contain .*DB_SCHEMA"


@asynccontextmanager
async def _half(server: EmbeddedServer) -> AsyncIterator[World]:
    async with cloned(server, "template1") as target:
        await migrations.upgrade(target)
        await run(target, "DROP SCHEMA ops CASCADE")
        yield World(server, target, target)


REFUSED["a_part_of_our_tables"] = _half, r"only a part of Guildbook's tables|a table is missing: run the migrations"


@asynccontextmanager
async def create(name: str, server: EmbeddedServer) -> AsyncIterator[World]:
    """Create a world and drop it afterwards."""
    creator = WORLDS[name] if name in WORLDS else REFUSED[name][0]
    async with contextlib.AsyncExitStack() as stack:
        yield await stack.enter_async_context(creator(server))


#: Worlds that need programs which a machine may not have.
NEEDS_POOLER = frozenset({"pooler", "schema_behind_pooler"}) if PROGRAM is None else frozenset()
