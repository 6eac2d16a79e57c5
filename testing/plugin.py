"""The pytest plugin: the fixture `bot`, on one server and one running bot for the whole session.

Two options in the pack's `pyproject.toml`: `guildbook_packs` names the packs as `COGS` does, and `guildbook_settings`
gives settings, such as `COMMAND_PREFIX=!`. Those of Guildbook itself are not read from the environment.
"""

from __future__ import annotations

import asyncio
import difflib
import shutil
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import pytest
import pytest_asyncio

from simulator import Limits, Simulator, World
from testing.running import MEMBERS, START_SECONDS, RunningBot, running_bot
from utils import packs
from utils.database import Pool, recorded_packs
from utils.database.embedded import EmbeddedServer
from utils.database.sql import quote_identifier
from utils.database.target import ConnectTarget
from utils.exceptions import GuildbookError, SettingsError
from utils.operations import migrations
from utils.settings import variables

ResultT = TypeVar("ResultT")

_DATABASE = "guildbook_tests"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("guildbook_packs", "The packs to load, as in COGS.", type="args", default=["."])
    parser.addini(
        "guildbook_settings", "Settings as in .env: those of Guildbook and those of the packs.", type="linelist"
    )


@pytest.fixture(scope="session")
def guildbook_database(request: pytest.FixtureRequest) -> Iterator[ConnectTarget]:
    """The address of a throwaway PostgreSQL with the tables of Guildbook and of the packs."""
    root = request.config.rootpath
    named = request.config.getini("guildbook_packs")
    entries = [str((root / one).resolve()) if one.startswith(".") else one for one in named]
    directory = Path(tempfile.mkdtemp(prefix="guildbook-"))
    server = EmbeddedServer(directory, durable=False)
    try:
        packs.activate(entries)
        _in_thread(server.start())
        _in_thread(_create(server))
        yield server.target(_DATABASE)
    except GuildbookError as exc:
        pytest.exit(str(exc), returncode=pytest.ExitCode.USAGE_ERROR)
    finally:
        _in_thread(server.stop(force=True))
        shutil.rmtree(directory, ignore_errors=True)


async def _create(server: EmbeddedServer) -> None:
    connection = await asyncpg.connect(**server.target("postgres").connect_kwargs(), timeout=10)
    try:
        await connection.execute("CREATE DATABASE guildbook_tests")
    finally:
        await connection.close(timeout=5)
    target = server.target(_DATABASE)
    await migrations.upgrade(target)
    _, problems = await migrations.upgrade_packs(target)
    for pack in packs.active():
        drift = await migrations.check_drift(target, scripts=pack.scripts)
        problems += [
            f"pack {pack.name}: its models are ahead of its revisions ({difference}): write one with make migration"
            for difference in drift[:1]
        ]
    if problems:
        raise GuildbookError("\n".join(problems))


def _in_thread(work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Run a coroutine apart from the event loops of the tests."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, work).result()


@pytest.fixture(scope="session")
def guildbook_settings(request: pytest.FixtureRequest, guildbook_database: ConnectTarget) -> Iterator[dict[str, Any]]:
    """The settings of Guildbook that `guildbook_settings` gives; those of packs are in the environment meanwhile."""
    try:
        given = _read_settings(request.config.getini("guildbook_settings"))
    except GuildbookError as exc:
        pytest.exit(str(exc), returncode=pytest.ExitCode.USAGE_ERROR)
    own = {name.lower(): given.pop(name) for name in variables() if name in given}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        yield own


def _read_settings(lines: Iterable[str]) -> dict[str, str]:
    """Return the values of lines like NAME=value. Raises `SettingsError` for a name that is no setting."""
    given: dict[str, str] = {}
    prefixes = tuple(pack.settings_prefix for pack in packs.active())
    for line in lines:
        name, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not (name in variables() or name.startswith(prefixes)):
            known = (*variables(), *prefixes)
            similar = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {similar[0]}?" if similar and similar[0] != name else ""
            raise SettingsError(
                f"guildbook_settings: {line!r} is wrong; expected NAME=value, with a setting of Guildbook or one that"
                f" begins with {' or '.join(prefixes)}{hint}"
            )
        given[name] = value
    return given


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def guildbook_running(
    guildbook_database: ConnectTarget, guildbook_settings: dict[str, Any]
) -> AsyncIterator[RunningBot]:
    """The bot, started once for all tests."""
    world = World(seed=1)
    world.add_guild(members=MEMBERS)
    pool = Pool(guildbook_database, pool_max=8, connect_timeout=10, acquire_timeout=10)
    await pool.connect()
    try:
        async with (
            Simulator(world, limits=Limits.none()) as simulator,
            running_bot(pool, simulator, **guildbook_settings) as bot,
        ):
            failed = [state for state in bot.loader.states() if state.state == "failed"]
            if failed:
                lines = [f"cog {state.name} is not loaded: {state.reason}" for state in failed]
                pytest.fail("\n".join(lines), pytrace=False)
            async with asyncio.timeout(START_SECONDS):
                await bot.wait_until_ready()  # the mirror is ready earlier: loops may still be in before_loop
            yield RunningBot(bot, simulator, pool)
    finally:
        await pool.close()


@pytest_asyncio.fixture(loop_scope="session")
async def bot(guildbook_running: RunningBot) -> AsyncIterator[RunningBot]:
    """The running bot, in a new guild, with the packs' tables empty and the clock at the machine's time."""
    recorded = await recorded_packs.fetch_packs(guildbook_running.pool)
    placement = guildbook_running.pool.placement
    names = [(placement.resolve(schema), name) for pack in recorded for schema, name in pack.relations]
    tables = await guildbook_running.fetch(_TABLES, [schema for schema, _ in names], [name for _, name in names])
    await guildbook_running.clear([".".join(map(quote_identifier, row)) for row in tables])
    await guildbook_running.new_guild()
    yield guildbook_running
    guildbook_running.clock.reset()


_TABLES = """
SELECT n.nspname::text, c.relname::text FROM unnest($1::text[], $2::text[]) AS wanted (schema, name)
    JOIN pg_namespace AS n ON n.nspname = wanted.schema
    JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = wanted.name
WHERE c.relkind IN ('r', 'p')
"""
