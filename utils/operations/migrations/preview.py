"""The SQL of an upgrade or a downgrade as a file, with a comment above each statement on what it does to other users.

The comments follow PostgreSQL's manual: 13.3 Explicit Locking, and the notes of ALTER TABLE, CREATE INDEX and CREATE
TABLE. The migration runs the same statements, and so does psql::

    psql --set ON_ERROR_STOP=1 --file upgrade-0002-0005.sql
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from sqlalchemy import Connection, text

from utils.database import ConnectTarget, Pool, ownership
from utils.database.ownership import RecordedVersion
from utils.database.placement import Placement, placement_of
from utils.database.sql import quote_identifier
from utils.operations.action import Outcome, Progress, Step, ignore_progress
from utils.operations.migrations import history, runner
from utils.operations.migrations.environment import DEFAULTS, MigrationOptions
from utils.operations.migrations.revisions import Revisions
from utils.operations.migrations.statements import Statement, parse
from utils.text import format_count

#: Statements of one kind that the outcome's text lists; the file has all.
LISTED_STATEMENTS = 20
_HEADER = """\
-- Guildbook: {title}.
-- The comment above each statement says what it does to other users of the database:
--   drops          its contents are lost            rewrites       the table is rewritten, nobody reads or writes
--   scans          every row is read under a lock   blocks writes  writers wait until it is done, readers do not
--   locks          nobody reads or writes, briefly  changes rows   writers of the same rows wait
--   fails          if the table has rows            safe           nobody waits
--   unknown        look up what it locks
-- Run it while no bot uses the database: psql --set ON_ERROR_STOP=1 --file this
"""
_LOSES_ROWS = """\
-- It destroys data. Nothing backs the database up when it is run by hand: run python bot.py backup create first.
"""


async def preview(
    database: Pool | ConnectTarget,
    revision: str | None = None,
    *,
    down: bool = False,
    progress: Progress = ignore_progress,
    options: MigrationOptions = DEFAULTS,
) -> Outcome:
    """Return the SQL of an upgrade or, with `down`, a downgrade as the outcome's file. Runs nothing.

    `revision`: None means the newest or, for a downgrade, the previous one. Raises `MigrationError` for a revision that
    is unknown or in the other direction.
    """
    progress(Step("writing the SQL", unit="statements"))
    version, placement, is_new = await runner.read_schema(database, partial(_read, options))
    revisions = Revisions(options.scripts)
    heads = revisions.newest(version.revisions)
    current = version.revision
    goal = revisions.resolve(version.revisions, revision, down=down)
    start = "+".join(heads) or "base"
    direction = "downgrade" if down else "upgrade"
    title = f"{direction} from {start} to {goal}"
    if revisions.is_at(heads, goal):
        return Outcome(f"the schema is at {goal} already: nothing to do", data=_as_json(current, goal, []))
    sql = await asyncio.to_thread(_write_sql, version, heads, goal, down, options)
    if placement != Placement():
        sql = _place(sql, placement, is_new=is_new)
    parts = await asyncio.to_thread(parse, sql)
    statements = [part for part in parts if part.effects]
    return Outcome(
        _summarize(title, statements),
        data=_as_json(current, goal, statements),
        file=(
            f"{direction}-{start}-{goal.replace('@', '+')}.sql",
            _HEADER.format(title=title)
            + (_LOSES_ROWS if any(part.loses_rows for part in parts) else "")
            + "".join(part.annotated() for part in parts),
        ),
    )


def _read(options: MigrationOptions, connection: Connection) -> tuple[RecordedVersion, Placement, bool]:
    """Return what is recorded, where our tables are, and whether the main schema has yet to be created."""
    placement = placement_of(connection)
    found = connection.scalar(text("SELECT to_regnamespace(quote_ident(:name)) IS NULL"), {"name": placement.main})
    return ownership.read_version(connection, options.scripts), placement, bool(found)


def _place(sql: str, placement: Placement, *, is_new: bool) -> str:
    """Return SQL that psql runs in the schemas of a Guildbook."""
    main = quote_identifier(placement.main)
    first = " ".join(("CREATE SCHEMA", main)) + ";\n\n" if is_new else ""
    return f"{first}SET search_path TO {main};\n\n{placement.adapt(sql)}"


def _write_sql(version: RecordedVersion, heads: Sequence[str], goal: str, down: bool, options: MigrationOptions) -> str:
    revisions = Revisions(options.scripts)
    sql = runner.offline_sql(goal, current=heads, down=down, options=options)
    # A downgrade to base leaves this table in place, empty.
    table = ownership.version_table(options.scripts)
    sql = sql.replace(" ".join(("CREATE TABLE", table, "(")), " ".join(("CREATE TABLE IF NOT EXISTS", table, "(")))
    if version.is_former:
        sql = "".join(f"{statement};\n\n" for statement in ownership.adoption_statements(version)) + sql
    if down:
        is_table_kept = revisions.pack is not None or revisions.builds_on(goal, history.TABLE_REVISION)
        return f"{sql}\n{history.pause_sql(goal, is_table_kept=is_table_kept)};\n"
    if revisions.pack is None and not revisions.pending((*heads, *(revisions.heads if goal == "heads" else (goal,)))):
        return f"{sql}\n{history.RESUME_SQL};\n\nCOMMENT ON TABLE guildbook_version IS NULL;\n"
    return sql


def _summarize(title: str, statements: Sequence[Statement]) -> str:
    kinds = Counter(effect.kind for statement in statements for effect in statement.effects)
    counts = ", ".join(f"{kind}: {count}" for kind, count in kinds.most_common() if kind != "safe")
    lines = [f"{title}: {format_count(len(statements), 'statement')}" + (f" ({counts})" if counts else "")]
    lines += _list("destroy data or indexes", [it.title for it in statements if it.is_destructive])
    lines += _list("fail unless the table is empty", [it.title for it in statements if it.is_failing])
    return "\n".join(lines)


def _list(what: str, titles: Sequence[str]) -> list[str]:
    """Return a heading and a line for each statement; nothing if there are none."""
    if not titles:
        return []
    more = [f"- and {len(titles) - LISTED_STATEMENTS} more"] if len(titles) > LISTED_STATEMENTS else []
    return [f"These statements {what}:", *(f"- {title}" for title in titles[:LISTED_STATEMENTS]), *more]


def _as_json(current: str | None, goal: str, statements: Sequence[Statement]) -> dict[str, Any]:
    return {
        "from": current,
        "to": goal,
        "statements": [
            {"sql": statement.title, "kinds": sorted({effect.kind for effect in statement.effects})}
            for statement in statements
        ],
        "destructive": [statement.title for statement in statements if statement.is_destructive],
        "loses_rows": [statement.title for statement in statements if statement.loses_rows],
        "failing": [statement.title for statement in statements if statement.is_failing],
    }
