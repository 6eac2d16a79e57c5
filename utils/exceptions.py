"""Every public error, in one hierarchy, and the boundary that translates driver errors into it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator

import asyncpg


class GuildbookError(Exception):
    """The base of every error that Guildbook raises. The message says what was wrong, the value seen and what to do."""


class SettingsError(GuildbookError):
    """A setting is missing or invalid. One line for each."""


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


class LeaseLost(DatabaseError):
    """Another process holds the lease. This one must not write any more."""


class MigrationError(DatabaseError):
    """The schema could not be migrated to the requested revision."""


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


class ForbiddenHere(BackupError):
    """The server does not allow a second database."""


class CogError(GuildbookError):
    """A cog could not be loaded or unloaded. The message is one line."""


class Declined(GuildbookError):
    """A cog declines a request. Raised by a command, its message is the answer that the user gets."""


class NotConfirmed(GuildbookError):
    """The user cancelled the question, or did not answer in time. Nothing was done."""


#: SQLSTATEs after which the same statement may succeed (PostgreSQL manual, appendix A), and what they mean for people.
_TRANSIENT_STATES: dict[str, str] = {
    "25006": "the server takes no writes just now (read-only: a standby, or a failover under way)",
    "25P03": "the server ended a transaction that sat idle for too long",
    "40001": "two transactions got into each other's way (serialization failure)",
    "40P01": "two transactions waited for each other (deadlock)",
    "53300": "the server has no connection left: lower DB_POOL_MAX or raise its max_connections",
    "55P03": "a lock was not free in time",
    "57014": "the statement was cancelled, mostly because it took too long",
    "57P01": "the server is shutting down",
    "57P02": "the server is restarting after a crash",
    "57P03": "the server is still starting",
    "57P05": "the server ended a connection that sat idle for too long",
}
_ADVICE: dict[str, str] = {
    "28000": "the server refused the login: check user and sslmode of the database URL",
    "28P01": "the password is wrong: check the database URL",
    "3D000": "the database does not exist: create it, or correct the name in the database URL",
    "42501": "the database user may not do this: grant the privilege, or use the database's owner",
    "42P01": "a table is missing: run the migrations (AUTO_MIGRATE=true, or python bot.py db upgrade)",
    "53100": "the server's disk is full: free some space",
    "53200": "the server has no memory left",
}
#: What asyncpg says, as an error of its own, when a connection ends just as a statement goes out.
_DYING_PHRASE = "cannot switch to state"
#: What asyncpg says, with its general InterfaceError, about a connection or pool that is no more.
_CLOSED_PHRASES = ("connection is closed", "pool is clos", "connection has been released", "connection was closed")


#: What asyncpg says when TLS was demanded and the server has none: asking again changes nothing.
_NO_TLS = "rejected SSL upgrade"


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """Walk from an error to what it wraps: SQLAlchemy's `orig`, then `raise … from`."""
    seen: set[int] = set()
    current: BaseException | None = exc
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        wrapped = getattr(current, "orig", None)
        current = wrapped if isinstance(wrapped, BaseException) else current.__cause__


def driver_error(exc: BaseException) -> BaseException | None:
    """Return the error of asyncpg, the socket or the clock behind `exc`, or None when there is none."""
    for cause in _causes(exc):
        if isinstance(
            cause,
            asyncpg.PostgresError | asyncpg.InterfaceError | asyncpg.InternalClientError | OSError | TimeoutError,
        ):
            return cause
    return None


def is_transient(exc: BaseException) -> bool:
    """Tell whether the same call may succeed later: refused, reset, starting, overloaded, deadlocked, out of time."""
    if isinstance(exc, DatabaseUnavailable):
        return True
    cause = driver_error(exc)
    if isinstance(cause, asyncpg.PostgresError):
        state = getattr(cause, "sqlstate", None) or ""
        return state in _TRANSIENT_STATES or state.startswith("08")
    if isinstance(cause, asyncpg.InterfaceError):
        return any(phrase in str(cause) for phrase in _CLOSED_PHRASES)
    if isinstance(cause, asyncpg.InternalClientError):
        # A connection whose end came while a statement was on its way out: asyncpg takes it for its own fault.
        return _DYING_PHRASE in str(cause)
    if isinstance(cause, PermissionError | ssl.SSLCertVerificationError) or _NO_TLS in str(cause):
        return False
    return isinstance(cause, OSError | TimeoutError | asyncio.IncompleteReadError)


def translate(exc: BaseException, *, was_connected: bool = False) -> GuildbookError | None:
    """Return our own error for one of asyncpg's, the socket's or the clock's; None when `exc` is none of them.

    An error that is ours already comes back as it is. `was_connected`: the database has been there, so that one that
    does not exist is being replaced just now, by a restore that renames it.
    """
    if isinstance(exc, GuildbookError):
        return exc
    cause = driver_error(exc)
    if cause is None:
        return None
    kind = DatabaseUnavailable if is_transient(cause) else DatabaseError
    if isinstance(cause, asyncpg.PostgresError):
        state = getattr(cause, "sqlstate", None)
        if state == "3D000" and was_connected:
            return DatabaseUnavailable("the database is gone: a restore may be replacing it", sqlstate=state)
        advice = _TRANSIENT_STATES.get(state or "") or _ADVICE.get(state or "")
        told = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        return kind(f"{told} [{state}]" + (f": {advice}" if advice else ""), sqlstate=state)
    if isinstance(cause, TimeoutError):
        return kind("the database did not answer in time: it is overloaded, locked or out of reach")
    if isinstance(cause, OSError):
        reason = cause.strerror or str(cause) or type(cause).__name__
        if _NO_TLS in reason:
            reason = "the server has no TLS, and sslmode demands it (sslmode=disable or prefer does without)"
        return kind(f"no connection to the database: {reason}")
    return kind(str(cause).splitlines()[0] if str(cause) else type(cause).__name__)
