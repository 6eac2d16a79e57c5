"""The statements that merge a staging table, derived from the models like those of `write.merge_sql`.

`touched` stands for the ids that dispatches named since the listing was requested: they are left alone. A guild's
listing has its guild id as a parameter, so that the planner reads the rows of that guild alone; users belong to no
guild, and the parameter is NULL.
"""

from __future__ import annotations

from functools import cache

from utils.mirror.records.rows import key_columns, tombstone_column
from utils.mirror.write.merge_sql import (
    any_differs,
    assignments,
    column_list,
    equal_keys,
    history,
    inferred_joins,
    inferred_leaves,
)

#: Rows of a staging table that are looked up to choose between merging in one statement and in two.
SAMPLE_ROWS = 200


def staging_table(table: str) -> str:
    """Return the name of the staging table of a mirrored table."""
    return f"staging_{table}"


def staged_columns(table: str, columns: tuple[str, ...]) -> tuple[str, ...]:
    """Return the columns of a staging table, in order."""
    return (*key_columns(table), *columns, "stamp")


@cache
def create_staging(table: str, columns: tuple[str, ...]) -> str:
    """Return the statement that creates the staging table."""
    return f"""\
CREATE TEMP TABLE IF NOT EXISTS {staging_table(table)} AS
SELECT {column_list(staged_columns(table, columns))} FROM {table} WITH NO DATA
"""


def truncate_staging(table: str) -> str:
    """Return the statement that empties the staging table."""
    return f"TRUNCATE {staging_table(table)}"


@cache
def count_unknown_in_sample(table: str) -> str:
    """Return the statement that counts the rows of a sample that the table does not have. Parameter: guild id."""
    return f"""\
SELECT count(*) FILTER (WHERE NOT EXISTS (SELECT FROM {table} t WHERE {_same_row(table, 1)}))
FROM (SELECT * FROM {staging_table(table)} LIMIT {SAMPLE_ROWS}) s
"""


@cache
def count_differences(table: str, columns: tuple[str, ...]) -> str:
    """Return the statement that counts (rows unknown, rows that differ). Parameters: touched ids, guild id."""
    last_key = key_columns(table)[-1]
    return f"""\
SELECT count(*) FILTER (WHERE t.{last_key} IS NULL), count(*) FILTER (WHERE t.{last_key} IS NOT NULL)
FROM {staging_table(table)} s
LEFT JOIN {table} t ON {_same_row(table, 2)}
WHERE {_to_write(table, columns)}
"""


@cache
def insert_unknown(table: str, columns: tuple[str, ...], *, skip_conflicts: bool) -> str:
    """Return the statement that inserts the staged rows that the table does not have; it returns their number.

    Without `skip_conflicts` it is faster, but a key that is staged twice or inserted concurrently makes it fail as a
    whole. Parameter: guild id.
    """
    keys = key_columns(table)
    names = staged_columns(table, columns)
    distinct = f"DISTINCT ON ({column_list(keys, 's')}) " if skip_conflicts else ""
    insert = f"""\
    INSERT INTO {table} ({column_list(names)})
    SELECT {distinct}{column_list(names, "s")}
    FROM {staging_table(table)} s
    WHERE NOT EXISTS (SELECT FROM {table} t WHERE {_same_row(table, 1)})"""
    if skip_conflicts:
        insert += f"""
    ORDER BY {column_list(keys, "s")}
    ON CONFLICT ({column_list(keys)}) DO NOTHING"""
    if table != "members":
        return insert  # the command tag tells the number; returning every row would cost time
    return f"""\
WITH inserted AS (
{insert}
    RETURNING guild_id, user_id, joined_at, left_at, stamp
){inferred_joins(table, columns, inserted_only=True)}
SELECT count(*) FROM inserted
"""


@cache
def merge_staged(table: str, columns: tuple[str, ...]) -> str:
    """Return the statement that merges the staging table; it returns (rows inserted, rows updated).

    Parameters: touched ids, guild id.
    """
    keys = key_columns(table)
    names = staged_columns(table, columns)
    old = ", ".join(f"t.{name} AS old_{name}" for name in columns)
    return f"""\
WITH matched AS MATERIALIZED (
    SELECT DISTINCT ON ({column_list(keys, "s")})
           {column_list(names, "s")},
           {old},
           t.{keys[-1]} IS NOT NULL AS is_known
    FROM {staging_table(table)} s
    LEFT JOIN {table} t ON {_same_row(table, 2)}
    WHERE {_to_write(table, columns)}
    ORDER BY {column_list(keys, "s")}
),
inserted AS (
    INSERT INTO {table} ({column_list(names)})
    SELECT {column_list(names)}
    FROM matched
    WHERE NOT is_known
    ON CONFLICT ({column_list(keys)}) DO NOTHING
    RETURNING {column_list(keys)}
),
updated AS (
    UPDATE {table} t
    SET {assignments((*columns, "stamp"), "m")}, updated_at = now()
    FROM matched m
    WHERE m.is_known AND {equal_keys(keys, "t", "m")} AND {_of_guild(table, 2)} AND t.stamp <= m.stamp
    RETURNING {column_list(keys, "t")}
),
{history(table, columns, source="matched", changed="updated")}{inferred_joins(table, columns)}
SELECT (SELECT count(*) FROM inserted), (SELECT count(*) FROM updated)
"""


@cache
def select_staged(table: str, columns: tuple[str, ...]) -> str:
    """Return the statement that reads staged rows, in key order. Parameter: ids."""
    keys = key_columns(table)
    return f"""\
SELECT {column_list(staged_columns(table, columns), "s")}
FROM {staging_table(table)} s
WHERE s.{keys[-1]} = ANY($1::bigint[])
ORDER BY {column_list(keys, "s")}
"""


@cache
def tombstone_unstaged(table: str) -> str:
    """Return the statement that tombstones a guild's rows that are not staged; it returns their number.

    Parameters: ids to leave alone, guild id, stamp of the listing, the time.
    """
    keys = key_columns(table)
    tombstone = str(tombstone_column(table))
    return f"""\
WITH absent AS MATERIALIZED (
    SELECT {column_list(keys, "t")}, t.{tombstone} AS old_{tombstone}, $4::timestamptz AS {tombstone}
    FROM {table} t
    WHERE t.guild_id = $2
      AND t.{tombstone} IS NULL
      AND t.stamp < $3
      AND t.{keys[-1]} <> ALL($1::bigint[])
      AND NOT EXISTS (SELECT FROM {staging_table(table)} s WHERE {equal_keys(keys, "s", "t")})
),
tombstoned AS (
    UPDATE {table} t
    SET {tombstone} = m.{tombstone}, stamp = $3, updated_at = now()
    FROM absent m
    WHERE {equal_keys(keys, "t", "m")} AND t.guild_id = $2
    RETURNING {column_list(keys, "t")}, t.{tombstone}, t.stamp
),
{history(table, (tombstone,), source="absent", changed="tombstoned")}{inferred_leaves(table)}
SELECT count(*) FROM tombstoned
"""


def _of_guild(table: str, parameter: int) -> str:
    if "guild_id" in key_columns(table):
        return f"t.guild_id = ${parameter}::bigint"
    return f"${parameter}::bigint IS NULL"


def _same_row(table: str, parameter: int) -> str:
    return f"{equal_keys(key_columns(table), 't', 's')} AND {_of_guild(table, parameter)}"


def _to_write(table: str, columns: tuple[str, ...]) -> str:
    """Return the condition that a staged row is unknown, or newer and different, and was not touched."""
    last_key = key_columns(table)[-1]
    return f"""t.{last_key} IS NULL
   OR (t.stamp <= s.stamp AND ({any_differs(columns, "t", "s")}) AND s.{last_key} <> ALL($1::bigint[]))"""
