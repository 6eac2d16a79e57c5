"""Checks of this machine: free disk space and permissions, the health server's port, and leftover journals."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp

from utils.exceptions import SettingsError
from utils.operations.doctor.context import DoctorContext
from utils.operations.doctor.report import Finding, shorten
from utils.service.health import APPLICATION_HEADER, bind
from utils.tasks import run_in_daemon_thread
from utils.text import format_bytes

#: Free bytes below which the disk counts as full: PostgreSQL's write-ahead log alone grows in files of 16 MB.
MIN_FREE_BYTES = 200 * 2**20
#: The journals' directory under DATA_DIR; importing the bot's own constant would load discord.py.
SPOOL = "spool"


async def check_disk(
    context: DoctorContext, *, free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free
) -> Sequence[Finding]:
    """Check that DATA_DIR is writable and has enough free space."""
    directory = context.data_dir
    free, error = await run_in_daemon_thread(lambda: _probe(directory, free_bytes))
    if error is not None:
        advice = "give the directory to the user that the bot runs as, or set DATA_DIR to another"
        return [Finding("fail", "disk", f"{directory} is not writable: {error}", advice)]
    seen = f"{format_bytes(free)} free under {directory}"
    if free < MIN_FREE_BYTES:
        return [Finding("fail", "disk", seen, "free some space, or set DATA_DIR to a larger disk")]
    spool = context.settings.spool_max_mb * 2**20 if context.settings.spool != "off" else 0
    if free < MIN_FREE_BYTES + spool:
        advice = (
            f"free some space, or lower SPOOL_MAX_MB ({context.settings.spool_max_mb}): an outage of the database would"
            " fill the disk"
        )
        return [Finding("warn", "disk", seen, advice)]
    return [Finding("ok", "disk", seen)]


def _probe(directory: Path, free_bytes: Callable[[Path], int]) -> tuple[int, str | None]:
    """Return the free bytes, and the error of writing a file there, None if it works. Leaves nothing behind."""
    existing = directory.expanduser().resolve()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent  # the first start creates the rest
    free = free_bytes(existing)
    try:
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"x")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as exc:
        return free, exc.strerror or type(exc).__name__
    return free, None


async def check_port(context: DoctorContext, *, timeout: float = 3.0) -> Sequence[Finding]:
    """Check that the health server's port is free, or used by this bot."""
    context.require("PORT", "HEALTH_PORT", "HEALTH_HOST")
    settings = context.settings
    port, host = settings.effective_health_port, settings.health_host
    if port is None:
        return [Finding("ok", "port", "neither PORT nor HEALTH_PORT is set: there is no health server")]
    if context.is_bot:
        return [Finding("ok", "port", f"this bot uses port {port}")]
    try:
        sockets = await bind(host, port)
    except SettingsError as exc:
        address = "127.0.0.1" if host in (None, "", "0.0.0.0", "::") else host
        address = f"[{address}]" if ":" in address else address
        if await _answers(f"http://{address}:{port}/healthz", settings.application_id, timeout):
            return [Finding("ok", "port", f"the running bot answers on port {port}")]
        is_taken = isinstance(exc.__cause__, OSError) and exc.__cause__.errno == errno.EADDRINUSE
        advice = (
            "end the other process, or set another port" if is_taken else "set another port, or another HEALTH_HOST"
        )
        return [Finding("fail", "port", shorten(exc), advice)]
    for bound in sockets:
        bound.close()
    return [Finding("ok", "port", "any free port" if port == 0 else f"port {port} is free")]


async def _answers(url: str, application_id: int | None, timeout: float) -> bool:
    """Return whether a bot of this application answers at a URL."""
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout)) as session,
            session.get(url, allow_redirects=False) as response,
        ):
            return response.headers.get(APPLICATION_HEADER) == str(application_id or "")
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return False


async def check_spool(context: DoctorContext) -> Sequence[Finding]:
    """Look for journals of processes that ended before their events reached the database."""
    from utils.mirror.spool import journal

    directory = context.data_dir / SPOOL

    def count() -> tuple[int, int, int]:
        journals = journal.list_journals(directory)
        dead = [path for path in journals if journal.is_dead(directory, path.name)]
        size = sum(entry.stat().st_size for path in dead for entry in path.iterdir() if entry.is_file())
        return len(journals), len(dead), size

    total, dead, size = await run_in_daemon_thread(count)
    if dead:
        seen = f"{dead} journals of processes that have ended, {format_bytes(size)}"
        return [Finding("warn", "spool", seen, "start the bot: it writes them to the database")]
    return [Finding("ok", "spool", f"{total} in use" if total else "no leftover journals")]
