"""The one hierarchy of errors, and the one boundary that turns a driver's errors into it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator

import asyncpg


class GuildbookError(Exception):
    """Everything that Guildbook raises on purpose: the message says what was wrong, the value seen and what to do."""


class SettingsError(GuildbookError):
    """A setting is missing or wrong; one line for each."""


class ValidationError(GuildbookError):
    """A value that came from outside does not fit."""


class SyncError(GuildbookError):
    """A reconcile could not be completed; nothing was tombstoned."""


class DatabaseError(GuildbookError):
    """The database refused a statement, or could not be used as it is."""

    def __init__(self, message: str, *, sqlstate: str | None = None) -> None:
        super().__init__(message)
        #: PostgreSQL's error code (PostgreSQL manual, appendix A); None when the error did not come from the server.
        self.sqlstate: str | None = sqlstate


class DatabaseUnavailable(DatabaseError):
    """The database cannot be reached or cannot work right now: the same call may succeed later."""


class LeaseLost(DatabaseError):
    """Another process acts for the bot now: this one may write nothing more."""


class SpoolError(GuildbookError):
    """The journal on disk cannot be used: no room, no right, or another process has it."""


class MigrationError(DatabaseError):
    """The schema could not be brought to the revision that was asked for."""


class DocumentError(GuildbookError):
    """A document is not there, does not fit its model, or cannot be stored."""


class DocumentConflict(DocumentError):
    """Somebody else changed a document first; nothing was written."""


class BackupError(GuildbookError):
    """A backup could not be made, or could not be restored."""


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
