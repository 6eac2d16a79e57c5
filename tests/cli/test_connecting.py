"""Commands connect with the settings' times, and say in one line why they cannot."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from tests.bot.running import run_cli
from tests.ports import free_port

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("arguments", [("db", "status"), ("db", "seed"), ("backup", "create")])
async def test_commands_obey_the_connect_timeout(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    url = f"postgresql://u:s3cr3t-password@127.0.0.1:{free_port()}/d"
    started = time.monotonic()
    code, output = await run_cli(tmp_path, *arguments, DATABASE_URL=url, DB_CONNECT_TIMEOUT="1")
    assert time.monotonic() - started < 40
    assert (code, output.count("\n")) == (1, 1), output
    assert "could not be reached within" in output
    assert "s3cr3t" not in output


@pytest.mark.parametrize(("command", "exit_code"), [("list", 0), ("prune", 0), ("verify", 1), ("push", 2)])
async def test_what_needs_no_database_does_not_wait_for_one(tmp_path: Path, command: str, exit_code: int) -> None:
    """The address accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=8) as silent:
        url = f"postgresql://u:s3cr3t@127.0.0.1:{silent.getsockname()[1]}/d?sslmode=disable"
        started = time.monotonic()
        settings = {"DATABASE_URL": url, "DB_CONNECT_TIMEOUT": "600", "DB_ACQUIRE_TIMEOUT": "600"}
        code, output = await run_cli(tmp_path, "backup", command, **settings)
        assert time.monotonic() - started < 40, "3 s, and the start of a process"
        assert (code, output.count("\n")) == (exit_code, 1), output


async def test_a_missing_certificate_file_ends_a_command_at_once(tmp_path: Path) -> None:
    url = "postgresql://u@127.0.0.1:1/d?sslmode=verify-full&sslrootcert=/nowhere/ca.pem"
    code, output = await run_cli(tmp_path, "db", "status", DATABASE_URL=url, DB_CONNECT_TIMEOUT="3600")
    assert (code, output) == (
        2, "DATABASE_URL: sslrootcert: /nowhere/ca.pem cannot be read: No such file or directory\n",
    )  # fmt: skip
