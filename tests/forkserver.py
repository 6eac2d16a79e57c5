"""Runs `python bot.py` by forking a process that has imported Guildbook already.

The imports take more than a second of processor time, and a run of the tests starts some 500 bots and commands. What is
forked is in the state of a Python that has just imported bot.py. At its end it does all that Python does but free its
memory. The tests of the README, of the tutorial and of the demo start Python themselves: an import that fails, or an
order of imports that does, shows there.

`python -m tests.forkserver` is that process: one for each worker, started at the first use, which ends with the worker.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from utils.demo.bot_process import ENTRY, environment

ROOT = ENTRY.parent
#: What bot.py imports at its start, and what cogs and commands import when they run.
MODULES = (
    "bot",
    "utils.bot.process",
    "utils.base_cog",
    "utils.documents",
    "utils.repositories",
    "utils.operations.backup.restore.restore",
    "utils.operations.importing.exporting",
    "utils.operations.importing.importer",
    "utils.operations.migrations.environment",
    "utils.operations.upkeep.maintain",
    "utils.operations.upkeep.picture",
    "sqlglot.dialects.postgres",
)
#: Bytes of the number that says how long a request is.
_LENGTH = 8


class BotCommand:
    """A running `python bot.py`: what tests use of `asyncio.subprocess.Process`."""

    def __init__(self, pid: int, stdout: asyncio.StreamReader, stderr: asyncio.StreamReader) -> None:
        self.pid: int = pid
        #: None until it has exited; the negative number of a signal that ended it.
        self.returncode: int | None = None
        self.stdout: asyncio.StreamReader = stdout
        #: Nothing if it goes to `stdout`.
        self.stderr: asyncio.StreamReader = stderr
        self._exited: asyncio.Task[int]

    async def wait(self) -> int:
        """Wait until it exits, and return its exit code."""
        return await asyncio.shield(self._exited)

    async def communicate(self) -> tuple[bytes, bytes]:
        """Return what it writes to stdout and to stderr until it exits."""
        output, errors, _ = await asyncio.gather(self.stdout.read(), self.stderr.read(), self.wait())
        return output, errors

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal. Raises `ProcessLookupError` if it has exited."""
        if self.returncode is not None:
            raise ProcessLookupError
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL. Raises `ProcessLookupError` if it has exited."""
        self.send_signal(signal.SIGKILL)

    async def _watch(self, status: asyncio.StreamReader) -> int:
        self.returncode = int(await status.readline())
        return self.returncode


async def start_bot(
    directory: Path,
    *arguments: str,
    settings: Mapping[str, str],
    module: str = "bot",
    is_merged: bool = True,
    has_reader: bool = True,
    stdout_to: int | None = None,
) -> BotCommand:
    """Start `python bot.py`, or another module, with arguments in a directory and in a session of its own.

    It gets only the given settings from its environment. `is_merged` sends its stderr to its stdout, whose other end is
    closed from the start if not `has_reader`. `stdout_to` is a file that it gets as its stdout instead of a pipe.
    """
    stdout, stdout_end = os.pipe()
    stderr, stderr_end = os.pipe()
    status, status_end = os.pipe()
    request = {
        "module": module,
        "arguments": arguments,
        "directory": str(directory),
        "environment": environment(**settings),
    }
    try:
        output = stdout_end if stdout_to is None else stdout_to
        _server().send(request, [status_end, output, output if is_merged else stderr_end])
    finally:
        for end in (stdout_end, stderr_end, status_end):
            os.close(end)
        if not has_reader:
            os.close(stdout)
            stdout, unused = os.pipe()
            os.close(unused)
    readers = [await _reader(end) for end in (status, stdout, stderr)]
    bot = BotCommand(int(await readers[0].readline()), readers[1], readers[2])
    bot._exited = asyncio.create_task(bot._watch(readers[0]))
    return bot


async def _reader(end: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    file = os.fdopen(end, "rb", buffering=0)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
    return reader


class _ForkServer:
    """The process that forks, seen from the worker."""

    def __init__(self) -> None:
        self._control, other = socket.socketpair()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(other.fileno())], cwd=ROOT, pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        atexit.register(self._stop)

    def send(self, request: dict[str, Any], files: list[int]) -> None:
        """Have a process forked, with these descriptors: for its pid and exit code, its stdout, its stderr."""
        body = json.dumps(request).encode()
        socket.send_fds(self._control, [f"{len(body):{_LENGTH}}".encode()], files)
        self._control.sendall(body)

    def _stop(self) -> None:
        self._control.close()
        self._process.wait(10)


_servers: list[_ForkServer] = []


def _server() -> _ForkServer:
    if not _servers:
        _servers.append(_ForkServer())
    return _servers[0]


# --- the process that forks


def serve(control: socket.socket) -> str:
    """Fork a process for each request, and return in it what it runs; exit when the worker has closed the socket."""
    for module in MODULES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        header, files, _, _ = socket.recv_fds(control, _LENGTH, 3)
        if not header:
            sys.exit()
        request = json.loads(_read(control, int(header)))
        # Twice, so that somebody waits for each: the worker cannot, because it is not the parent.
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            pid = os.fork()
            if pid == 0:
                _become(request, *files)
                return str(request["module"])
            for file in files[1:]:
                os.close(file)
            os.write(files[0], b"%d\n" % pid)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.write(files[0], b"%d\n" % code)
            os._exit(0)
        for file in files:
            os.close(file)


def _read(control: socket.socket, length: int) -> bytes:
    body = b""
    while len(body) < length:
        body += control.recv(length - len(body))
    return body


def _become(request: dict[str, Any], status: int, stdout: int, stderr: int) -> None:
    """Turn this process into the one of a request."""
    os.setsid()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for file in {status, stdout, stderr}:
        os.close(file)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = [str(ENTRY), *request["arguments"]]
    sys.path[0] = str(ROOT)


def _run(module: str) -> NoReturn:
    """Run a module as `python -m` does, and exit without freeing the memory of every module.

    That memory is shared with the parent until it is written to. Freeing it took most of the time of a short command.
    """
    code = 0
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as exc:
        if isinstance(exc.code, str):
            print(exc.code, file=sys.stderr)
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException as exc:
        sys.excepthook(type(exc), exc, exc.__traceback__)
        code = 1
    # What Python does first when it ends, in its order.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if not stream.closed:
                stream.flush()
        except OSError:
            code = code or 120
    os._exit(code)


if __name__ == "__main__":
    _run(serve(socket.socket(fileno=int(sys.argv[1]))))
