"""Reads the rows of an archive: `pg_restore` writes COPY statements, whose data is copied on."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from utils.database.placement import Placement
from utils.exceptions import BackupError
from utils.operations.backup.archive import client_tools
from utils.operations.backup.archive.objects import Name, placement_of_backup

#: Seconds for pg_restore to list the contents of an archive.
CONTENTS_SECONDS = 300.0
#: Seconds without output after which pg_restore is stopped: it may have to skip a very large table.
STALL_SECONDS = 3_600.0
#: Seconds for pg_restore to end on SIGTERM before it is killed.
TERMINATE_SECONDS = 10.0
#: Bytes that are read from pg_restore at a time.
CHUNK = 1 << 18
#: The end of a table's rows.
_END = b"\n\\.\n"
_IDENTIFIER = r'(?:"(?:[^"]|"")+"|[^".,() ]+)'
_COPY = re.compile(rf"COPY ({_IDENTIFIER})\.({_IDENTIFIER}) \((.*)\) FROM stdin;\n")
_SET_SEQUENCE = re.compile(
    rf"SELECT pg_catalog\.setval\('({_IDENTIFIER})\.({_IDENTIFIER})', (-?\d+), (true|false)\);\n"
)
_IDENTIFIERS = re.compile(_IDENTIFIER)


@dataclass(frozen=True, slots=True)
class Archive:
    """A verified backup as a local file that pg_restore can read."""

    id: str
    file: Path
    #: Directory of the pg_restore that can read it.
    tools: Path
    made_at: datetime
    #: Major version of the PostgreSQL server that it was made on.
    major: int
    #: Revision of the schema (several, of unmerged branches: separated by commas); None: it has no Guildbook tables.
    revision: str | None
    #: Exact row counts by schema and table.
    counts: dict[Name, int] = field(default_factory=dict)
    #: Whether it was made of some tables only.
    is_partial: bool = False
    #: Whether it was made automatically before a dangerous operation.
    is_safety_copy: bool = False
    #: The revisions of each pack that it has tables of, by its name.
    packs: dict[str, str] = field(default_factory=dict)

    @property
    def schemas(self) -> Placement:
        """The schemas that our tables were in."""
        return placement_of_backup(self.counts)


@dataclass(frozen=True, slots=True)
class SequenceState:
    """The state of a sequence."""

    last_value: int
    is_called: bool


async def list_contents(file: Path, tools: Path, *, name: str, timeout: float = CONTENTS_SECONDS) -> str:
    """Return what pg_restore lists of an archive. `name` is that of the archive in error messages."""
    process = await asyncio.create_subprocess_exec(
        str(tools / "pg_restore"), "--list", str(file),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(timeout):
            out, stderr = await process.communicate()
    except TimeoutError:
        raise BackupError(f"pg_restore did not list {name} within {timeout:g} s") from None
    finally:
        await client_tools.kill(process)
    if process.returncode:
        message = " ".join(stderr.decode(errors="replace").split())[:300]
        raise BackupError(f"pg_restore cannot read {name}: {message}")
    return out.decode(errors="replace")


async def list_items(archive: Archive, kind: str) -> list[str]:
    """Return the lines of an archive's table of contents that are of a kind: "TABLE DATA", "SEQUENCE SET"."""
    contents = await list_contents(archive.file, archive.tools, name=f"backup {archive.id}")
    pattern = re.compile(rf"\d+; \d+ \d+ {kind} ")
    return [line for line in contents.splitlines() if pattern.match(line)]


def table_of(part: Name, tables: Collection[Name]) -> Name | None:
    """Return the table that rows belong to: itself, or the table of a partition, whose name begins with the table's."""
    if part in tables:
        return part
    return longest(name for name in tables if name[0] == part[0] and part[1].startswith(f"{name[1]}_"))


def longest(names: Iterable[Name]) -> Name | None:
    """Return the table with the longest name; None if there is none."""
    return max(names, key=lambda name: len(name[1]), default=None)


@contextlib.asynccontextmanager
async def open_script(file: Path, tools: Path, items: Sequence[str] | None = None) -> AsyncIterator[Script]:
    """Yield what pg_restore writes of an archive's data; it is stopped at the end of the block.

    items: the lines of the table of contents to write; None: all. Raises `BackupError` if pg_restore fails.
    """
    use_list = [] if items is None else ["--use-list=/dev/stdin"]
    with tempfile.TemporaryFile() as listing, tempfile.TemporaryFile() as errors:
        listing.write("\n".join([*(items or ()), ""]).encode())
        listing.seek(0)
        output, stream, transport = await _open_pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                str(tools / "pg_restore"), "--data-only", *use_list, "--file=-", str(file),
                stdin=listing, stdout=output, stderr=errors,
                env={**client_tools.environment(), "LC_ALL": "C"},
                start_new_session=True,  # so that Ctrl-C reaches only us; we stop it
            )  # fmt: skip
        except BaseException:
            transport.close()
            raise
        finally:
            os.close(output)  # only pg_restore has it now, so that its end is the end of the stream

        def explain() -> BackupError:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()[-3:]
            reason = " ".join(line.removeprefix("pg_restore: ") for line in lines)
            return BackupError(f"pg_restore could not read the backup: {reason or f'exit code {process.returncode}'}")

        try:
            script = Script(stream)
            try:
                yield script
            except IncompleteScript:
                await _wait(process)
                raise explain() from None
            await script.skip()
            await _wait(process)
            if process.returncode:
                raise explain()
        finally:
            transport.close()
            await client_tools.kill(process)


async def _open_pipe() -> tuple[int, asyncio.StreamReader, asyncio.ReadTransport]:
    """Return a descriptor to write to, a stream that reads what was written, and its transport, to be closed."""
    reading, writing = os.pipe()
    if hasattr(fcntl, "F_SETPIPE_SZ"):  # Linux buffers 64 KB, of which pg_restore writes in small parts
        with contextlib.suppress(OSError):  # beyond what the user may have
            fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, 4 * CHUNK)
    stream = asyncio.StreamReader(limit=CHUNK)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(reading, "rb", buffering=0)
    )
    return writing, stream, transport


async def _wait(process: asyncio.subprocess.Process) -> None:
    try:
        async with asyncio.timeout(TERMINATE_SECONDS):
            await process.wait()
    except TimeoutError:
        raise BackupError("pg_restore closed its output but did not end, and was killed") from None


class IncompleteScript(Exception):
    """pg_restore ended in the middle of a table; its exit code and standard error say why."""


@dataclass(frozen=True, slots=True)
class CopyHeader:
    """Of which table the rows are that follow, and of which columns."""

    table: Name
    columns: tuple[str, ...]


class Script:
    """The COPY statements of a script, with the data between them."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self._stream = stream
        self._buffer = b""

    async def next_table(self) -> CopyHeader | None:
        """Return the next table, whose `rows` must then be read; None at the end."""
        while line := await self._read_line():
            if (match := _COPY.fullmatch(line)) is not None:
                schema, name, columns = match.groups()
                names = tuple(map(_unquote, _IDENTIFIERS.findall(columns)))
                return CopyHeader((_unquote(schema), _unquote(name)), names)
        return None

    async def rows(self) -> AsyncIterator[bytes]:
        """Yield the rows of the table whose header was read, in chunks of COPY's text format."""
        is_start = True
        while True:
            if is_start and self._buffer.startswith(b"\\.\n"):
                self._buffer = self._buffer[3:]
                return
            # Searching backwards takes half the time, and nearly all chunks have no end.
            end = self._buffer.find(_END) if self._buffer.rfind(_END) >= 0 else -1
            if end >= 0:
                chunk, self._buffer = self._buffer[: end + 1], self._buffer[end + 4 :]
                yield chunk
                return
            if len(self._buffer) > 3:  # a part of the end may be there already
                chunk, self._buffer = self._buffer[:-3], self._buffer[-3:]
                is_start = False
                yield chunk
            if not await self._read_more():
                raise IncompleteScript

    async def sequences(self) -> AsyncIterator[tuple[Name, SequenceState]]:
        """Yield the states of sequences until the end."""
        while line := await self._read_line():
            if (match := _SET_SEQUENCE.fullmatch(line)) is not None:
                name = (_unquote(match[1].replace("''", "'")), _unquote(match[2].replace("''", "'")))
                yield name, SequenceState(int(match[3]), match[4] == "true")

    async def skip(self) -> None:
        """Read to the end."""
        while await self._read_more():
            self._buffer = b""

    async def _read_line(self) -> str:
        while (end := self._buffer.find(b"\n")) < 0:
            if not await self._read_more():
                line, self._buffer = self._buffer, b""
                return line.decode(errors="replace")
        line, self._buffer = self._buffer[: end + 1], self._buffer[end + 1 :]
        return line.decode(errors="replace")

    async def _read_more(self) -> bool:
        try:
            async with asyncio.timeout(STALL_SECONDS):
                chunk = await self._stream.read(CHUNK)
        except TimeoutError:
            raise BackupError(
                f"pg_restore produced no output for {STALL_SECONDS / 60:g} minutes and was killed"
            ) from None
        self._buffer += chunk
        return bool(chunk)


def _unquote(identifier: str) -> str:
    return identifier[1:-1].replace('""', '"') if identifier.startswith('"') else identifier
