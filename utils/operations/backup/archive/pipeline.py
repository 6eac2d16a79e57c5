"""Runs programs as a pipe into a file: in threads, with checksums, in bounded memory, killed when cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from utils.exceptions import BackupError
from utils.files import create_private
from utils.operations.action import Progress, Step, ignore_progress

#: Bytes copied at a time.
CHUNK = 1 << 20
#: Seconds between two progress reports.
PROGRESS_SECONDS = 0.25
#: Seconds without output after which the programs are killed: pg_dump may wait for a lock, or for a large index.
STALL_SECONDS = 3_600.0
ROOT = Path(__file__).resolve().parents[4]


@dataclass(slots=True)
class Digest:
    """Size in bytes and SHA-256 (hexadecimal) of a file or stream; the checksum is empty until its end."""

    size: int = 0
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Command:
    """A program to run."""

    arguments: Sequence[str]
    environment: Mapping[str, str]

    @property
    def name(self) -> str:
        """Its name in error messages."""
        module = "utils.operations.backup.archive.encryption"
        return "age" if module in self.arguments else Path(self.arguments[0]).name


async def run(
    commands: Sequence[Command],
    out: Path,
    *,
    source: Path | None = None,
    copy: Path | None = None,
    progress: Progress = ignore_progress,
    what: str = "dumping",
) -> list[Digest]:
    """Run commands as a pipe into a new file, which is synced to disk.

    `source` is the first command's standard input (None: nothing); `copy` also receives the first command's output.
    Returns the digest of each command's output; the last one is that of the file. Raises `BackupError` with the end of
    a failed command's standard error. All of them are killed when the caller is cancelled.
    """
    pipe = _Pipe(commands, out, source, copy)
    working = asyncio.ensure_future(asyncio.to_thread(pipe.run))
    try:
        last_size, idle = -1, 0.0
        while not (await asyncio.wait({working}, timeout=PROGRESS_SECONDS))[0]:
            size = pipe.digests[-1].size
            idle = idle + PROGRESS_SECONDS if size == last_size else 0.0
            last_size = size
            progress(Step(what, size, None, "bytes"))
            if idle > STALL_SECONDS:
                raise BackupError(
                    f"{commands[0].name} produced no output for {STALL_SECONDS / 60:g} minutes and was killed"
                )
        return working.result()
    except OSError as exc:
        raise BackupError(f"{out.parent} cannot be written to: {exc.strerror or exc}") from exc
    finally:
        pipe.kill()
        with contextlib.suppress(BaseException):
            await asyncio.shield(working)


def file_digest(path: Path, *, deadline: float | None = None) -> Digest:
    """Return size and SHA-256 of a file. Blocks while it reads all of it; raises `OSError`.

    deadline: on the monotonic clock; `TimeoutError` is raised when it has passed.
    """
    digest, sha256, buffer = Digest(), hashlib.sha256(), memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            sha256.update(buffer[:count])
            digest.size += count
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"{path} could not be read in time")
    digest.sha256 = sha256.hexdigest()
    return digest


class _Pipe:
    """The processes of one pipe and the threads that copy between them."""

    def __init__(self, commands: Sequence[Command], out: Path, source: Path | None, copy: Path | None) -> None:
        self._commands = commands
        self._out = out
        self._source = source
        self._copy_path = copy
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._is_killed = False
        self._errors: list[BaseException] = []
        self.digests = [Digest() for _ in commands]

    def kill(self) -> None:
        """Kill the processes that are still running; the threads then reach the end of their streams."""
        with self._lock:
            self._is_killed = True
            for process in self._processes:
                if process.poll() is None:
                    process.kill()

    def run(self) -> list[Digest]:
        """Start the processes, copy until all have ended, and return the digests. Blocks."""
        with contextlib.ExitStack() as stack:
            stderrs = [stack.enter_context(tempfile.TemporaryFile()) for _ in self._commands]
            stdin = stack.enter_context(self._source.open("rb")) if self._source else None
            for number, command in enumerate(self._commands):
                self._start(command, stdin if number == 0 else None, is_first=number == 0, stderr=stderrs[number])
            copy = stack.enter_context(_open_private(self._copy_path)) if self._copy_path else None
            threads = [
                threading.Thread(target=self._forward, args=(number, copy if number == 0 else None), daemon=True)
                for number in range(len(self._processes) - 1)
            ]
            for thread in threads:
                thread.start()
            with _open_private(self._out) as out:
                try:
                    self._copy(self._processes[-1].stdout, out, self.digests[-1], copy if not threads else None)
                    _sync(out)
                finally:
                    # If the last process failed, the ones before it would notice only at their next write.
                    if self._errors or self._is_killed or self._processes[-1].wait():
                        self.kill()
                    for thread in threads:
                        thread.join()
                    codes = [process.wait() for process in self._processes]
            if copy is not None:
                _sync(copy)
            self._raise_on_failure(codes, stderrs)
        return self.digests

    def _start(self, command: Command, source: IO[bytes] | None, *, is_first: bool, stderr: IO[bytes]) -> None:
        with self._lock:
            if self._is_killed:
                raise BackupError("cancelled")
            stdin = (source or subprocess.DEVNULL) if is_first else subprocess.PIPE
            try:
                process = subprocess.Popen(
                    command.arguments, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, bufsize=0, cwd=ROOT,
                    env=dict(command.environment), start_new_session=True,
                )  # fmt: skip
            except OSError as exc:
                for other in self._processes:
                    other.kill()
                    other.wait()
                raise BackupError(f"{command.name} cannot be run: {exc.strerror}") from exc
            self._processes.append(process)

    def _forward(self, number: int, copy: IO[bytes] | None) -> None:
        """Copy the output of one process to the next."""
        stdin = self._processes[number + 1].stdin
        assert stdin is not None
        try:
            with stdin:
                self._copy(self._processes[number].stdout, stdin, self.digests[number], copy)
        except BrokenPipeError:
            pass  # the next process ended: its standard error says why
        except BaseException as exc:
            self._errors.append(exc)
            self.kill()

    def _copy(self, source: IO[bytes] | None, out: IO[bytes], digest: Digest, copy: IO[bytes] | None) -> None:
        assert source is not None
        sha256, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
        with source:
            while count := source.readinto(buffer):  # type: ignore[attr-defined]
                chunk = buffer[:count]
                sha256.update(chunk)
                _write(out, chunk)
                if copy is not None:
                    _write(copy, chunk)
                digest.size += count
        digest.sha256 = sha256.hexdigest()

    def _raise_on_failure(self, codes: list[int], stderrs: Sequence[IO[bytes]]) -> None:
        if self._errors:
            raise self._errors[0]
        for command, code, stderr in reversed(list(zip(self._commands, codes, stderrs, strict=True))):
            if code:
                stderr.seek(0)
                lines = stderr.read().decode(errors="replace").strip().splitlines()
                message = " ".join(line.removeprefix(f"{command.name}: ") for line in lines[-3:])
                raise BackupError(f"{command.name} failed: {message or f'exit code {code}'}")


def _open_private(path: Path) -> IO[bytes]:
    return os.fdopen(create_private(path), "wb", buffering=0)


def _write(out: IO[bytes], chunk: memoryview) -> None:
    while chunk:
        chunk = chunk[out.write(chunk) :]


def _sync(out: IO[bytes]) -> None:
    out.flush()
    os.fsync(out.fileno())
