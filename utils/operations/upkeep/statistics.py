"""The figures of `/db stats` and `db stats`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from utils.database import Pool
from utils.operations.action import Outcome
from utils.operations.upkeep.sizes import Sample, Size, growth, sizes
from utils.text import format_bytes

#: Tables shown to people, the largest; `--json` has all.
SHOWN = 12
#: Syncs and slow statements shown.
LAST = 3
#: Characters of a slow statement that are shown.
STATEMENT = 80

_ACTIVE = """
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
_SYNCS = """
SELECT guild_id, finished_at, error, rows_seen, rows_inserted, rows_updated, rows_left
FROM sync_runs WHERE finished_at IS NOT NULL ORDER BY id DESC LIMIT $1
"""


@dataclass(frozen=True, slots=True)
class Statistics:
    """How the database fares."""

    at: datetime
    #: What the server says of itself: version, bytes, buffer_hits (percent), deadlocks, temp_files.
    server: dict[str, Any]
    #: Sessions, how many are active or in a transaction, and the seconds of the longest one.
    activity: dict[str, Any]
    tables: list[Size]
    growth: list[Sample]
    syncs: list[dict[str, Any]]
    #: The newest backups, as the manifests say; empty without any.
    backups: list[dict[str, Any]]
    #: What `Guildbook.stats` says; None from the command line, where no bot is asked.
    bot: Mapping[str, Any] | None


async def collect(
    database: Pool, *, bot: Mapping[str, Any] | None = None, backups: Sequence[Mapping[str, Any]] = ()
) -> Statistics:
    """Ask the database how it fares. Raises `DatabaseError`."""
    server, activity = await database.fetchrow(_SERVER), await database.fetchrow(_ACTIVE)
    return Statistics(
        at=database.now(),
        server=dict(server or {}),
        activity=dict(activity or {}),
        tables=await sizes(database),
        growth=await growth(database),
        syncs=[dict(row) for row in await database.fetch(_SYNCS, LAST)],
        backups=[dict(backup) for backup in backups],
        bot=bot,
    )


def outcome(found: Statistics) -> Outcome:
    """Return the figures in plain lines and as JSON."""
    heading = f"PostgreSQL {found.server['version']}, {format_bytes(found.server['bytes'])}"
    lines = [heading, *(f"{name}: {value}" for name, value in figures(found).items()), ""]
    lines += [f"{one.name:<28} {one.rows:>14,} rows {format_bytes(one.bytes):>10}" for one in found.tables[:SHOWN]]
    return Outcome("\n".join(lines), data=asdict(found))


def figures(found: Statistics) -> dict[str, str]:
    """Return what is worth a line each: its name, and what it is."""
    shown = {
        "Rows": f"about {sum(one.rows for one in found.tables):,} in {len(found.tables)} tables,"
        f" {sum(one.dead for one in found.tables):,} dead",
        "Sessions": f"{found.activity['sessions']}, {found.activity['active']} active,"
        f" {found.activity['transactions']} in a transaction (longest {found.activity['longest']:.1f} s)",
        "Buffers": f"{found.server['buffer_hits']:g} % hits, {found.server['deadlocks']} deadlocks",
        "Growth": _growth(found.growth),
        "Last syncs": "; ".join(map(_sync, found.syncs)) or "none yet",
        "Last backups": "; ".join(map(_backup, found.backups[:LAST])) or "none",
    }
    return shown if found.bot is None else shown | _of_bot(found.bot)


def _of_bot(bot: Mapping[str, Any]) -> dict[str, str]:
    pool, data = bot["pool"], bot["database"]
    cache, slow = data.get("cache"), data["slow"]
    shown = {"Pool": ", ".join(f"{name} {number}" for name, number in pool.items())}
    if cache:
        shown["Cache"] = f"{cache['hit_rate'] * 100:.1f} % hits, {cache['size']:,} results"
    if bot.get("buffer"):
        queue, spool = bot["queue"], bot["spool"]
        on_disk = "no spool" if spool is None else f"spool {format_bytes(spool['bytes'])}"
        shown["Waiting"] = f"{bot['buffer']['rows']:,} rows, {queue['events']:,} events, {on_disk}"
    latest = "; ".join(f"{one['ms']:.0f} ms {one['sql'][:STATEMENT]} ({one['caller']})" for one in slow[-LAST:])
    shown["Slow queries"] = f"{data['slow_count']}" + (f": {latest}" if latest else "")
    shown["Open transactions"] = f"{len(data['transactions'])} of cogs"
    return shown


def _growth(samples: list[Sample]) -> str:
    if len(samples) < 2:
        return "not known yet: a sample is taken every six hours"
    first, last = samples[0], samples[-1]
    days = max((last.at - first.at).total_seconds() / 86_400, 1 / 24)
    change = last.bytes - first.bytes
    return f"{'+' if change >= 0 else '-'}{format_bytes(abs(change))} in {days:.1f} days"


def _sync(run: Mapping[str, Any]) -> str:
    what = f"failed: {run['error']}" if run["error"] else f"{run['rows_seen']:,} seen, {run['rows_updated']:,} changed"
    return f"{run['finished_at']:%Y-%m-%d %H:%M} guild {run['guild_id']} ({what})"


def _backup(backup: Mapping[str, Any]) -> str:
    return str(backup.get("line") or backup.get("id"))
