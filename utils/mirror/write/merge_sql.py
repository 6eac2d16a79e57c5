"""The merge as SQL, derived from the models: write only what differs, and record the history in the same statement.

Each function returns the whole text of one statement. To read one:

    python -c "from utils.mirror.write.merge_sql import *; print(merge_arrays('roles', ('name',), Mode.MERGE))"
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from textwrap import indent

from sqlalchemy import ARRAY
from sqlalchemy.dialects.postgresql import JSONB

from models import DISCORD_EPOCH_MS, Base, Erase, Part, part_of
from utils.database.sql import quote_identifier, sql_type
from utils.mirror.records.rows import Mode, key_columns, table_of, tombstone_column


@cache
def merge_arrays(table: str, columns: tuple[str, ...], mode: Mode) -> str:
    """Return the statement that merges a small batch given as arrays; it returns (rows inserted, rows updated).

    Parameters: one array for each key column, for each of `columns` and for the stamps, then whether a listing or a
    snapshot proved the rows (false: dispatches did).
    """
    # One statement, so that data and history cannot differ. DO UPDATE uses IMMUTABLE functions only: Citus requires it.
    keys = key_columns(table)
    names = (*keys, *columns, "stamp")
    inserts = "false" if mode is Mode.UPDATE else "true"
    differs = "false" if mode is Mode.INSERT else any_differs(columns, "m", "m", right_prefix="old_")
    return f"""\
WITH incoming AS MATERIALIZED (
    SELECT {_select_list(_incoming_column(table, name) for name in names)}
    FROM unnest({_unnest_parameters(table, names)})
         AS i({column_list(names)})
    WHERE {_newer_than_listing(table)}
),
matched AS MATERIALIZED (
    SELECT {_select_list((*(_effective_value(table, name) for name in names), *_old_values(table, columns)))},
           t.{keys[-1]} IS NOT NULL AS is_known,
           t.stamp AS old_stamp
    FROM incoming i
    LEFT JOIN {table} t ON {equal_keys(keys, "t", "i")}
),
inserted AS (
    INSERT INTO {table} AS t ({column_list(names)}, updated_at)
    SELECT {column_list(names)}, now()
    FROM matched m
    WHERE NOT m.is_known AND {inserts}
    ORDER BY {column_list(keys)}
    ON CONFLICT ({column_list(keys)}) DO UPDATE
    SET {assignments((*columns, "stamp"), "excluded")}, updated_at = excluded.updated_at
    WHERE t.stamp <= excluded.stamp
    RETURNING {column_list(keys, "t")}
),
updated AS (
    UPDATE {table} t
    SET {assignments((*columns, "stamp"), "m")}, updated_at = now()
    FROM matched m
    WHERE m.is_known AND m.old_stamp <= m.stamp AND ({differs})
      AND {equal_keys(keys, "t", "m")} AND t.stamp <= m.stamp
    RETURNING {column_list(keys, "t")}
),
{history(table, columns, source="matched", changed="updated", inferred=f"${len(names) + 1}::boolean")}\
{creations(table, columns, mode)}{inferred_joins(table, columns)}
SELECT (SELECT count(*) FROM inserted), (SELECT count(*) FROM updated)
"""


@cache
def tombstone_absent(table: str) -> str:
    """Return the statement that tombstones the rows that complete listings did not show; it returns their keys.

    Parameters: guild ids and row ids listed (parallel arrays), guild ids and stamps of the listings (parallel arrays),
    the time.
    """
    keys = key_columns(table)
    tombstone = str(tombstone_column(table))
    person = person_column(table)
    return f"""\
WITH listed AS MATERIALIZED (
    SELECT * FROM unnest($1::bigint[], $2::bigint[]) AS l(guild_id, id)
),
complete AS MATERIALIZED (
    SELECT * FROM unnest($3::bigint[], $4::bigint[]) AS p(guild_id, stamp)
),
absent AS MATERIALIZED (
    SELECT {column_list(keys, "t")},
           p.stamp,
           t.{tombstone} AS old_{tombstone},
           $5::timestamptz AS {tombstone}{f", t.{person} AS person_id" if person and person not in keys else ""}
    FROM {table} t
    JOIN complete p ON p.guild_id = t.guild_id
    WHERE t.{tombstone} IS NULL
      AND t.stamp < p.stamp
      AND NOT EXISTS (SELECT FROM listed l WHERE l.guild_id = t.guild_id AND l.id = t.{keys[1]})
),
tombstoned AS (
    UPDATE {table} t
    SET {tombstone} = m.{tombstone}, stamp = m.stamp, updated_at = now()
    FROM absent m
    WHERE {equal_keys(keys, "t", "m")} AND t.{tombstone} IS NULL
    RETURNING {column_list(keys, "t")}, t.{tombstone}, t.stamp
),
{history(table, (tombstone,), source="absent", changed="tombstoned")}\
{inferred_leaves(table)}
SELECT {column_list(keys)} FROM tombstoned
"""


@cache
def select_sample_keys(table: str, newest: bool) -> str:
    """Return the statement that reads the first or the last keys of any table. Parameter: how many."""
    keys = [column.name for column in Base.metadata.tables[table].primary_key.columns]
    order = "DESC" if newest else "ASC"
    return f"""\
SELECT {column_list(keys)} FROM {table} ORDER BY {", ".join(f"{key} {order}" for key in column_list(keys).split(", "))}
LIMIT $1
"""


@cache
def rewrite_row(table: str) -> str:
    """Return the statement that writes a row of any table once more, unchanged. Parameters: its key."""
    described = Base.metadata.tables[table]
    keys = [column.name for column in described.primary_key.columns]
    columns = [column.name for column in described.columns if column.computed is None]
    conflict = f"ON CONFLICT ({column_list(keys)}) DO UPDATE SET {assignments(keys[-1:], 'excluded')}"
    if table == "member_events":  # its ids are assigned
        columns.remove("id")
        conflict = ""
    condition = " AND ".join(f"{column_list([key])} = ${number}" for number, key in enumerate(keys, start=1))
    return f"""\
INSERT INTO {table} ({column_list(columns)})
SELECT {column_list(columns)} FROM {table} WHERE {condition}
{conflict}
"""


# --- CTEs that several statements share


def history(table: str, columns: tuple[str, ...], *, source: str, changed: str, inferred: str = "true") -> str:
    """Return the CTE `history`: it records what differs between the new values in `source` and its `old_…` columns.

    `changed` is the CTE that returned the keys of the rows written. `inferred` is SQL for whether a listing proved the
    change; false means that a dispatch reported it.
    """
    keys = key_columns(table)
    recorded = tuple(name for name in columns if part_of(table_of(table).columns[name]) is not Part.QUIET)
    tombstone = tombstone_column(table)
    person = person_column(table)
    action = "'update'"
    if tombstone in columns:
        action = (
            f"CASE WHEN m.old_{tombstone} IS NULL AND m.{tombstone} IS NOT NULL THEN 'remove' "
            f"WHEN m.old_{tombstone} IS NOT NULL AND m.{tombstone} IS NULL THEN 'return' ELSE 'update' END"
        )
    targets, values = ["user_id" if table == "users" else "guild_id"], [f"m.{keys[0]}"]
    if person is not None:
        targets.append("user_id")
        values.append(f"m.{person}" if person in keys else "m.person_id")
    key = ", ".join(f"'{name}', m.{quote_identifier(name)}" for name in keys)
    values += [
        f"'{table}'",
        f"jsonb_build_object({key})",
        action,
        _changed_values(recorded, "old_"),
        _changed_values(recorded, ""),
        inferred,
    ]
    return f"""\
history AS (
    INSERT INTO {history_table(table)} ({", ".join(targets)}, table_name, key, action, before, after, inferred)
    SELECT {_select_list(values)}
    FROM {source} m
    JOIN {changed} c ON {equal_keys(keys, "c", "m")}
    WHERE {any_differs(recorded, "m", "m", right_prefix="old_")}
)"""


def creations(table: str, columns: tuple[str, ...], mode: Mode) -> str:
    """Return the CTE that records creations, with a leading comma; an empty text for tables other than `CREATED`.

    A row that a dispatch calls created is recorded as that. Of any other row that is new here, its id tells when the
    object was created, and it is recorded if the guild had been listed completely by then: what a first sync finds has
    been there all along. A guild counts as created when the bot is added to it.
    """
    proof = CREATED.get(table)
    if proof is None or mode is Mode.UPDATE or (table == "guilds" and "joined_at" not in columns):
        return ""
    keys, person, tombstone = key_columns(table), person_column(table), tombstone_column(table)
    recorded = tuple(name for name in columns if part_of(table_of(table).columns[name]) is Part.DATA)
    values = indent("\n|| ".join(f"jsonb_build_object('{name}', m.{quote_identifier(name)})" for name in recorded),
                    " " * 11).strip()  # fmt: skip
    key = ", ".join(f"'{name}', m.{quote_identifier(name)}" for name in keys)
    conditions = [f"m.{tombstone} IS NULL"] if tombstone in columns else []
    if mode is not Mode.CREATE:
        conditions.append(proof)
    return f""",
created AS (
    INSERT INTO {history_table(table)} (guild_id, user_id, table_name, key, action, after, inferred)
    SELECT {
        _select_list(
            (
                f"m.{keys[0]}",
                f"m.{person}" if person in columns else "NULL",
                f"'{table}'",
                f"jsonb_build_object({key})",
                "'create'",
                values or "NULL",
                "false" if mode is Mode.CREATE else "true",
            )
        )
    }
    FROM matched m
    JOIN inserted i ON {equal_keys(keys, "i", "m")}
    WHERE {" AND ".join(conditions) or "true"}
)"""


_CREATED_AFTER_LISTING = f"""to_timestamp(((m.id >> 22) + {DISCORD_EPOCH_MS}) / 1000.0) > (
        SELECT r.started_at
        FROM sync_runs r
        WHERE r.guild_id = m.guild_id AND r.state = 'complete'
        ORDER BY r.id
        LIMIT 1
    )"""
#: The tables whose creations are recorded, each with the condition that a listing proves one.
CREATED = {
    "guilds": "m.joined_at > (SELECT min(r.started_at) FROM sync_runs r WHERE r.state = 'complete')",
    "channels": _CREATED_AFTER_LISTING,
    "roles": _CREATED_AFTER_LISTING,
    "threads": _CREATED_AFTER_LISTING,
}


def inferred_joins(table: str, columns: tuple[str, ...], *, inserted_only: bool = False) -> str:
    """Return the CTEs that infer joins, with a leading comma; an empty text for tables other than members.

    They infer a join for members that appeared without a join event, and a leave and a join for members whose time of
    joining changed. Before a guild's first complete listing a join is inferred only after a recorded leave: the other
    members may have been there all along. `inserted_only`: the statement writes new rows only, and its CTE `inserted`
    returns them whole.
    """
    if table != "members" or not {"joined_at", "left_at"} <= set(columns):
        return ""
    if inserted_only:
        appeared = """\
    SELECT guild_id, user_id, joined_at, stamp, false AS has_rejoined
    FROM inserted
    WHERE left_at IS NULL"""
    else:
        appeared = """\
    SELECT m.guild_id, m.user_id, m.joined_at, m.stamp, false AS has_rejoined
    FROM matched m
    JOIN inserted i ON i.guild_id = m.guild_id AND i.user_id = m.user_id
    WHERE m.left_at IS NULL
    UNION ALL
    SELECT m.guild_id, m.user_id, m.joined_at, m.stamp, m.old_left_at IS NULL
    FROM matched m
    JOIN updated u ON u.guild_id = m.guild_id AND u.user_id = m.user_id
    WHERE m.left_at IS NULL AND (m.old_left_at IS NOT NULL OR m.old_joined_at <> m.joined_at)"""
    return f""",
appeared AS (
{appeared}
),
inferred_joins AS (
    INSERT INTO member_events (guild_id, user_id, kind, at, inferred, earliest, latest, stamp)
    SELECT a.guild_id, a.user_id, k.kind, coalesce(a.joined_at, now()), true, r.earliest, now(), a.stamp
    FROM appeared a
    CROSS JOIN LATERAL {_LAST_LISTING} r
    CROSS JOIN (VALUES (0, 'leave'), (1, 'join')) AS k(turn, kind)
    WHERE (r.earliest IS NOT NULL OR {_HAS_LEFT})
      AND (k.kind = 'join' OR a.has_rejoined AND NOT {_HAS_LEFT})
      AND NOT EXISTS (
          SELECT FROM member_events e
          WHERE e.guild_id = a.guild_id AND e.user_id = a.user_id AND e.kind = 'join' AND e.at = a.joined_at
      )
    ORDER BY a.guild_id, a.user_id, k.turn
)"""


def inferred_leaves(table: str) -> str:
    """Return the CTE that infers leaves for `tombstoned` members, with a leading comma; an empty text for other tables.

    A member whose leave event was recorded is left out.
    """
    if table != "members":
        return ""
    return f""",
inferred_leaves AS (
    INSERT INTO member_events (guild_id, user_id, kind, at, inferred, earliest, latest, stamp)
    SELECT a.guild_id, a.user_id, 'leave', a.left_at, true, r.earliest, a.left_at, a.stamp
    FROM tombstoned a
    CROSS JOIN LATERAL {_LAST_LISTING} r
    WHERE NOT {_HAS_LEFT}
)"""


_LAST_LISTING = """(
        SELECT max(r.started_at) AS earliest
        FROM sync_runs r
        WHERE r.guild_id = a.guild_id AND r.state = 'complete'
    )"""
# The member's row may not show it: the row of a leave may have been in the buffer of a process that was killed.
_HAS_LEFT = """coalesce(
          (SELECT e.kind = 'leave'
           FROM member_events e
           WHERE e.guild_id = a.guild_id AND e.user_id = a.user_id AND e.kind IN ('join', 'leave')
           ORDER BY e.stamp DESC, e.id DESC
           LIMIT 1),
          false
      )"""


# --- pieces of a statement


def history_table(table: str) -> str:
    """Return the table that keeps the history of a mirrored table."""
    return "user_changes" if table == "users" else "changes"


def person_column(table: str) -> str | None:
    """Return the column that names the person whom a guild's row is about; None when it is about no person."""
    if table == "users":
        return None
    columns = table_of(table).columns
    return next((column.name for column in columns if column.info.get("erase") is Erase.SUBJECT), None)


def column_list(names: Iterable[str], alias: str = "") -> str:
    """Return column names as a list, each qualified with `alias` if one is given."""
    prefix = f"{alias}." if alias else ""
    return ", ".join(prefix + quote_identifier(name) for name in names)


def equal_keys(keys: tuple[str, ...], left: str, right: str) -> str:
    """Return the condition that two rows have the same key."""
    return " AND ".join(f"{left}.{quote_identifier(key)} = {right}.{quote_identifier(key)}" for key in keys)


def any_differs(columns: tuple[str, ...], left: str, right: str, *, right_prefix: str = "") -> str:
    """Return the condition that two rows differ in any of the columns."""
    conditions = (
        f"{left}.{quote_identifier(name)} IS DISTINCT FROM {right}.{quote_identifier(right_prefix + name)}"
        for name in columns
    )
    return "\n       OR ".join(conditions) or "false"


def assignments(columns: Iterable[str], source: str) -> str:
    """Return the assignments of a SET clause."""
    return ", ".join(f"{quote_identifier(name)} = {source}.{quote_identifier(name)}" for name in columns)


def _select_list(expressions: Iterable[str]) -> str:
    return ",\n           ".join(expressions)


def _unnest_parameters(table: str, names: tuple[str, ...]) -> str:
    types = ("text" if _is_sent_as_text(table, name) else sql_type(table_of(table).columns[name]) for name in names)
    return ", ".join(f"${number}::{type_}[]" for number, type_ in enumerate(types, start=1))


def _incoming_column(table: str, name: str) -> str:
    column = f"i.{quote_identifier(name)}"
    if _is_sent_as_text(table, name):
        return f"{column}::{sql_type(table_of(table).columns[name])} AS {quote_identifier(name)}"
    return column


def _is_sent_as_text(table: str, name: str) -> bool:
    # UNNEST flattens arrays of arrays, and jsonb needs a codec.
    return isinstance(table_of(table).columns[name].type, (ARRAY, JSONB))


def _effective_value(table: str, name: str) -> str:
    """Return what is written to a column: the incoming value, but a tombstone keeps its first time."""
    if name == tombstone_column(table):
        return f"CASE WHEN i.{name} IS NULL THEN NULL ELSE coalesce(t.{name}, i.{name}) END AS {quote_identifier(name)}"
    return f"i.{quote_identifier(name)}"


def _old_values(table: str, columns: tuple[str, ...]) -> list[str]:
    """Return the current values that the history compares with, and the person whom the row is about."""
    old = [f"t.{quote_identifier(name)} AS {quote_identifier('old_' + name)}" for name in columns]
    person = person_column(table)
    return old if person is None or person in key_columns(table) else [*old, f"t.{person} AS person_id"]


def _changed_values(columns: tuple[str, ...], prefix: str) -> str:
    """Return a jsonb object of the columns that changed, with the old values (prefix `old_`) or the new ones."""
    objects = (
        f"CASE WHEN m.{quote_identifier('old_' + name)} IS DISTINCT FROM m.{quote_identifier(name)} "
        f"THEN jsonb_build_object('{name}', m.{quote_identifier(prefix + name)}) ELSE '{{}}'::jsonb END"
        for name in columns
    )
    return indent("\n|| ".join(objects), " " * 11).strip() or "'{}'::jsonb"


def _newer_than_listing(table: str) -> str:
    """Return the condition that drops members older than the last complete listing of their guild."""
    if table != "members":
        return "true"
    return """i.stamp >= coalesce(
        (SELECT max(r.stamp) FROM sync_runs r WHERE r.guild_id = i.guild_id AND r.state = 'complete'), 0
    )"""
