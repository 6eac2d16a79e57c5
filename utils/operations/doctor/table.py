"""The table of checks, and an examination from its beginning to its line in the books."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from utils.exceptions import DatabaseError
from utils.operations.action import record_action
from utils.operations.doctor import configuration, machine, outside, server
from utils.operations.doctor.context import CONNECT_SECONDS, START_SECONDS, DoctorContext
from utils.operations.doctor.report import Check, Finding, examined

#: Seconds for what asks the database: reaching it comes first, which may mean starting it.
_REACHED = CONNECT_SECONDS + START_SECONDS + 5.0

CHECKS: tuple[Check, ...] = (
    Check("settings", configuration.check_settings, 5.0),
    Check("variables", configuration.check_names, 5.0),
    Check("token", configuration.check_token, 5.0),
    Check("discord", outside.check_discord, outside.SECONDS + 2.0),
    Check("database", server.check_database, _REACHED),
    Check("rights", server.check_rights, _REACHED + 5.0),
    Check("schema", server.check_schema, _REACHED + 20.0),
    Check("connections", server.check_connections, _REACHED + 5.0),
    Check("clock", server.check_clock, _REACHED + 5.0),
    Check("disk", machine.check_disk, 10.0),
    Check("tools", server.check_tools, _REACHED + 20.0),
    Check("backups", machine.check_backups, 20.0),
    Check("spool", machine.check_spool, 10.0),
)


async def examine(patient: DoctorContext, checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """Return what every check has found, without secrets, and write the sums into the books if there are any.

    In bounded time, and without raising: what goes wrong is among the findings. The patient is closed.
    """
    try:
        found = await examined(patient, checks)
        found = [replace(one, seen=patient.hidden(one.seen), todo=patient.hidden(one.todo)) for one in found]
        await _write_down(patient, found)
        return found
    finally:
        await patient.close()


async def _write_down(patient: DoctorContext, found: Sequence[Finding]) -> None:
    database = patient.connected
    if database is None:
        return
    sums = ", ".join(f"{sum(one.state == state for one in found)} {state}" for state in ("ok", "warn", "fail"))
    wrong = ", ".join(dict.fromkeys(f"{one.name} {one.state}" for one in found if one.state != "ok"))
    try:
        if not await database.fetchval("SELECT to_regclass('ops.admin_actions') IS NULL", timeout=5.0):
            await record_action(database, "doctor", {}, sums + (f": {wrong}" if wrong else ""))
    except DatabaseError:  # it is the patient: a check has said why
        return
