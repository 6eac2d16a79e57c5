"""Checks that ask the database."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from utils.database import Pool
from utils.database.pool import OLDEST_SERVER
from utils.exceptions import BackupError, DatabaseError
from utils.operations import migrations
from utils.operations.doctor.context import DoctorContext
from utils.operations.doctor.outside import skew
from utils.operations.doctor.report import TOLD, Finding
from utils.operations.migrations import invalid_indexes

#: The newest major that the tests run on; newer ones mostly work.
NEWEST_TESTED = 18
#: Connections beside the pool: the lease, the channel of the caches, and a migration.
BESIDE = 3

_RIGHTS = """
SELECT has_database_privilege(current_database(), 'CREATE') AS may_make_schemas,
    has_schema_privilege(current_schema(), 'CREATE') AS may_make_tables,
    has_database_privilege(current_database(), 'TEMP') AS may_make_temporary,
    (SELECT rolcreatedb OR rolsuper FROM pg_roles WHERE rolname = current_user) AS may_make_databases,
    current_user::text AS us, current_database()::text AS database
"""
_CONNECTIONS = """
SELECT current_setting('max_connections')::int AS most,
    CASE WHEN r.rolsuper THEN 0 ELSE current_setting('superuser_reserved_connections')::int
        + coalesce(current_setting('reserved_connections', true)::int, 0) END AS reserved,
    nullif(r.rolconnlimit, -1) AS of_role, nullif(d.datconnlimit, -1) AS of_database,
    (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND application_name <> 'guildbook')
        AS of_others
FROM pg_roles AS r CROSS JOIN pg_database AS d WHERE r.rolname = current_user AND d.datname = current_database()
"""


async def check_database(patient: DoctorContext) -> Sequence[Finding]:
    """Whether the database is reached, and of what version it is."""
    try:
        database = await patient.connect()
    except DatabaseError as exc:
        target = patient.target()
        where = f"{target} (from {target.source or 'PG*'})" if target is not None else "the embedded server"
        return [Finding("fail", "database", f"{where}: {' '.join(str(exc).split())[:TOLD]}",
                        "see that it runs, and that the address, the user and the password are right")]  # fmt: skip
    number = database.server_version_num
    major = number // 10_000
    said = f"PostgreSQL {major}.{number % 10_000} at {database.target}"
    if number < OLDEST_SERVER:  # the pool refuses it first
        return [Finding("fail", "database", said, f"use {OLDEST_SERVER // 10_000} or newer")]
    if major > NEWEST_TESTED:
        return [Finding("warn", "database", said, f"newer than what is tested ({NEWEST_TESTED}): look for an update")]
    return [Finding("ok", "database", said)]


async def check_rights(patient: DoctorContext) -> Sequence[Finding]:
    """Whether the user may make what the bot makes."""
    row = await _row(await patient.database(), _RIGHTS)
    wrong: list[Finding] = []
    user, name = _quoted(row["us"]), _quoted(row["database"])
    needed = {
        "may_make_schemas": ("no schema", " ".join(("CREATE ON DATABASE", name))),
        "may_make_tables": ("no table", "CREATE ON SCHEMA public"),
        "may_make_temporary": ("no temporary table", f"TEMPORARY ON DATABASE {name}"),
    }
    for right, (what, grant) in needed.items():
        if not row[right]:
            todo = " ".join(("as the database's owner: GRANT", grant, "TO", user))
            wrong.append(Finding("fail", "rights", f"{user} may make {what}", todo))
    if not row["may_make_databases"]:
        todo = " ".join(("as a superuser: ALTER ROLE", user, "CREATEDB"))
        wrong.append(
            Finding("warn", "rights", f"{user} may make no database: no drill, and no restore in one step", todo)
        )
    return wrong or [Finding("ok", "rights", f"{user} may make schemas, tables, temporary tables and databases")]


async def check_schema(patient: DoctorContext) -> Sequence[Finding]:
    """Whether the schema is what this version wants, and whether it may be brought there."""
    database = await patient.database()
    at, waiting = await migrations.current(database), await migrations.pending(database)
    off = await migrations.find_pause(database)
    upgrade = "run python bot.py db upgrade"
    found: list[Finding] = []
    if waiting:
        by_itself = patient.settings.auto_migrate and off is None
        seen = f"revision {at}, {len(waiting)} not applied" if at else "there is none yet"
        todo = "the next start applies them" if by_itself else upgrade
        found.append(Finding("warn" if by_itself else "fail", "schema", seen, todo))
    else:
        found.append(Finding("ok", "schema", f"revision {at}, the newest"))
        drift = await migrations.check_drift(database)
        if drift:
            some = "; ".join(drift[:3])[:200] + (f" and {len(drift) - 3} more" if len(drift) > 3 else "")
            todo = "undo what was changed by hand, or restore a backup (python bot.py db status lists all)"
            found.append(Finding("fail", "drift", f"tables differ from the models: {some}", todo))
        else:
            found.append(Finding("ok", "drift", "the tables are what the models say"))
    if off is not None:
        found.append(Finding("warn", "AUTO_MIGRATE", f"paused: {off}", upgrade + " to resume it"))
    broken = await invalid_indexes.find(database)
    if broken:
        found.append(Finding("warn", "indexes", f"invalid: {', '.join(broken)[:200]}", upgrade + ", which drops them"))
    else:
        found.append(Finding("ok", "indexes", "none is invalid"))
    return found


async def check_connections(patient: DoctorContext) -> Sequence[Finding]:
    """Whether the server has as many connections as the bot may open, also for two of it during a deployment."""
    patient.needs("DB_POOL_MAX", "DB_POOL_MIN")
    database = await patient.database()
    row = await _row(database, _CONNECTIONS)
    limits = [row["most"] - row["reserved"], row["of_role"], row["of_database"]]
    usable = min(limit for limit in limits if limit is not None)
    needed, free = patient.settings.db_pool_max + BESIDE, usable - row["of_others"]
    seen = f"up to {needed} needed of {usable}, {row['of_others']} used by others"
    todo = f"lower DB_POOL_MAX ({patient.settings.db_pool_max}), or raise the server's max_connections"
    if needed > usable:
        return [Finding("fail", "connections", seen, todo)]
    if needed > free:
        return [Finding("warn", "connections", seen, todo)]
    if 2 * needed > free:
        return [Finding("warn", "connections", f"{seen}: not enough for two processes during a deployment", todo)]
    return [Finding("ok", "connections", seen)]


async def check_clock(patient: DoctorContext) -> Sequence[Finding]:
    """Whether the database's clock and ours agree."""
    database = await patient.database()
    asked = time.time()
    theirs = float(await database.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8", timeout=5.0))
    return [skew("database", theirs - (asked + time.time()) / 2)]


async def check_tools(patient: DoctorContext) -> Sequence[Finding]:
    """Whether pg_dump and pg_restore of the server's major are here."""
    from utils.operations.backup import tools

    major = (await patient.database()).server_version_num // 10_000
    try:
        directory = await tools.found(major)
    except BackupError as exc:
        is_needed = patient.settings.backup_every is not None
        seen, _, todo = str(exc).partition("): ")
        return [Finding("fail" if is_needed else "warn", "tools", seen + ")" if todo else seen, todo)]
    return [Finding("ok", "tools", f"pg_dump and pg_restore {major} in {directory}")]


async def _row(database: Pool, query: str) -> Any:
    row = await database.fetchrow(query, timeout=5.0)
    assert row is not None, "it has always one"
    return row


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
