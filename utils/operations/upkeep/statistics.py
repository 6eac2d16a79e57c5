"""Statistics: how large the tables are, how they grow, and what the server and the bot are doing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from utils.database import Pool
from utils.operations.action import Outcome
from utils.text import format_bytes, format_count, format_duration

#: Seconds between two samples of the table sizes.
SAMPLE_SECONDS = 6 * 3_600.0
#: How long samples are kept, and after how many days only the first of each day is.
RETENTION_DAYS, FULL_RESOLUTION_DAYS = 400, 31
#: Tables that the text lists, the largest; `--json` has all.
LISTED_TABLES = 12
#: Syncs, backups and slow statements that the text lists.
LISTED_EVENTS = 3
#: Most characters of a slow statement.
STATEMENT_LENGTH = 80

#: Name, estimated rows and bytes of every table in our schemas; partitions count with their table. A
#: table that was never analyzed has -1 rows (PostgreSQL manual, pg_class): the statistics' live rows stand in.
_SIZES = """
SELECT CASE n.nspname WHEN $1 THEN c.relname ELSE 'ops.' || c.relname END AS name, sizes.rows, sizes.bytes, sizes.dead
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
CROSS JOIN LATERAL (
    SELECT coalesce(sum(CASE WHEN l.reltuples < 0 THEN s.n_live_tup ELSE l.reltuples::bigint END), 0)::bigint AS rows,
        coalesce(sum(pg_total_relation_size(l.oid)), 0)::bigint AS bytes,
        coalesce(sum(s.n_dead_tup), 0)::bigint AS dead
    FROM pg_class AS l LEFT JOIN pg_stat_all_tables AS s ON s.relid = l.oid
    WHERE l.relkind IN ('r', 'm')
        AND (l.oid = c.oid OR l.oid IN (SELECT relid FROM pg_partition_tree(c.oid) WHERE isleaf))
) AS sizes
WHERE c.relkind IN ('r', 'p', 'm') AND NOT c.relispartition AND c.relpersistence <> 't'
    AND n.nspname IN ($1, $2)
ORDER BY sizes.bytes DESC, name
"""
_SAMPLE = """
INSERT INTO ops.table_sizes (at, table_name, rows, bytes)
SELECT $1, * FROM unnest($2::text[], $3::bigint[], $4::bigint[])
"""
_THIN_OUT = """
DELETE FROM ops.table_sizes WHERE at < $1 OR at < $2 AND at NOT IN (
    SELECT min(at) FROM ops.table_sizes WHERE at < $2 GROUP BY date_trunc('day', at, 'UTC')
)
"""
_GROWTH = (
    "SELECT at, sum(bytes)::bigint AS bytes, sum(rows)::bigint AS rows FROM ops.table_sizes GROUP BY at ORDER BY at"
)
_ACTIVITY = """
SELECT count(*) AS sessions, count(*) FILTER (WHERE state = 'active' AND pid <> pg_backend_pid()) AS active,
    count(*) FILTER (WHERE xact_start IS NOT NULL AND pid <> pg_backend_pid()) AS transactions,
    coalesce(extract(epoch FROM max(now() - xact_start) FILTER (WHERE pid <> pg_backend_pid())), 0)::float8 AS longest
FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'
"""
_SERVER = """
SELECT current_setting('server_version') AS version, pg_database_size(current_database()) AS bytes,
    coalesce(round(blks_hit * 100.0 / nullif(blks_hit + blks_read, 0), 1), 100)::float8 AS buffer_hits,
    deadlocks, temp_files FROM pg_stat_database WHERE datname = current_database()
"""
_PEOPLE = """
SELECT clock_timestamp() AS at, g.guilds, g.unavailable, u.users, u.bots
FROM (SELECT count(*) FILTER (WHERE NOT unavailable) AS guilds, count(*) FILTER (WHERE unavailable) AS unavailable
      FROM guilds WHERE left_at IS NULL) AS g,
    (SELECT count(*) AS users, count(*) FILTER (WHERE bot) AS bots FROM users) AS u
"""
_SYNCS = """
SELECT guild_id, finished_at, error, rows_seen, rows_inserted, rows_updated, rows_left
FROM sync_runs WHERE finished_at IS NOT NULL ORDER BY id DESC LIMIT $1
"""


@dataclass(frozen=True, slots=True)
class TableSize:
    """One table with its partitions, indexes and TOAST data."""

    name: str
    #: The planner's estimate.
    rows: int
    bytes: int
    #: Dead rows that a vacuum has yet to remove, also estimated.
    dead: int


@dataclass(frozen=True, slots=True)
class Sample:
    """The size of all tables together at one time."""

    at: datetime
    bytes: int
    rows: int


@dataclass(frozen=True, slots=True)
class Statistics:
    """What `/db stats` and `db stats` show."""

    at: datetime
    #: version, bytes, buffer_hits (percent), deadlocks, temp_files.
    server: dict[str, Any]
    #: sessions, active, transactions, and longest: the age of the oldest transaction in seconds.
    activity: dict[str, Any]
    tables: list[TableSize]
    growth: list[Sample]
    syncs: list[dict[str, Any]]
    #: `id` and `line` of each backup, newest first.
    backups: list[dict[str, Any]]
    #: What is wrong with them, or why those in some stores are not known; one line each.
    problems: list[str]
    #: `Guildbook.stats()`; None on the command line, where no bot runs.
    bot: Mapping[str, Any] | None
    #: See `count_people`; None: not counted.
    people: Mapping[str, Any] | None = None


async def table_sizes(pool: Pool) -> list[TableSize]:
    """Return the size of every table in our schemas, the largest first. Raises `DatabaseError`."""
    rows = await pool.fetch(_SIZES, pool.placement.main, pool.placement.ops)
    return [TableSize(**dict(row)) for row in rows]


async def count_people(pool: Pool) -> dict[str, Any]:
    """Return the mirrored `guilds`, those `unavailable` in an outage, `users`, the `bots` among them, and `at`: when.

    Raises `DatabaseError`.
    """
    return dict(await pool.fetchrow(_PEOPLE) or {})


async def sample_sizes(pool: Pool, *, now: datetime | None = None) -> int:
    """Record the current sizes in `ops.table_sizes`, delete old samples, and return the number of tables.

    `now`: the time of the sample; the database's by default.
    """
    now, tables = now or pool.now(), await table_sizes(pool)
    columns = [[table.name for table in tables], [table.rows for table in tables], [table.bytes for table in tables]]
    async with pool.transaction() as connection:
        await connection.execute(_SAMPLE, now, *columns)
        await connection.execute(
            _THIN_OUT, now - timedelta(days=RETENTION_DAYS), now - timedelta(days=FULL_RESOLUTION_DAYS)
        )
    return len(tables)


async def read_growth(pool: Pool) -> list[Sample]:
    """Return all samples, oldest first."""
    return [Sample(**dict(row)) for row in await pool.fetch(_GROWTH)]


async def collect(
    pool: Pool,
    *,
    bot: Mapping[str, Any] | None = None,
    backups: Sequence[Mapping[str, Any]] = (),
    problems: Sequence[str] = (),
) -> Statistics:
    """Return the statistics. Raises `DatabaseError`.

    Parameters
    ----------
    bot: `Guildbook.stats()`; None without a bot.
    backups, problems: see `Statistics`.
    """
    server, activity = await pool.fetchrow(_SERVER), await pool.fetchrow(_ACTIVITY)
    return Statistics(
        at=pool.now(),
        server=dict(server or {}),
        activity=dict(activity or {}),
        people=await count_people(pool),
        tables=await table_sizes(pool),
        growth=await read_growth(pool),
        syncs=[dict(row) for row in await pool.fetch(_SYNCS, LISTED_EVENTS)],
        backups=[dict(backup) for backup in backups],
        problems=list(problems),
        bot=bot,
    )


def outcome(statistics: Statistics) -> Outcome:
    """Return the statistics as text and JSON."""
    lines = [f"PostgreSQL {statistics.server['version']}, {format_bytes(statistics.server['bytes'])}"]
    lines += [*(f"{name}: {value}" for name, value in summarize(statistics).items()), ""]
    lines += [
        f"{table.name:<28} {table.rows:>14,} {'row' if table.rows == 1 else 'rows':<4} {format_bytes(table.bytes):>10}"
        for table in statistics.tables[:LISTED_TABLES]
    ]
    return Outcome("\n".join(lines), data=asdict(statistics))


def _name_guild(guild_id: int) -> str:
    return f"guild {guild_id}"


def _format_time(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def summarize(
    statistics: Statistics,
    *,
    name_guild: Callable[[int], str] = _name_guild,
    format_time: Callable[[datetime], str] = _format_time,
) -> dict[str, str]:
    """Return the name and value of each line of the summary.

    `name_guild` and `format_time` return how guilds and times are shown; by default as in a shell.
    """
    activity, server, tables = statistics.activity, statistics.server, statistics.tables
    people = statistics.people
    lines = {} if people is None else _summarize_people(people)
    lines |= {
        "Rows": f"about {sum(table.rows for table in tables):,} in {format_count(len(tables), 'table')},"
        f" {sum(table.dead for table in tables):,} dead",
        "Sessions": f"{activity['sessions']}, {activity['active']} active,"
        f" {activity['transactions']} in a transaction (longest {activity['longest']:.1f} s)",
        "Buffers": f"{server['buffer_hits']:g} % hits, {format_count(server['deadlocks'], 'deadlock')}",
        "Growth": _describe_growth(statistics.growth),
        "Last syncs": "; ".join(_describe_sync(run, name_guild, format_time) for run in statistics.syncs) or "none yet",
        "Last backups": "; ".join(map(_describe_backup, statistics.backups[:LISTED_EVENTS])) or "none",
    }
    if statistics.problems:
        lines["Backup problems"] = "; ".join(statistics.problems)
    return lines if statistics.bot is None else lines | _summarize_bot(statistics.bot)


def _summarize_people(people: Mapping[str, Any]) -> dict[str, str]:
    outage = f", {people['unavailable']:,} more in an outage" if people["unavailable"] else ""
    return {
        "Guilds": f"{people['guilds']:,}{outage}",
        "Users": f"{people['users']:,}, {format_count(people['bots'], 'bot')} among them",
    }


def _summarize_bot(bot: Mapping[str, Any]) -> dict[str, str]:
    database = bot["database"]
    cache, slow = database.get("cache"), database["slow"]
    lines = {"Pool": ", ".join(f"{name} {number}" for name, number in bot["pool"].items())}
    if cache:
        lines["Cache"] = f"{cache['hit_rate']:.1f} % hits, {format_count(cache['size'], 'result')}"
    if bot.get("buffer"):
        queue, spool = bot["queue"], bot["spool"]
        on_disk = "no spool" if spool is None else f"spool {format_bytes(spool['bytes'])}"
        rows, events = format_count(bot["buffer"]["rows"], "row"), format_count(queue["events"], "event")
        lines["Waiting"] = f"{rows}, {events}, {on_disk}"
    latest = "; ".join(
        f"{one['ms']:.0f} ms {one['sql'][:STATEMENT_LENGTH]} ({one['caller']})" for one in slow[-LISTED_EVENTS:]
    )
    lines["Slow queries"] = f"{database['slow_count']}" + (f": {latest}" if latest else "")
    lines["Open transactions"] = f"{len(database['transactions'])} of cogs"
    return lines


def _describe_growth(samples: Sequence[Sample]) -> str:
    if len(samples) < 2:
        return "not known yet: a sample is taken every six hours"
    first, last = samples[0], samples[-1]
    change = last.bytes - first.bytes
    return f"{'+' if change >= 0 else '-'}{format_bytes(abs(change))} in {format_duration(last.at - first.at)}"


def _describe_sync(
    run: Mapping[str, Any], name_guild: Callable[[int], str], format_time: Callable[[datetime], str]
) -> str:
    result = (
        f"failed: {run['error']}" if run["error"] else f"{run['rows_seen']:,} seen, {run['rows_updated']:,} changed"
    )
    return f"{name_guild(run['guild_id'])} {format_time(run['finished_at'])} ({result})"


def _describe_backup(backup: Mapping[str, Any]) -> str:
    return str(backup.get("line") or backup.get("id"))
