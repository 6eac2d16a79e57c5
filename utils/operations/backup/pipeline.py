"""Bytes from programs and files through checksums into files: in threads, bounded in memory, ended when called off."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from utils.exceptions import BackupError
from utils.operations.action import Progress, Step, ignore_progress

#: Bytes in hand at a time.
CHUNK = 1 << 20
#: Seconds between two words of how far it has come.
TELL_SECONDS = 0.25
#: Seconds without a byte after which a program is given up: pg_dump may have to wait for a lock, and for large indexes.
SILENT_SECONDS = 3_600.0
ROOT = Path(__file__).resolve().parents[3]


@dataclass(slots=True)
class Passed:
    """What went through one place."""

    size: int = 0
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Command:
    """A program to be run."""

    arguments: Sequence[str]
    environment: Mapping[str, str]

    @property
    def name(self) -> str:
        """What it is called, for people."""
        module = "utils.operations.backup.encryption"
        return "age" if module in self.arguments else Path(self.arguments[0]).name


async def run(
    commands: Sequence[Command],
    out: Path,
    *,
    source: Path | None = None,
    copy: Path | None = None,
    progress: Progress = ignore_progress,
    what: str = "dumping",
) -> list[Passed]:
    """Run programs as a pipe from `source` (None: the first one makes it all up) into a new file, made durable.

    Returns what came out of each program, the last one's being the file. `copy`: where the first one's output goes as
    well. Raises `BackupError` with a program's last words when it fails. Called off, all of them are killed.
    """
    pipe = _Pipe(commands, out, source, copy)
    working = asyncio.ensure_future(asyncio.to_thread(pipe.work))
    try:
        seen, quiet = -1, 0.0
        while not (await asyncio.wait({working}, timeout=TELL_SECONDS))[0]:
            passed = pipe.passed[-1].size
            quiet = quiet + TELL_SECONDS if passed == seen else 0.0
            seen = passed
            progress(Step(what, passed, None, "bytes"))
            if quiet > SILENT_SECONDS:
                raise BackupError(f"{commands[0].name} gave nothing for {SILENT_SECONDS / 60:g} minutes and was ended")
        return working.result()
    except OSError as exc:
        raise BackupError(f"{out.parent} takes no more: {exc.strerror or exc}") from exc
    finally:
        pipe.kill()
        with contextlib.suppress(BaseException):
            await asyncio.shield(working)


class _Pipe:
    """The programs of one pipe and the threads between them."""

    def __init__(self, commands: Sequence[Command], out: Path, source: Path | None, copy: Path | None) -> None:
        self._commands = commands
        self._out = out
        self._source = source
        self._copy = copy
        self._running: list[subprocess.Popen[bytes]] = []
        self._guard = threading.Lock()
        self._is_killed = False
        self._errors: list[BaseException] = []
        self.passed = [Passed() for _ in commands]

    def kill(self) -> None:
        """End what still runs; the threads then come to the end of their pipes."""
        with self._guard:
            self._is_killed = True
            for process in self._running:
                if process.poll() is None:
                    process.kill()

    def work(self) -> list[Passed]:
        with contextlib.ExitStack() as stack:
            words = [stack.enter_context(tempfile.TemporaryFile()) for _ in self._commands]
            entry = stack.enter_context(self._source.open("rb")) if self._source else None
            for number, command in enumerate(self._commands):
                self._start(command, entry if number == 0 else None, is_first=number == 0, words=words[number])
            copy = stack.enter_context(_made(self._copy)) if self._copy else None
            threads = [
                threading.Thread(target=self._between, args=(number, copy if number == 0 else None), daemon=True)
                for number in range(len(self._running) - 1)
            ]
            for thread in threads:
                thread.start()
            with _made(self._out) as out:
                try:
                    self._pump(self._running[-1].stdout, out, self.passed[-1], copy if not threads else None)
                    _force(out)
                finally:
                    # When the last one failed, those before it work for nobody, and would only notice with a next byte.
                    if self._errors or self._is_killed or self._running[-1].wait():
                        self.kill()
                    for thread in threads:
                        thread.join()
                    codes = [process.wait() for process in self._running]
            if copy is not None:
                _force(copy)
            self._judge(codes, words)
        return self.passed

    def _start(self, command: Command, entry: IO[bytes] | None, *, is_first: bool, words: IO[bytes]) -> None:
        with self._guard:
            if self._is_killed:
                raise BackupError("it was called off")
            stdin = (entry or subprocess.DEVNULL) if is_first else subprocess.PIPE
            try:
                process = subprocess.Popen(
                    command.arguments, stdin=stdin, stdout=subprocess.PIPE, stderr=words, bufsize=0, cwd=ROOT,
                    env=dict(command.environment), start_new_session=True,
                )  # fmt: skip
            except OSError as exc:
                for other in self._running:
                    other.kill()
                    other.wait()
                raise BackupError(f"{command.name} cannot be run: {exc.strerror}") from exc
            self._running.append(process)

    def _between(self, number: int, copy: IO[bytes] | None) -> None:
        """Carry one program's output to the next one."""
        entry = self._running[number + 1].stdin
        assert entry is not None
        try:
            with entry:
                self._pump(self._running[number].stdout, entry, self.passed[number], copy)
        except BrokenPipeError:
            pass  # the next one ended: its words say why
        except BaseException as exc:
            self._errors.append(exc)
            self.kill()

    def _pump(self, source: IO[bytes] | None, out: IO[bytes], passed: Passed, copy: IO[bytes] | None) -> None:
        assert source is not None
        digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
        with source:
            while count := source.readinto(buffer):  # type: ignore[attr-defined]
                part = buffer[:count]
                digest.update(part)
                _write(out, part)
                if copy is not None:
                    _write(copy, part)
                passed.size += count
        passed.sha256 = digest.hexdigest()

    def _judge(self, codes: list[int], words: Sequence[IO[bytes]]) -> None:
        if self._errors:
            raise self._errors[0]
        for command, code, said in reversed(list(zip(self._commands, codes, words, strict=True))):
            if code:
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines()
                told = " ".join(line.removeprefix(f"{command.name}: ") for line in lines[-3:])
                raise BackupError(f"{command.name} failed: {told or f'exit code {code}'}")


def _made(path: Path) -> IO[bytes]:
    """Open a new file that only we can read."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0)


def _write(out: IO[bytes], part: memoryview) -> None:
    while part:
        part = part[out.write(part) :]


def _force(out: IO[bytes]) -> None:
    out.flush()
    os.fsync(out.fileno())


def checksum(path: Path) -> Passed:
    """Return size and SHA-256 of a file; takes a second for each gigabyte or two."""
    passed, digest, buffer = Passed(), hashlib.sha256(), memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            passed.size += count
    passed.sha256 = digest.hexdigest()
    return passed
