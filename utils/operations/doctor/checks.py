"""The list of checks, and running them all."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from utils.exceptions import DatabaseError
from utils.operations.action import Outcome, record_action
from utils.operations.backup.store import ANSWER_SECONDS
from utils.operations.doctor import address, backups, configuration, discord, machine, server
from utils.operations.doctor.context import CONNECT_SECONDS, START_SECONDS, DoctorContext
from utils.operations.doctor.report import Check, Finding, run_check

#: Seconds for connecting to the database, which may mean starting the embedded server.
_CONNECT = CONNECT_SECONDS + START_SECONDS + 5.0
#: Seconds for one answer of a store of backups.
_STORE = ANSWER_SECONDS + 2.0

CHECKS: tuple[Check, ...] = (
    Check("settings", configuration.check_settings, 5.0),
    Check("variables", configuration.check_variables, 5.0),
    Check("token", configuration.check_token, 5.0),
    Check("discord", discord.check_discord, discord.REQUEST_SECONDS + 2.0),
    Check("permissions", discord.check_permissions, discord.REQUEST_SECONDS + 2.0),
    Check("admin guild", discord.check_admin_guild, discord.REQUEST_SECONDS + 2.0),
    Check("cogs", configuration.check_cogs, 5.0),
    Check("database", server.check_database, _CONNECT),
    Check("address", address.check_address, _CONNECT + 10.0),
    Check("rights", server.check_privileges, _CONNECT + 5.0),
    Check("schema", server.check_schema, _CONNECT + 20.0),
    Check("packs", server.check_packs, _CONNECT + 20.0),
    Check("connections", server.check_connections, _CONNECT + 5.0),
    Check("clock", server.check_clock, _CONNECT + 5.0),
    Check("disk", machine.check_disk, 10.0),
    Check("tools", server.check_tools, _CONNECT + 20.0),
    Check("bucket", backups.check_bucket, 3 * _STORE),
    Check("backups", backups.check_backups, _CONNECT + 3 * _STORE + backups.CHECKSUM_SECONDS),
    Check("identity", backups.check_identity, 3 * _STORE),
    Check("spool", machine.check_spool, 10.0),
    Check("port", machine.check_port, 10.0),
    Check("draining", configuration.check_draining, 5.0),
)


async def run_checks(context: DoctorContext, checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """Run checks concurrently and return their findings in the checks' order, without secrets. Closes the context.

    Takes bounded time and raises nothing. A summary goes to the audit log, if the database has one.
    """
    try:
        findings = [
            replace(finding, seen=context.redact(finding.seen), todo=context.redact(finding.todo))
            for found in await asyncio.gather(*(run_check(context, check) for check in checks))
            for finding in found
        ]
        await _record(context, findings)
        return findings
    finally:
        await context.close()


def summarize_findings(findings: Sequence[Finding]) -> Outcome:
    """Return the problems, worst first, the names of what is ok, and all findings as a file.

    All of them together are longer than a message of Discord's.
    """
    problems = [finding for state in ("fail", "warn") for finding in findings if finding.state == state]
    troubled = {finding.name for finding in problems}
    fine = dict.fromkeys(finding.name for finding in findings if finding.name not in troubled)
    lines = [finding.line for finding in problems] + ([f"ok    {', '.join(fine)}"] if fine else [])
    return Outcome(
        "\n".join(lines),
        ok=all(finding.state != "fail" for finding in findings),
        file=("health.txt", "\n".join(finding.line for finding in findings)),
    )


async def _record(context: DoctorContext, findings: Sequence[Finding]) -> None:
    pool = context.connected_pool
    if pool is None:
        return
    counts = ", ".join(
        f"{sum(finding.state == state for finding in findings)} {state}" for state in ("ok", "warn", "fail")
    )
    problems = dict.fromkeys(f"{finding.name} {finding.state}" for finding in findings if finding.state != "ok")
    result = counts + (f": {', '.join(problems)}" if problems else "")
    try:
        if not await pool.fetchval("SELECT to_regclass('ops.admin_actions') IS NULL", timeout=5.0):
            await record_action(pool, "doctor", {}, result)
    except DatabaseError:  # a check has reported why
        return
