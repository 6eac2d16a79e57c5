"""Every public error, in one hierarchy, and the boundary that translates driver errors into it."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable, Iterable, Iterator, Sequence

import asyncpg


class GuildbookError(Exception):
    """The base of every error that Guildbook raises. The message says what was wrong, the value seen and what to do."""


class SettingsError(GuildbookError):
    """Settings are missing or invalid. The message has one line for each."""

    def __init__(self, message: str, *, variables: Sequence[str] = ()) -> None:
        super().__init__(message)
        #: The variables that are missing or invalid; empty when it is not about variables.
        self.variables: tuple[str, ...] = tuple(variables)


class DatabaseError(GuildbookError):
    """The database refused a statement, or is in a state that does not allow it."""

    def __init__(self, message: str, *, sqlstate: str | None = None) -> None:
        super().__init__(message)
        #: PostgreSQL's error code (PostgreSQL manual, appendix A); None if the error did not come from the server.
        self.sqlstate: str | None = sqlstate


class ValidationError(DatabaseError):
    """A value cannot be stored: it has the wrong type, is out of range, or names something that does not exist."""


class DatabaseUnavailable(DatabaseError):
    """The database cannot be reached or cannot work right now. The same call may succeed later."""


class TransactionConflict(DatabaseUnavailable):
    """Transactions deadlocked or could not be serialized, and this one was rolled back.

    The whole transaction, run again, may succeed: `db.run(function)` does that.
    """


class CommitUnknown(DatabaseUnavailable):
    """The server did not confirm a commit: what it was about may or may not have been saved. Not retried."""


class CommandTimedOut(DatabaseError):
    """A command took longer than it may and was given up. Nothing of it is committed afterwards."""


class LeaseLost(DatabaseError):
    """This process does not hold the lease any more and must not write: the message says who took or revoked it."""


class MigrationError(DatabaseError):
    """The schema could not be migrated to the requested revision."""


class UnknownRevision(MigrationError, ValidationError):
    """There is no such revision, or it is in the other direction."""


class NotFound(DatabaseError):
    """There is no such row, or it has a tombstone."""


class Conflict(DatabaseError):
    """A row violates a constraint: its key is taken, or a value is missing or not allowed."""

    def __init__(self, message: str, *, sqlstate: str | None = None, constraint: str | None = None) -> None:
        super().__init__(message, sqlstate=sqlstate)
        #: The name of the constraint; None for NOT NULL, which has no name.
        self.constraint: str | None = constraint


class DocumentError(DatabaseError):
    """A document does not exist, does not fit its model, or cannot be stored."""


class DocumentConflict(DocumentError):
    """Another writer changed the document first. Nothing was written."""


class SyncError(GuildbookError):
    """A reconcile could not be completed. Nothing was tombstoned."""


class SpoolError(GuildbookError):
    """The journal on disk cannot be used: no space, no permission, or another process holds it."""


class BackupError(GuildbookError):
    """A backup could not be made, verified or restored."""


class UploadFailed(BackupError):
    """A backup is complete locally, and the remote store does not have it yet."""

    def __init__(self, message: str, *, backup: str) -> None:
        super().__init__(message)
        #: Its id.
        self.backup: str = backup


class NothingToBackUp(BackupError):
    """The database has no rows, and a scheduled backup of it could only replace better ones."""


class UnknownBackup(BackupError, ValidationError):
    """There is no such backup, directory of backups, or table to back up."""


class WrongStore(BackupError, SettingsError):
    """BACKUP_URL is not the address of a store, or is not set although one is needed."""


class ClientToolsMissing(BackupError):
    """There is no pg_dump and pg_restore of the server's major version on this machine."""

    def __init__(self, major: int, found: Sequence[str] = ()) -> None:
        #: What is wrong, and what to do about it.
        self.problem: str = (
            f"the server is PostgreSQL {major}, and no pg_dump {major} was found"
            f" (found {', '.join(found) or 'none at all'})"
        )
        self.advice: str = (
            f"install the package postgresql-client-{major} (on Debian, from apt.postgresql.org) or its equivalent, or"
            " add its directory to PATH"
        )
        super().__init__(f"{self.problem}: {self.advice}")


class ForbiddenHere(BackupError):
    """The database user may not create a schema or, for the whole database, a second database."""


class CogError(GuildbookError):
    """A cog could not be loaded or unloaded. The message is one line."""


class Declined(GuildbookError):
    """A cog declines a request. Raised by a command, its message is the answer that the user gets."""


class NotConfirmed(GuildbookError):
    """The user cancelled the question, or did not answer in time. Nothing was done."""


#: What asyncpg, the socket and the clock raise about a connection or a statement.
DRIVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)


class translate_errors:
    """A context manager that turns driver, socket and timeout errors in its block into errors of this module.

    The new error is a `DatabaseError`, or a `DatabaseUnavailable` if the same call may succeed later. The original is
    its `__cause__`. Errors of this module, and errors that have nothing to do with the database, pass unchanged.
    The block may contain `await`.
    """

    __slots__ = ("_error", "_files", "_was_connected", "_what")

    def __init__(
        self,
        what: str | None = None,
        *,
        error: Callable[[str], GuildbookError] | None = None,
        files: bool = True,
        was_connected: bool = False,
    ) -> None:
        """
        what: what was being done, put before the message as "what: message". None: the message alone.
        error: raise this class instead; it also replaces a `DatabaseError` raised in the block.
        files: False lets OSErrors that are not about a connection pass: for blocks that run the caller's code.
        was_connected: see `translate`.
        """
        self._what = what
        self._error = error
        self._files = files
        self._was_connected = was_connected

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: object) -> None:
        if not isinstance(exc, Exception):
            return
        if isinstance(exc, GuildbookError) and not (self._error is not None and isinstance(exc, DatabaseError)):
            return
        translated = self.translated(exc)
        if translated is not exc:
            raise translated from exc

    def translated(self, exc: Exception) -> Exception:
        """Return what a block that raises `exc` raises."""
        if not self._files:
            cause = driver_error(exc)
            if isinstance(cause, OSError) and not isinstance(cause, ConnectionError | TimeoutError):
                return exc
        error = translate(exc, was_connected=self._was_connected)
        if error is None:
            return exc
        message = str(error) if self._what is None else f"{self._what}: {error}"
        if self._error is not None:
            return self._error(message)
        if self._what is None or not isinstance(error, DatabaseError):
            return error
        return type(error)(message, sqlstate=error.sqlstate)


def translate(exc: BaseException, *, was_connected: bool = False) -> GuildbookError | None:
    """Return the error of this module for one of asyncpg, the socket or the clock; None when `exc` is none of them.

    An error of this module is returned as it is. `was_connected`: the database existed before, so one that does not
    exist is being replaced by a restore, and the error is transient.
    """
    if isinstance(exc, GuildbookError):
        return exc
    cause = driver_error(exc)
    if cause is None:
        return None
    kind = DatabaseUnavailable if is_transient(cause) else DatabaseError
    if isinstance(cause, asyncpg.PostgresError):
        state = getattr(cause, "sqlstate", None)
        if state in CONFLICTS:
            kind = TransactionConflict
        if state == "3D000" and was_connected:
            return DatabaseUnavailable("the database does not exist: a restore may be replacing it", sqlstate=state)
        if state == "55000" and was_connected:  # ALTER DATABASE ... ALLOW_CONNECTIONS false
            return DatabaseUnavailable("the database accepts no connections at the moment", sqlstate=state)
        advice = _advice(state, str(cause))
        return kind(f"{_first_line(cause)} [{state}]" + (f": {advice}" if advice else ""), sqlstate=state)
    if isinstance(cause, TimeoutError):
        return kind("the database did not answer in time: it is overloaded, locked or unreachable")
    if isinstance(cause, OSError):
        reason = cause.strerror or str(cause) or type(cause).__name__
        if _NO_TLS in reason:
            reason = "the server has no TLS, but sslmode requires it (sslmode=disable or prefer connects without)"
        return kind(f"no connection to the database: {reason}")
    return kind(_first_line(cause))


def expect_tables(names: Iterable[str]) -> None:
    """Set the tables that are known to exist, as the server names them: one that is missing then has been lost.

    Of a running bot, which has made or found them. Replaces those that were set before.
    """
    global _expected  # noqa: PLW0603 - errors are translated everywhere
    _expected = frozenset(names)


def _advice(state: str | None, message: str) -> str | None:
    if state in MISSING_TABLE and any(name in _expected for name in _QUOTED.findall(message)):
        return _LOST_TABLE
    return _TRANSIENT_STATES.get(state or "") or _ADVICE.get(state or "")


def is_transient(exc: BaseException) -> bool:
    """Return whether the same call may succeed later: refused, reset, starting, overloaded, deadlocked, timed out."""
    if isinstance(exc, DatabaseUnavailable):
        return not isinstance(exc, CommitUnknown)
    cause = driver_error(exc)
    if isinstance(cause, asyncpg.PostgresError):
        state = getattr(cause, "sqlstate", None) or ""
        return state in _TRANSIENT_STATES or state.startswith("08")
    if isinstance(cause, asyncpg.InterfaceError):
        return any(phrase in str(cause) for phrase in _CLOSED_PHRASES)
    if isinstance(cause, asyncpg.InternalClientError):
        return _DYING_PHRASE in str(cause)
    if isinstance(cause, PermissionError | ssl.SSLCertVerificationError) or _NO_TLS in str(cause):
        return False
    return isinstance(cause, OSError | TimeoutError | asyncio.IncompleteReadError)


def is_conflict(exc: BaseException) -> bool:
    """Return whether a transaction failed only because of another one: run again as a whole, it may succeed."""
    if isinstance(exc, GuildbookError):
        return isinstance(exc, TransactionConflict)
    return getattr(driver_error(exc), "sqlstate", None) in CONFLICTS


def was_rejected(exc: BaseException) -> bool:
    """Return whether the server refused a statement, which then changed nothing."""
    cause = driver_error(exc)
    return isinstance(cause, asyncpg.PostgresError) and not isinstance(
        cause, asyncpg.PostgresConnectionError | asyncpg.OperatorInterventionError
    )


def driver_error(exc: BaseException) -> BaseException | None:
    """Return the error of asyncpg, the socket or the clock that `exc` is or wraps; None when there is none."""
    return next((cause for cause in _causes(exc) if isinstance(cause, DRIVER_ERRORS)), None)


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it wraps: SQLAlchemy's `orig`, then `raise … from`."""
    seen: set[int] = set()
    current: BaseException | None = exc
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        wrapped = getattr(current, "orig", None)
        current = wrapped if isinstance(wrapped, BaseException) else current.__cause__


def _first_line(exc: BaseException) -> str:
    return str(exc).splitlines()[0] if str(exc) else type(exc).__name__


#: SQLSTATEs of transactions to be run again as a whole: serialization failure, deadlock.
CONFLICTS = ("40001", "40P01")
#: SQLSTATEs after which the same statement may succeed (PostgreSQL manual, appendix A), and an explanation.
_TRANSIENT_STATES: dict[str, str] = {
    "25006": "the server is read-only at the moment (a standby, or a failover in progress)",
    "25P03": "the server ended a transaction that was idle for too long",
    "40001": "two transactions conflicted (serialization failure): run it again as a whole, as db.run does",
    "40P01": "two transactions waited for each other (deadlock): lock rows in the order of their keys, use db.run",
    "53300": "the server has no free connection: lower DB_POOL_MAX or raise its max_connections",
    "55P03": "a lock was not available in time",
    "57014": "the statement was cancelled, usually because it took too long",
    "57P01": "the server is shutting down",
    "57P02": "the server is restarting after a crash",
    "57P03": "the server is still starting",
    "57P05": "the server ended a connection that was idle for too long",
}
#: SQLSTATEs of a missing table: undefined table, invalid schema name (PostgreSQL manual, appendix A).
MISSING_TABLE = ("42P01", "3F000")
_ADVICE: dict[str, str] = {
    "28000": "the server refused the login: check user and sslmode of the database URL",
    "28P01": "the password is wrong: check the database URL",
    "3D000": "the database does not exist: create it, or correct the name in the database URL",
    "42501": "the database user lacks this privilege: grant it, or use the database's owner",
    "42P01": "a table is missing: run the migrations (AUTO_MIGRATE=true, or python bot.py db upgrade)",
    "53100": "the server's disk is full: free some space",
    "53200": "the server is out of memory",
}
#: A name in a message of the server's.
_QUOTED = re.compile(r"[\"\u00ab\u201e\u201c]([^\"\u00bb\u201c\u201d]+)[\"\u00bb\u201c\u201d]")
#: The tables, and the schemas of tables, that are known to exist.
_expected: frozenset[str] = frozenset()
_LOST_TABLE = (
    "the table was there before, so the database was dropped, recreated or restored. If a backup of it is known, the"
    " bot waits for an operator: python bot.py backup restore, or python bot.py db begin-anew"
)
# asyncpg has no type or code for the following conditions, only these texts.
#: InternalClientError: the connection ended while a statement was being sent.
_DYING_PHRASE = "cannot switch to state"
#: InterfaceError: the connection or pool is closed.
_CLOSED_PHRASES = ("connection is closed", "pool is clos", "connection has been released", "connection was closed")
#: ConnectionError: TLS was required and the server has none, so a retry is pointless.
_NO_TLS = "rejected SSL upgrade"
