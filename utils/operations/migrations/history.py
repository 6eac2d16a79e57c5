"""The table `ops.migrations`: who applied which revision when, and whether AUTO_MIGRATE is paused.

The table exists from revision 0005 on. In a database at an older revision, a pause is a comment on the version table,
which outlives a downgrade to base, and nothing else is known.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from alembic.runtime.migration import MigrationContext, MigrationInfo
from sqlalchemy import Connection, insert, text

from models.ops import Migration
from utils.database.ownership import PAUSE_COMMENT, VERSION_TABLE
from utils.database.placement import placement_of
from utils.exceptions import MigrationError

#: The revision that creates the table.
TABLE_REVISION = "0005"
#: How the comment begins in which older revisions keep a pause. Any other comment is somebody else's.
COMMENT_PREFIX = PAUSE_COMMENT
_RECORDED = "SELECT coalesce(string_agg(version_num, ', ' ORDER BY version_num), 'base') FROM guildbook_version"
#: A database that was not migrated since has the former version table.
_COMMENT = """\
SELECT obj_description(coalesce(
    to_regclass(format('%I.guildbook_version', CAST(:main AS text))),
    to_regclass(format('%I.alembic_version', CAST(:main AS text)))
), 'pg_class')"""
_HAS_VERSION_TABLE = "SELECT to_regclass(format('%I.guildbook_version', CAST(:main AS text))) IS NOT NULL"
#: Ends a pause, if there is one.
RESUME_SQL = """\
INSERT INTO ops.migrations (revision, action, applied_by)
SELECT revision, 'resume', 'sql file' FROM ops.migrations
WHERE id = (SELECT max(id) FROM ops.migrations WHERE action IN ('pause', 'resume')) AND action = 'pause'"""


@dataclass(frozen=True, slots=True)
class Actor:
    """Who migrates."""

    kind: Literal["bot", "command line", "discord", "alembic", "sql file"]
    #: The operator's Discord account; None unless `kind` is "discord".
    user_id: int | None = None


BOT = Actor("bot")
COMMAND_LINE = Actor("command line")
ALEMBIC = Actor("alembic")
SQL_FILE = Actor("sql file")


@dataclass(frozen=True, slots=True)
class Pause:
    """AUTO_MIGRATE is paused: the bot does not migrate this database by itself."""

    reason: str
    #: None when it was recorded by a revision that has no table for it: the reason then names the time.
    since: datetime | None = None

    def __str__(self) -> str:
        return self.reason if self.since is None else f"{self.reason} on {_utc(self.since)}"


@dataclass(frozen=True, slots=True)
class AppliedRevision:
    """When a revision was last applied, and by whom."""

    at: datetime
    by: Actor
    #: None if it was not measured.
    seconds: float | None


class MigrationRecorder:
    """Records each revision in `ops.migrations`, in the revision's own transaction. Used as `on_version_apply`.

    Revisions that come before the table exists are recorded as soon as it does.
    """

    def __init__(self, by: Actor) -> None:
        self._by = by
        self._unrecorded: list[dict[str, Any]] = []
        self._step_started = time.monotonic()

    def __call__(
        self, ctx: MigrationContext, step: MigrationInfo, heads: Collection[Any], run_args: Mapping[str, Any]
    ) -> None:
        now = time.monotonic()
        seconds, self._step_started = now - self._step_started, now
        action = "stamp" if step.is_stamp else "upgrade" if step.is_upgrade else "downgrade"
        measured: dict[str, Any] = {}
        if not ctx.as_sql:
            assert ctx.connection is not None, "an online run has a connection"
            measured = {
                "at": ctx.connection.scalar(text("SELECT clock_timestamp()")),
                "seconds": None if step.is_stamp else round(seconds, 3),
            }
        for revision in step.destination_revision_ids if step.is_stamp else step.up_revision_ids:
            row = {"revision": revision, "action": action, "applied_by": self._by.kind, "user_id": self._by.user_id}
            self._unrecorded.append(row | measured)
        if _table_exists_after(ctx, step, heads):
            for row in self._unrecorded:
                ctx.impl.execute(insert(Migration).values(**row))
            self._unrecorded.clear()


def _table_exists_after(ctx: MigrationContext, step: MigrationInfo, heads: Collection[Any]) -> bool:
    if not ctx.as_sql:
        assert ctx.connection is not None, "an online run has a connection"
        return has_table(ctx.connection)
    if ctx.version_table != VERSION_TABLE:
        return True  # of a pack, which needs Guildbook's newest tables
    return any(
        revision.revision == TABLE_REVISION
        for revision in step.revision_map.iterate_revisions(tuple(heads), "base", select_for_downgrade=False)
    )


def has_table(connection: Connection) -> bool:
    """Return whether the database has `ops.migrations`."""
    return bool(connection.scalar(text("SELECT to_regclass('ops.migrations') IS NOT NULL")))


def read_applied(connection: Connection) -> dict[str, AppliedRevision]:
    """Return when each revision was last applied; revisions of which that is unknown are left out."""
    if not has_table(connection):
        return {}
    rows = connection.execute(
        text(
            "SELECT DISTINCT ON (revision) revision, action, at, applied_by, user_id, seconds FROM ops.migrations"
            " WHERE action IN ('upgrade', 'downgrade') ORDER BY revision, id DESC"
        )
    )
    return {
        row.revision: AppliedRevision(row.at, Actor(row.applied_by, row.user_id), row.seconds)
        for row in rows
        if row.action == "upgrade"
    }


def read_pause(connection: Connection) -> Pause | None:
    """Return the pause of AUTO_MIGRATE; None: the bot may migrate this database."""
    if not has_table(connection):
        comment = _read_comment(connection)
        return None if comment is None else Pause(comment)
    row = connection.execute(
        text(
            "SELECT action, at, reason FROM ops.migrations WHERE action IN ('pause', 'resume') ORDER BY id DESC LIMIT 1"
        )
    ).one_or_none()
    return Pause(row.reason, row.at) if row is not None and row.action == "pause" else None


def pause(connection: Connection, revision: str, by: Actor, *, is_table_kept: bool) -> Pause:
    """Pause AUTO_MIGRATE before a downgrade to `revision`. The caller commits.

    `is_table_kept`: whether `ops.migrations` still exists at that revision; if not, the pause is a comment too.
    Raises `MigrationError` for a database that never had a schema.
    """
    since: datetime = connection.scalar(text("SELECT now()"))
    paused = Pause(f"the schema was downgraded to {revision} by an operator", since)
    if has_table(connection):
        row = {"revision": revision, "action": "pause", "reason": paused.reason}
        connection.execute(insert(Migration).values(**row, applied_by=by.kind, user_id=by.user_id))
        if is_table_kept:
            return paused
    if not connection.scalar(text(_HAS_VERSION_TABLE), {"main": placement_of(connection).main}):
        raise MigrationError("AUTO_MIGRATE cannot be paused: this database has no schema; run python bot.py db upgrade")
    _write_comment(connection, COMMENT_PREFIX + str(paused))
    return paused


def resume(connection: Connection, by: Actor) -> None:
    """End the pause of AUTO_MIGRATE, if there is one. The caller commits."""
    if has_table(connection) and read_pause(connection) is not None:
        row = {"revision": connection.scalar(text(_RECORDED)), "action": "resume"}
        connection.execute(insert(Migration).values(**row, applied_by=by.kind, user_id=by.user_id))
    if _read_comment(connection) is not None:
        _write_comment(connection, None)


def pause_sql(revision: str, *, is_table_kept: bool) -> str:
    """Return the SQL that pauses AUTO_MIGRATE at the end of a file that downgrades to `revision`."""
    reason = f"the schema was downgraded to {revision} by hand"
    if not is_table_kept:
        return f"COMMENT ON TABLE guildbook_version IS '{COMMENT_PREFIX}{reason}'"
    columns, values = "(revision, action, reason, applied_by)", f"('{revision}', 'pause', '{reason}', 'sql file')"
    return " ".join(("INSERT INTO ops.migrations", columns, "VALUES", values))


def _read_comment(connection: Connection) -> str | None:
    comment: str | None = connection.scalar(text(_COMMENT), {"main": placement_of(connection).main})
    return comment.removeprefix(COMMENT_PREFIX) if comment is not None and comment.startswith(COMMENT_PREFIX) else None


def _write_comment(connection: Connection, comment: str | None) -> None:
    # COMMENT takes no parameters: the server quotes the text.
    statement = connection.scalar(
        text("SELECT 'COMMENT ON TABLE guildbook_version IS ' || quote_nullable(CAST(:comment AS text))"),
        {"comment": comment},
    )
    connection.exec_driver_sql(str(statement))


def _utc(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d at %H:%M} UTC"
