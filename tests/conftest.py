"""Fixtures for every test: one throwaway PostgreSQL per worker, a fresh migrated database per test, a simulator.

The suite runs in several processes (`make test` passes `-n`). A test must not depend on another one, on a fixed port
or on a shared directory. Marks decide which run a test belongs to:

- `slow`: restarts a server, kills a process or takes more than about two seconds. Set here on every property test
  that uses the database.
- `exhaustive`: long histories, soaks and fuzzing; runs with `make test-all` only, where property tests also try ten
  times as many examples or more.
- `quick` is set here on every test that carries neither: `make test ARGS="-m quick"`.
- `direct`: cannot work through a pooler; the reason is the argument.

`make test-all` runs the tests of the database again with these variables:

- `GUILDBOOK_TEST_PG`: the major version of PostgreSQL, see tests/servers.py.
- `GUILDBOOK_TEST_POOLER=1`: databases are reached through a PgBouncer in transaction mode.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Collection, Coroutine, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg
import psutil
import pytest
from hypothesis import HealthCheck, settings

from simulator import Limits, Simulator, World
from tests.database.pooler import pgbouncer
from tests.servers import DEFAULT, make_server
from utils.database import ConnectTarget, Pool
from utils.database.embedded import EmbeddedServer
from utils.operations import migrations

if TYPE_CHECKING:
    from tests.mirror.restoring import Droppable

settings.register_profile(
    "guildbook",
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("ci", settings.get_profile("guildbook"), derandomize=True)
settings.register_profile("exhaustive", settings.get_profile("guildbook"), max_examples=1_000)
PROFILE = os.environ.get("GUILDBOOK_TEST_PROFILE") or ("ci" if os.environ.get("CI") else "guildbook")
settings.load_profile(PROFILE)

TEMPLATE = "guildbook_template"
IS_POOLED = bool(os.environ.get("GUILDBOOK_TEST_POOLER"))
#: Backends of a pooler that a test's database is behind: enough for the largest pool of a test.
POOLER_SIZE = 30
IS_EXHAUSTIVE = PROFILE == "exhaustive"
#: How many times more examples `make test-all` tries where a test sets their number.
EXHAUSTIVE = 10
#: Where Linux keeps files in memory. Containers often have 64 MB there.
SHARED_MEMORY = Path("/dev/shm")
#: Bytes that must be free there; the files of a run with six workers took 1 GB at most.
MEMORY_ROOM = 4 << 30
_numbers = itertools.count(1)
#: Peak memory in MB per process, by the worker's name.
_peak_memory: dict[str, int] = {}
Result = TypeVar("Result")


def sampled(values: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """Return the values of a parameter: `make test` tries those to keep, `make test-all` all of them."""
    every = list(values)
    assert all(it in every for it in kept), "kept, but not there"
    return [it if it in kept else pytest.param(it, marks=pytest.mark.exhaustive) for it in every]


def examples(number: int) -> settings:
    """Return the settings of a property test that tries so many examples, and ten times as many in `make test-all`."""
    return settings(max_examples=number * (EXHAUSTIVE if IS_EXHAUSTIVE else 1))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give each run its own directory for `tmp_path`, in memory if possible; pass --basetemp to keep the files.

    Every pytest that starts resets the mode of the shared default, also one that a test starts. The account of an
    embedded server could then no longer enter the directories of tests that are running.
    """
    if (memory := memory_directory()) is not None:
        # For this process, for the workers and for all that tests start.
        os.environ["TMPDIR"] = tempfile.tempdir = str(memory)
    # Otherwise each of the some 300 processes that tests start would compile our modules again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if config.option.basetemp is None:
        directory = tempfile.mkdtemp(prefix="guildbook-tests-")
        config.option.basetemp = directory
        config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))


def memory_directory() -> Path | None:
    """Return a directory in memory with enough room for the files of a run; None if this machine has none.

    Cloning a database creates some 400 files. That takes ext4 up to 0.3 s of processor time, and tmpfs 0.02 s.
    """
    if "TMPDIR" in os.environ or not SHARED_MEMORY.is_mount():
        return None
    room = min(shutil.disk_usage(SHARED_MEMORY).free, psutil.virtual_memory().available)
    return SHARED_MEMORY if room > MEMORY_ROOM else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Set the marks, and start with the tests that may take long: none of them then runs alone at the end."""
    items.sort(key=lambda item: -_time_limit(item))
    for item in items:
        if hasattr(getattr(item, "obj", None), "hypothesis") and "server" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")
        if not any(item.get_closest_marker(name) for name in ("slow", "exhaustive")):
            item.add_marker("quick")
        if IS_POOLED and (mark := item.get_closest_marker("direct")) is not None:
            item.add_marker(pytest.mark.skip(reason=f"not through a pooler: {mark.args[0]}"))


def pytest_collection_finish() -> None:
    """Take what the tests consist of out of the garbage collector's sight: it visits it hundreds of times otherwise."""
    gc.collect()
    gc.freeze()


def _time_limit(item: pytest.Item) -> float:
    """Return the seconds that a test's own mark allows it, or 0."""
    mark = item.get_closest_marker("timeout")
    return float(mark.args[0]) if mark is not None and mark.args else 0.0


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Escape lone surrogates: execnet, which carries reports between processes, refuses them and ends the whole run."""
    return _without_surrogates((yield))


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_without_surrogates, value))
    return value


def pytest_sessionfinish(session: pytest.Session) -> None:
    with contextlib.suppress(FileNotFoundError):  # Linux only
        status = Path("/proc/self/status").read_text()
        peak = next(int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["peak_memory"] = peak
        else:
            _peak_memory["main"] = peak


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker sent when it ended; one that crashed sent nothing."""
    if "peak_memory" in (output := getattr(node, "workeroutput", {})):
        _peak_memory[node.gateway.id] = output["peak_memory"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _peak_memory:
        peaks = ", ".join(f"{name} {peak} MB" for name, peak in sorted(_peak_memory.items()))
        terminalreporter.write_line(f"peak memory: {peaks}")


def in_thread(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to completion from a synchronous fixture, apart from the event loops of the tests."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, work).result()


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedServer]:
    """The PostgreSQL server of this worker: without fsync, because nothing on it has to survive."""
    directory = Path(tempfile.mkdtemp(prefix="guildbook-"))
    embedded = make_server(directory, int(os.environ.get("GUILDBOOK_TEST_PG", DEFAULT)))
    try:
        in_thread(embedded.start())
        yield embedded
    finally:
        in_thread(embedded.stop(force=True))
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def template(server: EmbeddedServer) -> str:
    """The name of a migrated database without rows, which tests get clones of."""
    in_thread(make_template(server))
    return TEMPLATE


@pytest.fixture
async def target(server: EmbeddedServer, template: str) -> AsyncIterator[ConnectTarget]:
    """Connection parameters of a fresh migrated database, which is dropped after the test."""
    async with cloned(server, template) as fresh, reached(fresh) as address:
        yield address


@pytest.fixture
async def empty_target(server: EmbeddedServer) -> AsyncIterator[ConnectTarget]:
    """Connection parameters of a fresh database without tables, which is dropped after the test."""
    async with cloned(server, "template1") as fresh, reached(fresh) as address:
        yield address


@pytest.fixture
async def dropped(server: EmbeddedServer, template: str) -> AsyncIterator[Droppable]:
    """A migrated database that can be dropped and recreated, with what restores leave beside it."""
    from tests.mirror.restoring import droppable  # which imports this module
    from tests.operations.backup.helpers import dropping_scratch_databases

    async with droppable(server, template) as database, dropping_scratch_databases(database.pool.target):
        yield database


@pytest.fixture
async def database(target: ConnectTarget) -> AsyncIterator[Pool]:
    """A pool on a fresh migrated database. It has to recognise a pooler by itself."""
    pool = Pool(replace(target, pooled=False), pool_max=8, connect_timeout=10, acquire_timeout=10)
    await pool.connect()
    yield pool
    await pool.close()


@pytest.fixture
def database_url(target: ConnectTarget) -> str:
    """The fresh migrated database as a value for DATABASE_URL."""
    return target.libpq_url()


@pytest.fixture
def world(request: pytest.FixtureRequest) -> World:
    """Two guilds, one of several pages of members and a small one; or those of the marker `guilds`."""
    marker = request.node.get_closest_marker("guilds")
    world = World(seed=11)
    for members in marker.args if marker is not None else (3_500, 40):
        world.add_guild(members=members, name="Large" if members > 1_000 else "Small")
    return world


@pytest.fixture
async def simulator(world: World) -> AsyncIterator[Simulator]:
    """A simulator that serves `world` without rate limits."""
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


async def make_template(server: EmbeddedServer) -> None:
    """Create the migrated database `TEMPLATE`."""
    await admin_execute(server, f"CREATE DATABASE {TEMPLATE}")
    await migrations.upgrade(server.target(TEMPLATE))
    # CREATE DATABASE fails while anything is connected to the template, even an autovacuum worker.
    await admin_execute(server, f"ALTER DATABASE {TEMPLATE} WITH ALLOW_CONNECTIONS false")


@contextlib.asynccontextmanager
async def reached(target: ConnectTarget) -> AsyncIterator[ConnectTarget]:
    """Yield the address at which tests reach a database: its own, or that of a pooler before it."""
    if not IS_POOLED:
        yield target
        return
    async with pgbouncer(target, size=POOLER_SIZE) as behind:
        yield behind.through_pooler()


@contextlib.asynccontextmanager
async def cloned(server: EmbeddedServer, template: str) -> AsyncIterator[ConnectTarget]:
    """Clone a database, and drop the clone at the end.

    Without fsync, copying the files takes a fifth of the time of the default strategy, which writes them to the WAL.
    """
    name = f"test_{os.getpid()}_{next(_numbers)}"
    await admin_execute(server, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
    try:
        # As an address names it, so that bots and commands that get DATABASE_URL agree on which server it is.
        yield replace(server.target(name), source="")
    finally:
        await admin_execute(server, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


async def admin_execute(server: EmbeddedServer, statement: str) -> None:
    """Run a statement in the server's maintenance database."""
    await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_execute(server, statement), _admin_loop()))


#: Open connections to maintenance databases, by directory: connecting costs as much as a statement.
_admins: dict[Path, asyncpg.Connection[asyncpg.Record]] = {}


@functools.cache
def _admin_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop in a thread of its own, which lasts as long as this process. A test's own ends with it."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="admin", daemon=True).start()
    return loop


async def _execute(server: EmbeddedServer, statement: str) -> None:
    connection = _admins.get(server.cluster)
    if connection is None or connection.is_closed():
        kwargs = server.target("postgres").connect_kwargs()
        connection = _admins[server.cluster] = await asyncpg.connect(**kwargs, timeout=10, command_timeout=60)
    await connection.execute(statement)
