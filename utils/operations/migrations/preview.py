"""The SQL of an upgrade or a downgrade as a file to read first, with a remark above each statement that may hurt.

What a statement locks, scans or rewrites is as PostgreSQL's manual has it: 13.3 Explicit Locking, and the notes of
ALTER TABLE, CREATE INDEX and CREATE TABLE. The file is what the migration runs, and psql runs it too::

    psql --set ON_ERROR_STOP=1 --file upgrade-0002-0004.sql
"""

from __future__ import annotations

import asyncio
from collections import Counter

from utils.database import ConnectTarget, Pool
from utils.exceptions import MigrationError
from utils.operations import migrations
from utils.operations.action import Outcome, Progress, Step, ignore_progress
from utils.operations.migrations import switch
from utils.operations.migrations.statements import Statement, read

#: Statements that are named in the outcome's text; the file has all.
NAMED = 20
_HEAD = """\
-- Guildbook: {what}.
-- Above each statement stands what it does to others:
--   drops          what is in it is gone            rewrites       the table is written anew, nobody reads or writes
--   scans          every row is read under a lock   blocks writes  writers wait until it is done, readers do not
--   locks          nobody reads or writes, shortly  changes rows   writers of the same rows wait
--   lets be        others go on                     unknown        look at it yourself
-- Run it while no bot acts on the database: psql --set ON_ERROR_STOP=1 --file this
"""


async def preview(
    where: Pool | ConnectTarget,
    revision: str | None = None,
    *,
    down: bool = False,
    progress: Progress = ignore_progress,
) -> Outcome:
    """Return the SQL from where the database is to a revision, as the outcome's file; nothing is run.

    `revision`: None is the newest one, and for `down` the one before. Raises `MigrationError` for one that is not on
    the way there.
    """
    progress(Step("writing the SQL", unit="statements"))
    at = await migrations.current(where)
    goal = aim(at, revision, down=down)
    what = f"{'downgrade' if down else 'upgrade'} from {at or 'base'} to {goal}"
    if goal == (at or "base"):
        return Outcome(f"the database is at {goal} already: there is nothing to run", data=_data(at, goal, []))
    sql, statements = await asyncio.to_thread(_written, what, at or "base", goal, down)
    marks = Counter(remark.kind for statement in statements for remark in statement.remarks)
    counts = ", ".join(f"{kind}: {count}" for kind, count in marks.most_common() if kind != "lets be")
    lines = [f"{what}: {len(statements)} statements" + (f" ({counts})" if counts else "")]
    destructive = [statement.title for statement in statements if statement.is_destructive]
    if destructive:
        lines.append("What is in these is gone afterwards:")
        lines += [f"- {title}" for title in destructive[:NAMED]]
        if len(destructive) > NAMED:
            lines.append(f"- and {len(destructive) - NAMED} more")
    name = f"{'downgrade' if down else 'upgrade'}-{at or 'base'}-{goal}.sql"
    return Outcome("\n".join(lines), data=_data(at, goal, statements), file=(name, sql))


def aim(at: str | None, revision: str | None, *, down: bool) -> str:
    """Return the revision that is meant (`base`: none): it may be where the database is, never the other way.

    Raises `MigrationError`.
    """
    order = ["base", *(known for known, _ in migrations.revisions())]
    here = at or "base"
    if here not in order:
        raise MigrationError(
            f"the database is at revision {here}, which this version does not know: it was migrated by a newer"
            " Guildbook. Run that version, or restore a backup"
        )
    place = order.index(here)
    if revision is None:
        return order[max(place - 1, 0)] if down else order[-1]
    goal = order[-1] if revision in ("head", "heads") else revision
    if goal not in order:
        raise MigrationError(f"there is no revision {revision[:40]!r}: choose one of {', '.join(order)}")
    if (order.index(goal) > place) if down else (order.index(goal) < place):
        raise MigrationError(
            f"the database is at {here}, and {goal} is {'later' if down else 'earlier'}: that is"
            f" {'an upgrade' if down else 'a downgrade'}"
        )
    return goal


def _written(what: str, at: str, goal: str, down: bool) -> tuple[str, list[Statement]]:
    """Return the remarked SQL, and its statements: in a thread, reading it takes a while."""
    sql = migrations.offline_sql(f"{at}:{goal}", down=down)
    # A downgrade to base leaves this table, without a row.
    sql = sql.replace("CREATE TABLE alembic_version (", "CREATE TABLE IF NOT EXISTS alembic_version (")
    if down:
        reason = f"the schema was taken down to {goal} by hand"
        sql += f"\nCOMMENT ON TABLE alembic_version IS '{switch.PREFIX}{reason}';\n"
    elif goal == migrations.revisions()[-1][0]:
        sql += "\nCOMMENT ON TABLE alembic_version IS NULL;\n"
    pieces = read(sql)
    return _HEAD.format(what=what) + "".join(piece.remarked() for piece in pieces), [
        piece for piece in pieces if piece.remarks
    ]


def _data(at: str | None, goal: str, statements: list[Statement]) -> dict[str, object]:
    return {
        "from": at,
        "to": goal,
        "statements": [
            {"sql": statement.title, "kinds": sorted({remark.kind for remark in statement.remarks})}
            for statement in statements
        ],
        "destructive": [statement.title for statement in statements if statement.is_destructive],
    }
