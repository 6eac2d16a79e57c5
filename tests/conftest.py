"""One throwaway PostgreSQL for the whole run, and a fresh migrated database for each test that asks for it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import pytest
from hypothesis import HealthCheck, settings

from simulator import Limits, Simulator, World
from utils.database import ConnectTarget, Pool
from utils.database.embedded import EmbeddedServer
from utils.operations import migrations

settings.register_profile(
    "guildbook", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("guildbook"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "guildbook")

TEMPLATE = "guildbook_template"
_numbers = itertools.count(1)
Result = TypeVar("Result")


def in_thread(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end from a synchronous fixture, away from the tests' own loops."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            results.append(asyncio.run(work))
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedServer]:
    """The session's server: fast because nothing on it has to survive."""
    directory = Path(tempfile.mkdtemp(prefix="guildbook-"))
    version = int(os.environ.get("GUILDBOOK_TEST_PG", "18"))
    embedded = EmbeddedServer(directory, version, durable=False)
    try:
        in_thread(embedded.start())
        yield embedded
    finally:
        in_thread(embedded.stop(force=True))
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def template(server: EmbeddedServer) -> str:
    """The name of a migrated database without rows, to be cloned."""

    async def make() -> None:
        await _admin(server, f"CREATE DATABASE {TEMPLATE}")
        await migrations.upgrade(server.target(TEMPLATE))
        # Nobody may be connected while it is cloned, an autovacuum worker included.
        await _admin(server, f"ALTER DATABASE {TEMPLATE} WITH ALLOW_CONNECTIONS false")

    in_thread(make())
    return TEMPLATE


@pytest.fixture
async def target(server: EmbeddedServer, template: str) -> AsyncIterator[ConnectTarget]:
    """The address of a fresh migrated database, dropped after the test."""
    async with cloned(server, template) as fresh:
        yield fresh


@pytest.fixture
async def empty_target(server: EmbeddedServer) -> AsyncIterator[ConnectTarget]:
    """The address of a fresh database without any table."""
    async with cloned(server, "template1") as fresh:
        yield fresh


@pytest.fixture
async def database(target: ConnectTarget) -> AsyncIterator[Pool]:
    """A pool on a fresh migrated database."""
    db = Pool(target, pool_max=8, connect_timeout=10, acquire_timeout=10)
    await db.connect()
    yield db
    await db.close()


@pytest.fixture
def database_url(target: ConnectTarget) -> str:
    """What DATABASE_URL would hold for the fresh migrated database."""
    return target.libpq_url()


@pytest.fixture
def world() -> World:
    """Two guilds: one of several pages, and a small one."""
    world = World(seed=11)
    world.add_guild(members=3_500, name="Large")
    world.add_guild(members=40, name="Small")
    return world


@pytest.fixture
async def simulator(world: World) -> AsyncIterator[Simulator]:
    """The world served without limits."""
    async with Simulator(world, limits=Limits.none()) as running:
        yield running


@pytest.fixture
def large(world: World) -> int:
    """The id of the guild with several pages."""
    return next(iter(world.guilds))


@pytest.fixture
def small(world: World) -> int:
    """The id of the small guild."""
    return list(world.guilds)[1]


@contextlib.asynccontextmanager
async def cloned(server: EmbeddedServer, template: str) -> AsyncIterator[ConnectTarget]:
    """Lend a copy of a database (without fsync, copying its files takes a fifth of the time of logging them)."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    await _admin(server, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
    try:
        yield server.target(name)
    finally:
        await _admin(server, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


async def _admin(server: EmbeddedServer, statement: str) -> None:
    connection = await asyncpg.connect(**server.target("postgres").connect_kwargs(), timeout=10, command_timeout=60)
    try:
        await connection.execute(statement)
    finally:
        await connection.close(timeout=5)
