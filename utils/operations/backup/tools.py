"""PostgreSQL's programs of one major: pg_dump refuses newer servers, pg_restore newer archives."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
from pathlib import Path

from utils.database.binaries import binaries
from utils.exceptions import BackupError, DatabaseError

#: Where Debian keeps the programs of each major (postgresql-common).
_DEBIAN = "/usr/lib/postgresql/{major}/bin"
_OTHERS = (
    "/usr/pgsql-{major}/bin",
    "/usr/local/opt/postgresql@{major}/bin",
    "/opt/homebrew/opt/postgresql@{major}/bin",
)
#: Variables of libpq that say how to reach the server, as our own connections heed them too; the others of its kind
#: would steer pg_dump elsewhere.
_HEEDED = ("PGPASSFILE", "PGSERVICEFILE", "PGSSL", "PGTARGETSESSIONATTRS", "PGKRBSRVNAME", "PGGSSLIB")
#: Seconds for a program to say its version.
VERSION_SECONDS = 20.0
_VERSION = re.compile(r"\(PostgreSQL\) (\d+)(\S*)")


async def found(major: int) -> Path:
    """Return the directory of pg_dump and pg_restore of a server's major.

    Raises `BackupError` when there is none, with what to install.
    """
    seen: list[str] = []
    for directory in _candidates(major):
        said = await version(directory / "pg_dump")
        if said is None:
            continue
        if int(said.split(".")[0]) == major and os.access(directory / "pg_restore", os.X_OK):
            return directory
        seen.append(f"{said} in {directory}")
    have = f"found {', '.join(dict.fromkeys(seen))}" if seen else "found none"
    raise BackupError(
        f"the server is PostgreSQL {major}, and there is no pg_dump {major} here ({have}): install the package"
        f" postgresql-client-{major} (Debian, from apt.postgresql.org) or its like, or put its directory into PATH"
    )


def _candidates(major: int) -> list[Path]:
    directories = []
    with contextlib.suppress(DatabaseError):  # the wheel has 16 and 18 only
        directories.append(binaries(major))
    directories += [Path(pattern.format(major=major)) for pattern in (_DEBIAN, *_OTHERS)]
    on_path = shutil.which("pg_dump")
    if on_path is not None:
        directories.append(Path(on_path).parent)
    return [directory for directory in dict.fromkeys(directories) if (directory / "pg_dump").is_file()]


def environment() -> dict[str, str]:
    """Return our environment for one of the programs: of libpq's variables those that asyncpg heeds as well."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG") or name.startswith(_HEEDED)}


async def version(program: Path) -> str | None:
    """Return a program's version, like `18.4`; None when it cannot be run."""
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
        await ended(process)
    match = _VERSION.search(out.decode(errors="replace"))
    return None if match is None else f"{match[1]}{match[2]}"


async def ended(process: asyncio.subprocess.Process) -> None:
    """Kill a program that may run still, and wait for its end."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
