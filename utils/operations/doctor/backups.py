"""Checks of backups: the remote store, the newest backup, and the keys that they are encrypted with."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from utils.exceptions import BackupError, DatabaseError
from utils.operations.backup import recovery
from utils.operations.backup.archive import encryption, pipeline
from utils.operations.backup.archive.manifest import Manifest
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.catalog.entries import Entry, newest_good
from utils.operations.backup.catalog.keeping import find_alerts
from utils.operations.doctor.configuration import is_on_railway, names_in_file
from utils.operations.doctor.context import DoctorContext
from utils.operations.doctor.report import CheckSkipped, Finding, shorten
from utils.tasks import run_in_daemon_thread

#: How old the newest backup may be when none are scheduled.
MAX_BACKUP_AGE = timedelta(days=7)
#: Seconds for reading the newest archive.
CHECKSUM_SECONDS = 20.0
#: Begin the names of the variables of stores.
STORES = ("AWS_", "GOOGLE_", "AZURE_")
#: What is written to try a store. No backup has such a name; one that cannot be deleted is overwritten the next time.
PROBE, PROBE_CONTENT = "guildbook-probe", b"written by guildbook doctor\n"


async def check_bucket(context: DoctorContext) -> Sequence[Finding]:
    """Write, read and delete an object in the remote store."""
    unread = [name for name in names_in_file(context) if name.startswith(STORES) and name not in os.environ]
    advice = f"set {', '.join(unread)} in the environment of the process: stores do not read .env" if unread else ""
    try:
        remote = context.catalog().remote
    except BackupError as exc:
        return [Finding("fail", "bucket", shorten(exc), advice or "correct BACKUP_URL, or the variables of its store")]
    if remote is None:
        seen = "BACKUP_URL is not set: backups are stored in DATA_DIR/backups only"
        if is_on_railway(context.environ) and context.settings.railway_volume_mount_path is None:
            seen += ", which the next deployment deletes, because this Railway service has no volume"
            return [Finding("warn", "bucket", seen, "set BACKUP_URL to a bucket")]
        return [Finding("ok", "bucket", seen)]
    advice = advice or "until it works, backups are stored in DATA_DIR/backups only"
    try:
        await remote.write(PROBE, PROBE_CONTENT)
    except BackupError as exc:
        return [Finding("fail", "bucket", shorten(exc), advice)]
    try:
        found = await remote.read(PROBE, 2 * len(PROBE_CONTENT))
    except BackupError as exc:
        with contextlib.suppress(BackupError):
            await remote.delete(PROBE)
        return [Finding("fail", "bucket", shorten(exc), advice)]
    problem = None if found == PROBE_CONTENT else "what was written could not be read back"
    try:
        await remote.delete(PROBE)
    except BackupError as exc:
        advice = "allow deleting: otherwise old backups are kept for ever. Delete that object by hand"
        return [Finding("fail", "bucket", shorten(exc), advice)]
    if problem is not None:
        return [Finding("fail", "bucket", f"{remote.name}: {problem}", "use another store")]
    return [Finding("ok", "bucket", f"{remote.name}: an object was written, read and deleted")]


async def check_backups(context: DoctorContext) -> Sequence[Finding]:
    """Check the newest backup's age and checksum, retention and uploads, and whether the database has been lost."""
    context.require("BACKUP_AGE_RECIPIENT", "BACKUP_AGE_IDENTITY_FILE", "BACKUP_EVERY", "BACKUP_SIGNING_KEY")
    catalog = context.catalog()
    with contextlib.suppress(DatabaseError, CheckSkipped):  # other checks report them
        pool = await context.pool()
        loss = await recovery.find_loss(pool)
        hold = None if loss is None else await recovery.find_hold(pool, catalog, loss)
        if hold is not None:
            return [Finding("fail", "backups", hold.what_happened, hold.advice)]
        catalog = await catalog.serving(pool)
    entries, errors = await catalog.scan()
    findings = [Finding("warn", "backups", f"only the others are checked: {error}"[:300]) for error in errors]
    findings += [
        Finding("fail" if alert.is_fault else "warn", "backups", alert.text)
        for alert in find_alerts(catalog, entries, errors)
    ]
    every = context.settings.backup_every
    advice = "run python bot.py backup create" + ("" if every else ", or schedule backups with BACKUP_EVERY=1d")
    newest = newest_good(entries)
    if newest is None or newest.manifest is None:
        return [*findings, Finding("warn", "backups", "there is no good full backup of this database", advice)]
    damage, checked = await _check_archive(catalog, newest)
    if damage is not None:
        return [*findings, Finding("fail", "backups", f"the newest, {newest.id}, is damaged: {damage}"[:300], advice)]
    seen = f"the newest, {newest.id}, is {newest.age_text}; {checked}"
    max_age = timedelta(seconds=2 * every) if every else MAX_BACKUP_AGE
    is_old = newest.age > max_age
    return [*findings, Finding("warn", "backups", seen, advice) if is_old else Finding("ok", "backups", seen)]


async def _check_archive(catalog: BackupCatalog, entry: Entry) -> tuple[str | None, str]:
    """Return what is wrong with the local copy of an archive, and what was checked."""
    copy = entry.intact
    assert copy is not None, "a good backup has one"
    manifest = copy.manifest
    assert manifest is not None, "an intact one can be read"
    if copy.store is not catalog.local:
        return None, f"it is intact in {copy.store.name} only, where its size is right"
    path, deadline = catalog.local.path / manifest.file, time.monotonic() + CHECKSUM_SECONDS
    try:
        async with asyncio.timeout(CHECKSUM_SECONDS):
            digest = await run_in_daemon_thread(lambda: pipeline.file_digest(path, deadline=deadline))
    except TimeoutError:
        return None, f"its size is right, its checksum was not compared within {CHECKSUM_SECONDS:g} s"
    except OSError as exc:
        return f"{path}: {exc.strerror}", ""
    if digest.sha256 != manifest.sha256:
        return f"{path} does not have the checksum in its manifest", ""
    return None, "its checksum is right"


async def check_identity(context: DoctorContext) -> Sequence[Finding]:
    """Check that backups can be decrypted, if they are encrypted."""
    context.require("BACKUP_AGE_RECIPIENT", "BACKUP_AGE_IDENTITY_FILE")
    recipient, path = context.settings.backup_age_recipient, context.settings.backup_age_identity_file
    if path is None:
        seen = "BACKUP_AGE_RECIPIENT is not set: backups are not encrypted"
        if recipient is not None:
            seen = "backups are encrypted, and BACKUP_AGE_IDENTITY_FILE, which restores need, is not set here"
        return [Finding("ok", "identity", seen)]
    advice = "copy the file here that age-keygen wrote, or unset BACKUP_AGE_IDENTITY_FILE"
    try:
        identities = await run_in_daemon_thread(lambda: encryption.read_identities(path))
        matches = recipient is None or encryption.can_decrypt(recipient, identities)
    except encryption.KeyFileError as exc:
        return [Finding("fail", "identity", str(exc), advice)]
    if not matches:
        seen = f"the identity in {path} does not decrypt what is encrypted to BACKUP_AGE_RECIPIENT"
        return [Finding("fail", "identity", seen, "set both from the same file of age-keygen's")]
    findings: list[Finding] = []
    if recipient is None:
        seen = f"{path} can be read, but BACKUP_AGE_RECIPIENT is not set: new backups are not encrypted"
        findings.append(Finding("warn", "identity", seen, "set it to what age-keygen printed"))
    newest = await _newest_encrypted(context)
    if newest is not None and newest.recipient not in {str(identity.to_public()) for identity in identities}:
        seen = f"backup {newest.id} was encrypted to another recipient ({newest.recipient}): {path} does not decrypt it"
        findings.append(Finding("fail", "identity", seen, "add its identity to the file, or make a new backup"))
    if await run_in_daemon_thread(lambda: _is_readable_by_others(path)):
        seen = f"{path} can be read by other users of this machine"
        findings.append(Finding("warn", "identity", seen, f"run chmod 600 {path}"))
    return findings or [Finding("ok", "identity", f"{path} decrypts what is encrypted to BACKUP_AGE_RECIPIENT")]


async def _newest_encrypted(context: DoctorContext) -> Manifest | None:
    with contextlib.suppress(BackupError, CheckSkipped):  # check_backups reports them
        manifest = await context.catalog().newest()
        return manifest if manifest is not None and manifest.recipient is not None else None
    return None


def _is_readable_by_others(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & 0o077)
    except OSError:
        return False
