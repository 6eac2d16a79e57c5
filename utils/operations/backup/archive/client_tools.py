"""Finds PostgreSQL's client programs of one major version: pg_dump refuses newer servers, pg_restore newer archives."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
from pathlib import Path

from utils.database.binaries import binaries
from utils.exceptions import ClientToolsMissing, DatabaseError

#: Where packages install the programs of each major: Debian (postgresql-common), Red Hat, Homebrew.
DIRECTORIES = (
    "/usr/lib/postgresql/{major}/bin",
    "/usr/pgsql-{major}/bin",
    "/usr/local/opt/postgresql@{major}/bin",
    "/opt/homebrew/opt/postgresql@{major}/bin",
)
#: The libpq variables that asyncpg heeds too. Any other could lead pg_dump to a different server.
_SHARED_VARIABLES = ("PGPASSFILE", "PGSERVICEFILE", "PGSSL", "PGTARGETSESSIONATTRS", "PGKRBSRVNAME", "PGGSSLIB")
#: Seconds for a program to print its version.
VERSION_SECONDS = 20.0
_VERSION = re.compile(r"\(PostgreSQL\) (\d+)(\S*)")


async def find_directory(major: int) -> Path:
    """Return the directory of pg_dump and pg_restore for a server's major version. Raises `ClientToolsMissing`."""
    seen: list[str] = []
    for directory in _candidates(major):
        version = await program_version(directory / "pg_dump")
        if version is None:
            continue
        if int(version.split(".")[0]) == major and os.access(directory / "pg_restore", os.X_OK):
            return directory
        seen.append(f"{version} in {directory}")
    raise ClientToolsMissing(major, list(dict.fromkeys(seen)))


def _candidates(major: int) -> list[Path]:
    directories = []
    with contextlib.suppress(DatabaseError):  # the wheel has 16 and 18 only
        directories.append(binaries(major))
    directories += [Path(pattern.format(major=major)) for pattern in DIRECTORIES]
    on_path = shutil.which("pg_dump")
    if on_path is not None:
        directories.append(Path(on_path).parent)
    return [directory for directory in dict.fromkeys(directories) if (directory / "pg_dump").is_file()]


def environment() -> dict[str, str]:
    """Return the environment for a client program: ours, with only the libpq variables that asyncpg heeds too."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PG") or name.startswith(_SHARED_VARIABLES)
    }


async def program_version(program: Path) -> str | None:
    """Return a program's PostgreSQL version, such as `18.4`; None if it cannot be run."""
    try:
        process = await asyncio.create_subprocess_exec(
            str(program), "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
    except OSError:
        return None
    try:
        async with asyncio.timeout(VERSION_SECONDS):
            out, _ = await process.communicate()
    except TimeoutError:
        return None
    finally:
        await kill(process)
    match = _VERSION.search(out.decode(errors="replace"))
    return None if match is None else f"{match[1]}{match[2]}"


async def kill(process: asyncio.subprocess.Process) -> None:
    """Kill a process if it is still running, and wait for its end."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
