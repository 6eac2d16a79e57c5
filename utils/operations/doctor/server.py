"""Checks that ask the database server."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from utils.database import Pool
from utils.database.placement import Placement
from utils.database.pool import OLDEST_SERVER, Record
from utils.database.sql import quote_identifier
from utils.exceptions import ClientToolsMissing, DatabaseError, DatabaseUnavailable
from utils.operations import migrations
from utils.operations.doctor.context import DoctorContext
from utils.operations.doctor.discord import report_skew
from utils.operations.doctor.report import Finding, shorten
from utils.operations.migrations import invalid_indexes
from utils.text import format_count

#: The newest major version that the tests run on.
NEWEST_TESTED = 18
#: Connections besides the pool: the lease, the caches' channel, and a migration.
EXTRA_CONNECTIONS = 3

_PRIVILEGES = """
SELECT has_database_privilege(current_database(), 'CREATE') AS may_create_schemas,
    coalesce(has_schema_privilege(to_regnamespace(quote_ident($1))::oid, 'CREATE'), true) AS may_create_tables,
    coalesce(has_schema_privilege(to_regnamespace(quote_ident($2))::oid, 'CREATE'), true) AS may_create_own_tables,
    to_regnamespace(quote_ident($1)) IS NOT NULL AND to_regnamespace(quote_ident($2)) IS NOT NULL AS has_schemas,
    has_database_privilege(current_database(), 'TEMP') AS may_create_temporary,
    current_user::text AS user, current_database()::text AS database
"""
_CONNECTIONS = """
SELECT current_setting('max_connections')::int AS total,
    CASE WHEN r.rolsuper THEN 0 ELSE current_setting('superuser_reserved_connections')::int
        + coalesce(current_setting('reserved_connections', true)::int, 0) END AS reserved,
    nullif(r.rolconnlimit, -1) AS role_limit, nullif(d.datconnlimit, -1) AS database_limit,
    (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND application_name <> 'guildbook')
        AS used_by_others
FROM pg_roles AS r CROSS JOIN pg_database AS d WHERE r.rolname = current_user AND d.datname = current_database()
"""


async def check_database(context: DoctorContext) -> Sequence[Finding]:
    """Check that the database can be reached, and the server's version."""
    try:
        pool = await context.connect()
    except DatabaseError as exc:
        target = context.target()
        where = f"{target} (from {target.source or 'PG*'})" if target is not None else "the embedded server"
        advice = "check that it runs, and that address, user and password are right"
        if not isinstance(exc, DatabaseUnavailable) and exc.sqlstate is None:
            advice = "use another database"  # it was reached; the message says what is wrong with it
        return [Finding("fail", "database", f"{where}: {shorten(exc)}", advice)]
    number = await _fetch_version(pool)
    major = number // 10_000
    seen = f"PostgreSQL {major}.{number % 10_000} at {pool.target}"
    if pool.placement != Placement():
        seen += f", schemas {pool.placement.main} and {pool.placement.ops}"
    if number < OLDEST_SERVER:  # the pool refuses it first
        return [Finding("fail", "database", seen, f"use version {OLDEST_SERVER // 10_000} or newer")]
    if (reason := await _fetch_read_only(pool)) is not None:
        return [Finding("fail", "database", f"{seen}, {reason[0]}", reason[1])]
    if major > NEWEST_TESTED:
        advice = f"newer than the newest tested version ({NEWEST_TESTED}): look for an update"
        return [Finding("warn", "database", seen, advice)]
    return [Finding("ok", "database", seen)]


async def check_privileges(context: DoctorContext) -> Sequence[Finding]:
    """Check that the user may create what the bot creates."""
    pool = await context.pool()
    placement = pool.placement
    row = await _fetch_row(pool, _PRIVILEGES, placement.main, placement.ops)
    user, database = _quote(row["user"]), _quote(row["database"])
    problems: list[Finding] = []
    required = {
        "may_create_schemas": ("schemas", " ".join(("CREATE ON DATABASE", database))),
        "may_create_tables": (
            f"tables in {placement.main}",
            " ".join(("CREATE ON SCHEMA", quote_identifier(placement.main))),
        ),
        "may_create_own_tables": (
            f"tables in {placement.ops}",
            " ".join(("CREATE ON SCHEMA", quote_identifier(placement.ops))),
        ),
        "may_create_temporary": ("temporary tables", f"TEMPORARY ON DATABASE {database}"),
    }
    for privilege, (objects, grant) in required.items():
        if not row[privilege]:
            advice = " ".join(("as the database's owner: GRANT", grant, "TO", user))
            # Both schemas may have been made by an administrator.
            is_optional = privilege == "may_create_schemas" and row["has_schemas"]
            seen = f"{user} may not create {objects}" + (": no drills and no restore" if is_optional else "")
            problems.append(Finding("warn" if is_optional else "fail", "rights", seen, advice))
    return problems or [Finding("ok", "rights", f"{user} may create schemas, tables and temporary tables")]


async def check_schema(context: DoctorContext) -> Sequence[Finding]:
    """Check the schema's revision, drift, the pause of AUTO_MIGRATE, and invalid indexes."""
    pool = await context.pool()
    current, pending = await migrations.current_heads(pool), await migrations.pending(pool)
    obstacle, revisions = await migrations.find_obstacle(pool), migrations.Revisions()
    paused = await migrations.find_pause(pool)
    upgrade = "run python bot.py db upgrade"
    findings: list[Finding] = []
    if obstacle is not None:
        findings.append(Finding("fail", "schema", obstacle))  # it says what to do
    elif revisions.needs_merge(current):
        seen = f"revision {', '.join(current)}, {len(pending)} pending on {len(revisions.heads)} branches"
        findings.append(Finding("fail", "schema", seen, revisions.merge_advice()))
    elif pending:
        is_automatic = context.settings.auto_migrate and paused is None
        seen = f"revision {', '.join(current)}, {len(pending)} pending" if current else "the database has no schema"
        advice = "the next start applies them" if is_automatic else upgrade
        findings.append(Finding("warn" if is_automatic else "fail", "schema", seen, advice))
    else:
        findings.append(Finding("ok", "schema", f"revision {', '.join(current)}, the newest"))
        findings.append(await _check_drift(pool))
    if paused is not None:
        findings.append(Finding("warn", "AUTO_MIGRATE", f"paused: {paused}", upgrade + " to resume it"))
    invalid = await invalid_indexes.find(pool)
    if invalid:
        seen = f"invalid: {', '.join(invalid)[:200]}"
        findings.append(Finding("warn", "indexes", seen, upgrade + ", which drops them"))
    else:
        findings.append(Finding("ok", "indexes", "none is invalid"))
    return findings


async def check_packs(context: DoctorContext) -> Sequence[Finding]:
    """Check the packs of COGS: what they need, pending revisions, drift; and tables that removed ones left."""
    context.require("COGS")
    states = await migrations.pack_states(await context.pool())
    findings = [_check_pack(state, is_automatic=context.settings.auto_migrate) for state in states]
    return findings or [Finding("ok", "packs", "COGS is empty")]


def _check_pack(state: migrations.PackState, *, is_automatic: bool) -> Finding:
    name, upgrade = f"pack {state.name}", "run python bot.py db upgrade"
    if not state.is_active:
        tables = format_count(len(state.relations), "table")
        seen = f"not in COGS; it left {tables}: {', '.join(state.relations)[:200]}"
        return Finding("warn", name, seen, f"put it back, or drop them: python bot.py pack drop {state.name}")
    if state.problem is not None:
        return Finding("fail", name, state.problem.removeprefix(f"{name}: "), "until then it is not loaded")
    if state.pending:
        advice = "the next start applies them" if is_automatic else upgrade
        return Finding("warn" if is_automatic else "fail", name, f"pending: {', '.join(state.pending)}", advice)
    if state.drift:
        advice = f"write a revision: python bot.py pack migration {state.name}"
        return Finding("warn", name, f"its tables differ from its models: {'; '.join(state.drift)[:200]}", advice)
    return Finding("ok", name, f"revision {', '.join(state.revisions) or 'none'}, the newest")


async def _check_drift(pool: Pool) -> Finding:
    drift = await migrations.check_drift(pool)
    if not drift:
        return Finding("ok", "drift", "the tables match the models")
    first = "; ".join(drift[:3])[:200] + (f" and {len(drift) - 3} more" if len(drift) > 3 else "")
    advice = "undo manual changes, or restore a backup (python bot.py db status lists all)"
    return Finding("fail", "drift", f"the tables differ from the models: {first}", advice)


async def check_connections(context: DoctorContext) -> Sequence[Finding]:
    """Check that the server has enough connections for the bot, and for two of them during a deployment."""
    context.require("DB_POOL_MAX", "DB_POOL_MIN")
    row = await _fetch_row(await context.pool(), _CONNECTIONS)
    limits = [row["total"] - row["reserved"], row["role_limit"], row["database_limit"]]
    usable = min(limit for limit in limits if limit is not None)
    needed, free = context.settings.db_pool_max + EXTRA_CONNECTIONS, usable - row["used_by_others"]
    seen = f"up to {needed} needed of {usable}, {row['used_by_others']} used by others"
    advice = f"lower DB_POOL_MAX ({context.settings.db_pool_max}), or raise the server's max_connections"
    if needed > usable:
        return [Finding("fail", "connections", seen, advice)]
    if needed > free:
        return [Finding("warn", "connections", seen, advice)]
    if 2 * needed > free:
        return [Finding("warn", "connections", f"{seen}: not enough for two processes during a deployment", advice)]
    return [Finding("ok", "connections", seen)]


async def check_clock(context: DoctorContext) -> Sequence[Finding]:
    """Check that the database's clock agrees with ours."""
    pool = await context.pool()
    started = time.time()
    theirs = float(await pool.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8", timeout=5.0))
    return [report_skew("database", theirs - (started + time.time()) / 2)]


async def check_tools(context: DoctorContext) -> Sequence[Finding]:
    """Check that pg_dump and pg_restore of the server's major version are installed."""
    from utils.operations.backup.archive import client_tools

    major = await _fetch_version(await context.pool()) // 10_000
    try:
        directory = await client_tools.find_directory(major)
    except ClientToolsMissing as exc:
        is_needed = context.settings.backup_every is not None
        return [Finding("fail" if is_needed else "warn", "tools", exc.problem, exc.advice)]
    return [Finding("ok", "tools", f"pg_dump and pg_restore {major} in {directory}")]


async def _fetch_read_only(pool: Pool) -> tuple[str, str] | None:
    """Return why transactions cannot write, and what to do; None if they can."""
    row = await _fetch_row(
        pool,
        "SELECT pg_is_in_recovery() AS is_standby, current_setting('transaction_read_only') = 'on' AS is_read_only,"
        " (SELECT source FROM pg_settings WHERE name = 'default_transaction_read_only') AS source",
    )
    if row["is_standby"]:
        return "a standby, which is read-only", "use the address of the primary"
    if row["is_read_only"]:
        advice = "ask the host: some set it when the disk is full; otherwise remove the setting"
        return f"read-only: default_transaction_read_only is on (set by: {row['source']})", advice
    return None


async def _fetch_version(pool: Pool) -> int:
    """Return the server's version now: the pool's is of its first connection."""
    return int(await pool.fetchval("SHOW server_version_num", timeout=5.0))


async def _fetch_row(pool: Pool, query: str, *arguments: Any) -> Record:
    row = await pool.fetchrow(query, *arguments, timeout=5.0)
    assert row is not None, "the query always returns one row"
    return row


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
