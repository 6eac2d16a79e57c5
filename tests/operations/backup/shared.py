"""A database that other programs use too, on a host that gives the bot an ordinary owner and nothing more."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from tests.conftest import cloned
from tests.operations.backup.helpers import execute, fetchval
from utils.database import ConnectTarget
from utils.database.embedded import EmbeddedServer
from utils.operations import migrations

#: Extensions that an ordinary owner may not create: the first that the server has is used.
EXTENSIONS = ("pg_stat_statements", "vector")
#: What the host has: run as its superuser, before our tables exist.
_HOST = """
CREATE EXTENSION {extension};
CREATE SCHEMA auth;
CREATE TABLE auth.users (id uuid PRIMARY KEY, secret text);
INSERT INTO auth.users VALUES ('00000000-0000-0000-0000-000000000001', 'hush');
CREATE PUBLICATION everything FOR ALL TABLES;
CREATE FUNCTION auth.watch() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN PERFORM 1; END';
CREATE EVENT TRIGGER watch ON ddl_command_end EXECUTE FUNCTION auth.watch();
"""
_GRANTS = """
GRANT SELECT, REFERENCES, TRIGGER ON ALL TABLES IN SCHEMA public TO {other};
GRANT UPDATE (nick) ON members TO {other};
COMMENT ON TABLE members IS 'read by the shop';
CREATE POLICY own ON documents TO {other} USING (guild_id = 1);
"""
#: What the other program has: two schemas and a table beside ours, with views and foreign keys onto our tables.
_OTHER = """
CREATE SCHEMA shop;
CREATE TABLE shop.orders (id int PRIMARY KEY, guild_id bigint REFERENCES guilds (id) ON DELETE CASCADE, note text);
CREATE TABLE shop.carts (
    guild_id bigint, user_id bigint, total numeric,
    FOREIGN KEY (guild_id, user_id) REFERENCES members (guild_id, user_id)
);
CREATE TABLE shop.audit (at timestamptz, nick text);
CREATE VIEW shop.customers AS SELECT m.nick, o.note FROM members AS m JOIN shop.orders AS o USING (guild_id);
CREATE FUNCTION shop.note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
    'BEGIN INSERT INTO shop.audit VALUES (now(), NEW.nick); RETURN NEW; END';
CREATE TRIGGER note AFTER INSERT OR UPDATE ON members FOR EACH ROW EXECUTE FUNCTION shop.note();
CREATE SCHEMA stats;
CREATE TYPE stats.mood AS ENUM ('good', 'bad');
CREATE TABLE stats.days (day date PRIMARY KEY, mood stats.mood);
INSERT INTO stats.days SELECT date '2026-01-01' + n, 'good' FROM generate_series(1, 300) AS n;
CREATE MATERIALIZED VIEW stats.sizes AS SELECT count(*) AS guilds FROM guilds;
CREATE TABLE public.legacy_bans (user_id bigint);
INSERT INTO public.legacy_bans VALUES (3), (4);
"""
#: Rows that refer to ours.
_REFERENCES = """
INSERT INTO shop.orders SELECT row_number() OVER (ORDER BY id), id, 'order of ' || name FROM guilds;
INSERT INTO shop.carts SELECT guild_id, user_id, 1.5 FROM members ORDER BY user_id LIMIT 3;
REFRESH MATERIALIZED VIEW stats.sizes;
"""


@dataclass(frozen=True, slots=True)
class SharedDatabase:
    """One database as its users see it."""

    server: EmbeddedServer
    #: The host's superuser, the owner of our tables, and the other program.
    superuser: ConnectTarget
    ours: ConnectTarget
    other: ConnectTarget

    async def add_references(self) -> None:
        """Let rows of the other program refer to rows of ours."""
        await execute(self.other, _REFERENCES)

    async def dump(self, *options: str) -> str:
        """Return a dump as text."""
        command = [str(self.server.bin_dir / "pg_dump"), *options, self.superuser.libpq_url()]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
        lines = done.stdout.splitlines()
        # Each dump has another random key in these lines.
        return "\n".join(line for line in lines if not line.startswith(("\\restrict", "\\unrestrict")))

    async def dump_others(self) -> str:
        """Return a dump of everything that is not ours."""
        whole = await self.dump("--schema-only")
        rows = await self.dump("--data-only", "--schema=auth", "--schema=shop", "--schema=stats")
        return "\n".join([whole, rows, await self.dump("--data-only", "--table=public.legacy_bans")])


@asynccontextmanager
async def shared_database(server: EmbeddedServer) -> AsyncIterator[SharedDatabase]:
    """Yield a database with our tables beside those of other programs; our user is no superuser."""
    async with cloned(server, "template1") as superuser:
        name = str(superuser.database)
        shared = SharedDatabase(
            server, superuser, replace(superuser, user=f"owner_{name}"), replace(superuser, user=f"other_{name}")
        )
        extension = await fetchval(
            superuser,
            "SELECT name FROM pg_available_extensions WHERE name = ANY($1::text[])"
            " ORDER BY array_position($1::text[], name::text) LIMIT 1",
            list(EXTENSIONS),
        )
        await execute(
            superuser,
            *(f"CREATE ROLE {one.user} LOGIN NOSUPERUSER NOCREATEDB" for one in (shared.ours, shared.other)),
            f"ALTER DATABASE {name} OWNER TO {shared.ours.user}",
            _HOST.format(extension=extension),
        )
        await migrations.upgrade(shared.ours)
        await execute(shared.ours, _GRANTS.format(other=shared.other.user))
        await execute(superuser, f"GRANT CREATE ON DATABASE {name} TO {shared.other.user}")
        await execute(superuser, f"GRANT CREATE ON SCHEMA public TO {shared.other.user}")
        await execute(shared.other, _OTHER)
        try:
            yield shared
        finally:
            await execute(superuser.with_database("postgres"), f"ALTER DATABASE {name} OWNER TO postgres")
    await execute(
        superuser.with_database("postgres"), *(f"DROP ROLE {one.user}" for one in (shared.ours, shared.other))
    )
