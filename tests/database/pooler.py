"""A real PgBouncer in transaction mode, in front of a test's database."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ports import free_port
from utils.database import ConnectTarget
from utils.database.binaries import ACCOUNT_NAME

PROGRAM = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
needs_pgbouncer = pytest.mark.skipif(PROGRAM is None, reason="needs pgbouncer (apt-get install pgbouncer)")


@contextlib.asynccontextmanager
async def pgbouncer(target: ConnectTarget, *, mode: str = "transaction", size: int = 4) -> AsyncIterator[ConnectTarget]:
    """Yield the address of a PgBouncer before the database; nothing in it says that it is one.

    `size`: backends that its clients share.
    """
    assert PROGRAM is not None
    port = free_port()
    directory = _write_configuration(target, port, mode, size)
    process = await asyncio.create_subprocess_exec(
        PROGRAM,
        "-q",
        str(directory / "pgbouncer.ini"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(20):
            while True:
                assert process.returncode is None, "pgbouncer ended"
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    break
                await asyncio.sleep(0.05)
        yield replace(
            target, hosts=("127.0.0.1",), ports=(port,), sslmode="disable", is_declared=False, source="DATABASE_URL"
        )
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def _write_configuration(target: ConnectTarget, port: int, mode: str, size: int) -> Path:
    directory = Path(tempfile.mkdtemp(prefix="pgbouncer-"))
    # As root it refuses to run, and the socket of the embedded server admits its own account only.
    account = f"user = {ACCOUNT_NAME}\n" if os.geteuid() == 0 else ""
    ini = directory / "pgbouncer.ini"
    ini.write_text(
        f"[databases]\n* = host={target.hosts[0]} port={target.ports[0]} user={target.user}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        f"pool_mode = {mode}\ndefault_pool_size = {size}\nmax_client_conn = 200\n{account}",
        encoding="utf-8",
    )
    directory.chmod(0o755)
    ini.chmod(0o644)
    return directory
