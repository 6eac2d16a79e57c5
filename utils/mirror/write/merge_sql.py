"""The merge, as SQL derived from the tables: write what differs, nothing else, and leave its history beside it."""

from __future__ import annotations

from functools import cache

from sqlalchemy import ARRAY
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import JSONB

from models import Erase, Part, part_of
from utils.mirror.records.rows import Mode, key_columns, table_of, tombstone_column
from utils.mirror.write.event_sql import inferred_joins, inferred_leaves

_DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]


def quoted(name: str) -> str:
    """Return an identifier as SQL."""
    return _DIALECT.identifier_preparer.quote(name)


def sql_type(table: str, column: str) -> str:
    """Return a column's type as SQL."""
    return table_of(table).columns[column].type.compile(_DIALECT)


def _is_nested(table: str, column: str) -> bool:
    """Return whether the column's values travel as text: UNNEST flattens arrays of arrays, and jsonb needs a codec."""
    return isinstance(table_of(table).columns[column].type, (ARRAY, JSONB))


def history_table(table: str) -> str:
    """Return where changes of the table's rows are kept."""
    return "user_changes" if table == "users" else "changes"


def _on(left: str, right: str, keys: tuple[str, ...]) -> str:
    return " AND ".join(f"{left}.{quoted(key)} = {right}.{quoted(key)}" for key in keys)


def _differences(table: str, columns: tuple[str, ...], left: str, right: str, prefix: str = "") -> str:
    return (
        " OR ".join(f"{left}.{quoted(prefix + name)} IS DISTINCT FROM {right}.{quoted(name)}" for name in columns)
        or "false"
    )


def _noted(table: str, columns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in columns if part_of(table_of(table).columns[name]) is not Part.QUIET)


def unnested(table: str, columns: tuple[str, ...], first: int = 1) -> str:
    """Return a FROM item over arrays given as parameters `first` and up: keys, columns, stamp."""
    names = (*key_columns(table), *columns)
    arrays, outputs = [], []
    for number, name in enumerate(names, start=first):
        nested = _is_nested(table, name)
        arrays.append(f"${number}::{'text' if nested else sql_type(table, name)}[]")
        outputs.append(f"u.{quoted(name)}" + (f"::{sql_type(table, name)} AS {quoted(name)}" if nested else ""))
    arrays.append(f"${first + len(names)}::bigint[]")
    listed = ", ".join(quoted(name) for name in (*names, "stamp"))
    return f"(SELECT {', '.join(outputs)}, u.stamp FROM unnest({', '.join(arrays)}) AS u({listed}))"


def subject(table: str) -> str | None:
    """Return the column that names the person whom a guild's row is about; None when it is about nobody."""
    if table == "users":
        return None
    columns = table_of(table).columns
    return next((column.name for column in columns if column.info.get("erase") is Erase.SUBJECT), None)


def _named(table: str) -> str:
    """Return what a SELECT of rows to be noted adds, so that their history can be found by person."""
    person = subject(table)
    return "" if person is None or person in key_columns(table) else f", t.{person} AS subject"


def _history(table: str, columns: tuple[str, ...], *, rows: str, changed: str, inferred: str = "true") -> str:
    """Return the INSERT that keeps what changed, for `rows` (old values prefixed `old_`) that `changed` returned.

    `inferred`: SQL that tells whether a listing proved it; false where a live event told of it.
    """
    keys = key_columns(table)
    noted = _noted(table, columns)
    tombstone = tombstone_column(table)

    def side(prefix: str) -> str:
        sides = (
            f"CASE WHEN d.{quoted('old_' + name)} IS DISTINCT FROM d.{quoted(name)} "
            f"THEN jsonb_build_object('{name}', d.{quoted(prefix + name)}) ELSE '{{}}'::jsonb END"
            for name in noted
        )
        return " || ".join(sides) or "'{}'::jsonb"

    action = "'update'"
    if tombstone in columns:
        gone, was_gone = f"d.{tombstone} IS NOT NULL", f"d.old_{tombstone} IS NOT NULL"
        action = (
            f"CASE WHEN {gone} AND NOT {was_gone} THEN 'remove' "
            f"WHEN {was_gone} AND NOT {gone} THEN 'return' ELSE 'update' END"
        )
    key = ", ".join(f"'{name}', d.{quoted(name)}" for name in keys)
    targets, sources = ["user_id" if table == "users" else "guild_id"], [f"d.{quoted(keys[0])}"]
    if (person := subject(table)) is not None:
        targets.append("user_id")
        sources.append(f"d.{person if person in keys else 'subject'}")
    return (
        f"INSERT INTO {history_table(table)} ({', '.join(targets)}, table_name, key, action, before, after, inferred) "
        f"SELECT {', '.join(sources)}, '{table}', jsonb_build_object({key}), {action}, {side('old_')}, {side('')}, "
        f"{inferred} "
        f"FROM {rows} d JOIN {changed} c ON {_on('c', 'd', keys)} "
        f"WHERE {_differences(table, noted, 'd', 'd', 'old_')}"
    )


def _updates(columns: tuple[str, ...], source: str, stamp: str = "stamp") -> str:
    return ", ".join(f"{quoted(name)} = {source}.{quoted(name)}" for name in (*columns, stamp))


def _joins(table: str, columns: tuple[str, ...]) -> str:
    """Return the CTE that infers joins, with a comma before it, for members in `matched`; nothing for other tables."""
    if table != "members" or not {"joined_at", "left_at"} <= set(columns):
        return ""
    on_fresh, on_changed = (_on(other, "d", key_columns(table)) for other in ("f", "c"))
    appeared = (
        "SELECT d.guild_id, d.user_id, d.joined_at, d.stamp, false AS rejoined "
        f"FROM matched d JOIN fresh f ON {on_fresh} "
        "WHERE d.left_at IS NULL UNION ALL "
        "SELECT d.guild_id, d.user_id, d.joined_at, d.stamp, d.old_left_at IS NULL "
        f"FROM matched d JOIN changed c ON {on_changed} "
        "WHERE d.left_at IS NULL AND (d.old_left_at IS NOT NULL OR d.old_joined_at <> d.joined_at)"
    )
    return f", joined AS ({inferred_joins(appeared)})"


def _leaves(table: str, now: str) -> str:
    """Return the CTE that infers leaves, with a comma before it, for members in `gone`; nothing for other tables."""
    if table != "members":
        return ""
    return f", absent AS ({inferred_leaves('SELECT guild_id, user_id, stamp FROM gone', now)})"


def _older_than_listing(table: str, source: str) -> str:
    """Return the guard that drops what is older than the last complete listing of the guild's members."""
    if table != "members":
        return "true"
    return (
        f"{source}.stamp >= coalesce((SELECT max(r.stamp) FROM sync_runs r "
        f"WHERE r.guild_id = {source}.guild_id AND r.state = 'complete'), 0)"
    )


@cache
def merge(table: str, columns: tuple[str, ...], mode: Mode) -> str:
    """Return the merge of a small batch given as arrays; it answers (inserted, updated).

    One statement, so that data and history cannot part. Only IMMUTABLE functions stand in DO UPDATE: Citus asks for it.
    Parameters: an array for each key, column and for the stamps, then whether a listing proved it all.
    """
    keys = key_columns(table)
    tombstone = tombstone_column(table)
    effective = []
    for name in columns:
        if name == tombstone:
            # A removal told twice keeps the first time.
            effective.append(
                f"CASE WHEN s.{name} IS NULL THEN NULL ELSE coalesce(t.{name}, s.{name}) END AS {quoted(name)}"
            )
        else:
            effective.append(f"s.{quoted(name)}")
    given = ", ".join((*(f"s.{quoted(key)}" for key in keys), *effective, "s.stamp"))
    old = ", ".join(
        (f"t.{keys[-1]} IS NOT NULL AS known", *(f"t.{quoted(name)} AS {quoted('old_' + name)}" for name in columns))
    ) + _named(table)
    everything = (*keys, *columns, "stamp")
    listed = ", ".join(quoted(name) for name in everything)
    differs = "false" if mode is Mode.INSERT else _differences(table, columns, "d", "d", "old_")
    known = f"d.known AND d.old_stamp <= d.stamp AND ({differs})"
    conflict = (
        f"ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {_updates(columns, 'excluded')}, "
        f"updated_at = excluded.updated_at WHERE t.stamp <= excluded.stamp"
    )
    insert = (
        f"INSERT INTO {table} AS t ({listed}, updated_at) SELECT {listed}, now() FROM matched d "
        f"WHERE NOT d.known AND {'false' if mode is Mode.UPDATE else 'true'} "
        f"ORDER BY {', '.join(keys)} {conflict} RETURNING {', '.join('t.' + key for key in keys)}"
    )
    update = (
        f"UPDATE {table} t SET {_updates(columns, 'd')}, updated_at = now() FROM matched d "
        f"WHERE {known} AND {_on('t', 'd', keys)} AND t.stamp <= d.stamp "
        f"RETURNING {', '.join('t.' + key for key in keys)}"
    )
    noted = _history(table, columns, rows="matched", changed="changed", inferred=f"${len(everything) + 1}::boolean")
    return (
        f"WITH source AS MATERIALIZED (SELECT * FROM {unnested(table, columns)} s "
        f"WHERE {_older_than_listing(table, 's')}), "
        f"matched AS MATERIALIZED (SELECT {given}, {old}, t.stamp AS old_stamp "
        f"FROM source s LEFT JOIN {table} t ON {_on('t', 's', keys)}), "
        f"fresh AS ({insert}), changed AS ({update}), noted AS ({noted}){_joins(table, columns)} "
        f"SELECT (SELECT count(*) FROM fresh), (SELECT count(*) FROM changed)"
    )


@cache
def absence(table: str) -> str:
    """Return the statement that tombstones what complete listings did not show.

    Parameters: guilds and ids listed (parallel arrays), guilds and stamps of the listings (parallel arrays), the time.
    It answers the guilds and ids that are gone now.
    """
    keys = key_columns(table)
    tombstone = tombstone_column(table)
    history = _history(table, (str(tombstone),), rows="before", changed="gone")
    return (
        f"WITH listed AS MATERIALIZED (SELECT * FROM unnest($1::bigint[], $2::bigint[]) AS l(guild_id, id)), "
        f"proven AS MATERIALIZED (SELECT * FROM unnest($3::bigint[], $4::bigint[]) AS p(guild_id, stamp)), "
        f"before AS MATERIALIZED (SELECT t.{keys[0]}, t.{keys[1]}, p.stamp, t.{tombstone} AS old_{tombstone}, "
        f"$5::timestamptz AS {tombstone}{_named(table)} FROM {table} t JOIN proven p ON p.guild_id = t.guild_id "
        f"WHERE t.{tombstone} IS NULL AND t.stamp < p.stamp AND NOT EXISTS "
        f"(SELECT FROM listed l WHERE l.guild_id = t.guild_id AND l.id = t.{keys[1]})), "
        f"gone AS (UPDATE {table} t SET {tombstone} = d.{tombstone}, stamp = d.stamp, updated_at = now() "
        f"FROM before d WHERE {_on('t', 'd', keys)} AND t.{tombstone} IS NULL "
        f"RETURNING {', '.join('t.' + key for key in keys)}, t.stamp), "
        f"noted AS ({history}){_leaves(table, '$5::timestamptz')} "
        f"SELECT {', '.join(keys)} FROM gone"
    )


def _differs(table: str, columns: tuple[str, ...]) -> str:
    return f"t.stamp <= s.stamp AND ({_differences(table, columns, 't', 's')})"


def _inserting(table: str, insert: str) -> str:
    """Return an INSERT of staged rows; where they are members it infers joins, and answers the number of rows."""
    if table != "members":
        return insert
    appeared = "SELECT guild_id, user_id, joined_at, stamp, false AS rejoined FROM fresh WHERE left_at IS NULL"
    return (
        f"WITH fresh AS ({insert} RETURNING guild_id, user_id, joined_at, left_at, stamp), "
        f"joined AS ({inferred_joins(appeared)}) SELECT count(*) FROM fresh"
    )


#: Rows of a staging table that are looked up to tell which way of merging is the faster one.
SAMPLE = 200


class StagedMerge:
    """The merge of a staging table: in one statement where most rows are known, in steps where most are new.

    Parameters of `difference` and `counted`: the ids to leave alone (touched live since the listing was asked for), and
    the guild, or for users, who belong to none, NULL. Of the others: the guild alone.
    """

    __slots__ = (
        "absent", "columns", "counted", "create", "difference", "fresh", "fresh_checked", "named", "sampled", "staging",
        "table",
    )  # fmt: skip

    def __init__(self, table: str, columns: tuple[str, ...]) -> None:
        keys = key_columns(table)
        last = keys[-1]
        everything = (*keys, *columns, "stamp")
        listed = ", ".join(quoted(name) for name in everything)
        given = ", ".join(f"s.{quoted(name)}" for name in everything)
        staging = f"staging_{table}"
        order = ", ".join(f"s.{key}" for key in keys)
        untouched = f"s.{last} <> ALL($1::bigint[])"

        def of_guild(parameter: int) -> str:
            # The guild as a constant lets the planner read that guild's rows alone.
            return f"t.guild_id = ${parameter}::bigint" if "guild_id" in keys else f"${parameter}::bigint IS NULL"

        def match(parameter: int) -> str:
            return f"{_on('t', 's', keys)} AND {of_guild(parameter)}"

        self.table = table
        self.columns = everything
        self.staging = staging
        self.create = f"CREATE TEMP TABLE IF NOT EXISTS {staging} AS SELECT {listed} FROM {table} WITH NO DATA"
        #: Answers how many rows of a sample are unknown.
        self.sampled = (
            f"SELECT count(*) FILTER (WHERE NOT EXISTS (SELECT FROM {table} t WHERE {match(1)})) "
            f"FROM (SELECT * FROM {staging} LIMIT {SAMPLE}) s"
        )
        #: Answers (rows unknown, rows that differ).
        self.counted = (
            f"SELECT count(*) FILTER (WHERE t.{last} IS NULL), count(*) FILTER (WHERE t.{last} IS NOT NULL) "
            f"FROM {staging} s LEFT JOIN {table} t ON {match(2)} "
            f"WHERE t.{last} IS NULL OR ({_differs(table, columns)} AND {untouched})"
        )
        unknown = f"NOT EXISTS (SELECT FROM {table} t WHERE {match(1)})"
        listed_rows = f"INSERT INTO {table} ({listed}) SELECT"
        #: The fast way in; a key that is there twice, or that somebody else inserts meanwhile, makes it fail whole.
        self.fresh = _inserting(table, f"{listed_rows} {given} FROM {staging} s WHERE {unknown}")
        #: The careful way in, for when the fast one failed.
        self.fresh_checked = _inserting(
            table,
            f"{listed_rows} DISTINCT ON ({order}) {given} FROM {staging} s WHERE {unknown} "
            f"ORDER BY {order} ON CONFLICT ({', '.join(keys)}) DO NOTHING",
        )
        #: Answers the staged rows of the ids in its one parameter.
        self.named = f"SELECT {given} FROM {staging} s WHERE s.{last} = ANY($1::bigint[]) ORDER BY {order}"
        old = ", ".join(f"t.{quoted(name)} AS {quoted('old_' + name)}" for name in columns)
        #: Answers (rows inserted, rows updated).
        self.difference = (
            f"WITH matched AS MATERIALIZED (SELECT DISTINCT ON ({order}) {given}, {old}, t.{last} IS NOT NULL AS known "
            f"FROM {staging} s LEFT JOIN {table} t ON {match(2)} "
            f"WHERE t.{last} IS NULL OR ({_differs(table, columns)} AND {untouched}) ORDER BY {order}), "
            f"fresh AS (INSERT INTO {table} ({listed}) SELECT {listed} FROM matched WHERE NOT known "
            f"ON CONFLICT ({', '.join(keys)}) DO NOTHING RETURNING {', '.join(keys)}), "
            f"changed AS (UPDATE {table} t SET {_updates(columns, 'd')}, updated_at = now() "
            f"FROM matched d WHERE d.known AND {_on('t', 'd', keys)} AND {of_guild(2)} AND t.stamp <= d.stamp "
            f"RETURNING {', '.join('t.' + key for key in keys)}), "
            f"noted AS ({_history(table, columns, rows='matched', changed='changed')}){_joins(table, columns)} "
            f"SELECT (SELECT count(*) FROM fresh), (SELECT count(*) FROM changed)"
        )
        tombstone = tombstone_column(table)
        #: Parameters: ids to spare, guild, stamp of the listing, the time. Answers the number of rows gone.
        self.absent = (
            ""
            if tombstone is None
            else (
                f"WITH before AS MATERIALIZED (SELECT {', '.join('t.' + key for key in keys)}, "
                f"t.{tombstone} AS old_{tombstone}, $4::timestamptz AS {tombstone} FROM {table} t "
                f"WHERE t.guild_id = $2 AND t.{tombstone} IS NULL AND t.stamp < $3 AND t.{last} <> ALL($1::bigint[]) "
                f"AND NOT EXISTS (SELECT FROM {staging} s WHERE {_on('s', 't', keys)})), "
                f"gone AS (UPDATE {table} t SET {tombstone} = d.{tombstone}, stamp = $3, updated_at = now() "
                f"FROM before d WHERE {_on('t', 'd', keys)} AND t.guild_id = $2 "
                f"RETURNING {', '.join('t.' + key for key in keys)}, t.stamp), "
                f"noted AS ({_history(table, (tombstone,), rows='before', changed='gone')})"
                f"{_leaves(table, '$4::timestamptz')} SELECT count(*) FROM gone"
            )
        )


@cache
def staged(table: str, columns: tuple[str, ...]) -> StagedMerge:
    """Return the statements that merge a staging table of these columns."""
    return StagedMerge(table, columns)


#: A deleted role leaves the members' arrays without a word from Discord. Parameters: guilds and role ids, and whether a
#: listing proved that they are gone. The members' stamps stay: nobody spoke of these members, so a listing asked for
#: before the deletion still knows all else better.
STRIP_ROLES = (
    "WITH dead AS (SELECT * FROM unnest($1::bigint[], $2::bigint[]) AS d(guild_id, id)), "
    "matched AS MATERIALIZED (SELECT m.guild_id, m.user_id, m.roles AS old_roles, "
    "ARRAY(SELECT r FROM unnest(m.roles) AS r WHERE r <> ALL(array_agg(d.id)) ORDER BY r) AS roles "
    "FROM dead d JOIN members m ON m.guild_id = d.guild_id AND m.roles @> ARRAY[d.id] "
    "GROUP BY m.guild_id, m.user_id, m.roles), "
    "changed AS (UPDATE members t SET roles = d.roles, updated_at = now() FROM matched d "
    "WHERE t.guild_id = d.guild_id AND t.user_id = d.user_id RETURNING t.guild_id, t.user_id), "
    f"noted AS ({_history('members', ('roles',), rows='matched', changed='changed', inferred='$3::boolean')}) "
    "SELECT count(*) FROM changed"
)

#: A deleted channel takes its threads without a word from Discord. Parameters: guilds, channel ids, stamps, the time,
#: and whether a listing proved that they are gone.
BURY_THREADS = (
    "WITH dead AS (SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) AS d(guild_id, id, stamp)), "
    "matched AS MATERIALIZED (SELECT t.guild_id, t.id, t.deleted_at AS old_deleted_at, $4::timestamptz AS deleted_at, "
    "greatest(t.stamp, d.stamp) AS stamp, t.owner_id AS subject "
    "FROM dead d JOIN threads t ON t.guild_id = d.guild_id AND t.parent_id = d.id "
    "WHERE t.deleted_at IS NULL), "
    "changed AS (UPDATE threads t SET deleted_at = d.deleted_at, stamp = d.stamp, updated_at = now() FROM matched d "
    "WHERE t.guild_id = d.guild_id AND t.id = d.id RETURNING t.guild_id, t.id), "
    f"noted AS ({_history('threads', ('deleted_at',), rows='matched', changed='changed', inferred='$5::boolean')}) "
    "SELECT count(*) FROM changed"
)

#: Answers whether a later listing of the guild has been completed. Parameters: guild, stamp of the listing.
SUPERSEDED = "SELECT EXISTS (SELECT FROM sync_runs WHERE guild_id = $1 AND state = 'complete' AND stamp > $2)"

#: READY names every guild of its shard: the others were left meanwhile.
#: Parameters: shard id, number of shards, ids, stamp, the time. Answers how many.
LEFT_GUILDS = (
    "WITH matched AS MATERIALIZED (SELECT g.id, g.left_at AS old_left_at, $5::timestamptz AS left_at FROM guilds g "
    "WHERE g.left_at IS NULL AND (g.id >> 22) % $2::int = $1::int AND g.id <> ALL($3::bigint[]) "
    "AND g.stamp < $4::bigint), "
    "changed AS (UPDATE guilds t SET left_at = d.left_at, stamp = $4, updated_at = now() FROM matched d "
    "WHERE t.id = d.id RETURNING t.id), "
    f"noted AS ({_history('guilds', ('left_at',), rows='matched', changed='changed')}) "
    "SELECT count(*) FROM changed"
)
