"""Checks of the database's address: poolers, ignored parameters, and what is special about hosts."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Sequence

from utils.database import ConnectTarget
from utils.exceptions import GuildbookError
from utils.operations.doctor.context import NEON_SUFFIX, DoctorContext
from utils.operations.doctor.report import CheckSkipped, Finding
from utils.tasks import run_in_daemon_thread

#: Supabase's direct hosts, which have IPv6 addresses only; its poolers are `….pooler.supabase.com`.
_SUPABASE_DIRECT = re.compile(r"db\.[a-z0-9]+\.supabase\.(co|com|net)", re.IGNORECASE)
#: Seconds that a suspended Neon database may take to wake up.
WAKE_UP_SECONDS = 15.0


async def check_address(context: DoctorContext) -> Sequence[Finding]:
    """Report poolers, ignored parameters of the address, and the peculiarities of Neon and Supabase."""
    known = context.target()
    if known is None:
        return [Finding("ok", "address", "the embedded server")]
    direct: ConnectTarget = known
    target = context.settings.target or direct
    findings = [Finding("ok", "address", note) for note in dict.fromkeys((*target.notes, *direct.notes))]
    findings += describe_host(direct, context.settings.db_connect_timeout)
    findings += await run_in_daemon_thread(lambda: find_unreachable(known))
    try:
        direct = (await context.connect()).target  # which knows by now whether it is a pooler
    except (GuildbookError, CheckSkipped):  # check_database reports them
        if not direct.pooled:
            return [*findings, Finding("warn", "pooler", "not checked: the database cannot be reached")]
    return [*findings, _describe_pooler(target, direct)]


def _describe_pooler(target: ConnectTarget, direct: ConnectTarget) -> Finding:
    if direct.pooled:
        seen = f"{direct} is a pooler: transaction mode is assumed, so backups and notifications are off"
        return Finding(
            "warn", "pooler", seen, "set DATABASE_UNPOOLED_URL to the direct address (or pgbouncer=false in this one)"
        )
    if target.pooled:
        return Finding("ok", "pooler", f"{target}, bypassed through {direct.source or 'the direct address'}")
    return Finding("ok", "pooler", "none")


def describe_host(target: ConnectTarget, connect_timeout: float) -> list[Finding]:
    """Return what is special about a host of Neon's: it suspends."""
    if not any(host.endswith(NEON_SUFFIX) for host in target.hosts):
        return []
    seen = (
        "Neon suspends an idle database, and waking it up takes seconds; while the bot runs its lease keeps it awake,"
        " which uses compute hours"
    )
    if connect_timeout < WAKE_UP_SECONDS:
        return [Finding("warn", "address", seen, f"set DB_CONNECT_TIMEOUT to {WAKE_UP_SECONDS:g} or more")]
    return [Finding("ok", "address", seen)]


def find_unreachable(
    target: ConnectTarget, *, has_route: Callable[[str, socket.AddressFamily], bool] | None = None
) -> list[Finding]:
    """Return a failure if the host is Supabase's direct one, which needs IPv6, and there is no IPv6 here. Blocks."""
    has_route = has_route or _has_route
    for host in target.hosts:
        if not _SUPABASE_DIRECT.fullmatch(host):
            continue
        if has_route(host, socket.AF_INET) or has_route(host, socket.AF_INET6):
            continue
        seen = f"{host} is Supabase's direct host, which has an IPv6 address only, and this machine has no IPv6"
        advice = "use the session pooler's address (Supabase: Connect > Session pooler, port 5432), or the IPv4 add-on"
        return [Finding("fail", "address", seen, advice)]
    return []


def _has_route(host: str, family: socket.AddressFamily) -> bool:
    """Return whether the host has an address of the family and the kernel a route to it; nothing is sent."""
    try:
        for _, _, _, _, address in socket.getaddrinfo(host, 5432, family, socket.SOCK_DGRAM):
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)
                return True
    except OSError:
        return False
    return False
