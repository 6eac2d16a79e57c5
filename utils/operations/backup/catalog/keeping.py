"""Which backups a catalog deletes, uploads and warns of."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache

from utils.exceptions import BackupError, MigrationError
from utils.operations.backup.archive.manifest import (
    ACCEPTED_SUFFIX,
    ARCHIVE_SUFFIX,
    DRILL_SUFFIX,
    ENCRYPTED_SUFFIX,
    ID,
    MANIFEST_SUFFIX,
    Manifest,
    created_at,
)
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.catalog.entries import Entry, damaged_since, newest_good
from utils.operations.backup.catalog.retention import AHEAD, Drop, RetentionRules, find_drops, first_drops, ids_to_keep
from utils.operations.backup.store import Store
from utils.operations.migrations import Revisions

#: Hours after which a file without a manifest in a store counts as left by an interrupted upload.
ORPHAN_HOURS = 24.0


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that operators should know of the backups."""

    #: The same for as long as it is the same trouble, although `text` may change.
    key: str
    #: What it is, and what to do, for people.
    text: str
    #: False if it ends by itself.
    is_fault: bool = True


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a prune deleted, or would delete."""

    ids: list[str]
    #: Number of files, those of interrupted uploads included.
    files: int
    #: Number of own backups before.
    total: int
    #: Why nothing was deleted: the newest backup has much less than the ones before; None if it has not.
    pause: Drop | None = None
    #: Stores that did not answer.
    errors: tuple[str, ...] = ()


def drops_among(entries: Sequence[Entry]) -> list[Drop]:
    """Return the backups that have much less than earlier ones, oldest first, without what operators accepted."""
    intact = [entry.intact.manifest for entry in entries if entry.is_own and entry.intact is not None]
    accepted = {entry.id for entry in entries if entry.is_accepted}
    return find_drops([one for one in intact if one is not None], accepted, _is_older)


def find_pause(entries: Sequence[Entry]) -> Drop | None:
    """Return why nothing may be deleted now: the newest backup is a drop; None if it is not."""
    newest = newest_good(entries)
    return next((drop for drop in drops_among(entries) if newest is not None and drop.after.id == newest.id), None)


def lacking_remotely(catalog: BackupCatalog, entries: Sequence[Entry]) -> list[str]:
    """Return the ids of those of the backups that the remote store lacks and would keep, oldest first."""
    if catalog.remote is None:
        return []
    there = _intact_in(catalog.remote, entries)
    here = _intact_in(catalog.local, entries)
    # A damaged copy there is a reason to upload again; a foreign backup here is not.
    lacking = {id: manifest for id, manifest in here.items() if id not in there}
    rules = RetentionRules.of(catalog.settings)
    keep = ids_to_keep([*there.values(), *lacking.values()], rules, catalog.clock())
    return [one.id for one in sorted(lacking.values(), key=lambda one: one.order) if one.id in keep]


def find_alerts(catalog: BackupCatalog, entries: Sequence[Entry], errors: Sequence[str] = ()) -> list[Alert]:
    """Return what is wrong with the backups of the catalog's database.

    entries, errors: what `scan` returned.
    """
    pause = find_pause(entries)
    alerts = [] if pause is None else [Alert(f"drop after {pause.before.id}", pause.line)]
    alerts += [
        Alert(f"damage of {entry.id}", f"backup {entry.id} is damaged: {entry.problem}")
        for entry in damaged_since(newest_good(entries), entries)
    ]
    what = "the clock of the database or of this machine was wrong, or is"
    alerts += [
        Alert(f"date of {entry.id}", f"backup {entry.id} is {entry.age_text}: {what}")
        for entry in entries
        if entry.is_own and entry.age < -AHEAD
    ]
    if not errors and (pending := lacking_remotely(catalog, entries)):
        what = f"backup {pending[0]} is" if len(pending) == 1 else f"{len(pending)} backups are"
        text = f"{what} not in the remote store yet: run python bot.py backup push, or wait for the schedule"
        alerts.append(Alert("uploads", text, is_fault=False))
    return alerts


async def list_with_problems(catalog: BackupCatalog) -> tuple[list[dict[str, str]], list[str]]:
    """Return `id` and `line` of each backup, newest first, and what is wrong with them, for the statistics."""
    entries, errors = await catalog.scan()
    backups = [{"id": entry.id, "line": entry.line} for entry in entries]
    return backups, [*errors, *(alert.text for alert in find_alerts(catalog, entries, errors))]


async def prune(catalog: BackupCatalog, rules: RetentionRules, *, dry_run: bool = False) -> Pruned:
    """Delete the backups that the rules do not keep, and what interrupted uploads left, in each store by itself.

    Only backups of the catalog's database are deleted. Damaged ones are neither counted nor deleted, because somebody
    should look at them. Nothing is deleted while the newest backup has much less than the ones before it, and the last
    one before such a drop is kept. With `dry_run` nothing is deleted. A remote store that does not answer stays as it
    is. Raises `BackupError`.
    """
    now = catalog.clock()
    entries, errors = await catalog.scan()
    total = sum(entry.is_own for entry in entries)
    if (pause := find_pause(entries)) is not None:
        return Pruned([], 0, total, pause, tuple(errors))
    # The smaller one too: without it nobody could tell that there was a drop.
    protected = {id for drop in first_drops(drops_among(entries)) for id in (drop.before.id, drop.after.id)}
    deleted: dict[str, None] = {}
    files = 0
    for store in catalog.stores:
        copies = _intact_in(store, entries)
        keep = ids_to_keep(copies.values(), rules, now) | protected
        ids = [id for id in copies if id not in keep]
        try:
            files += await _delete(store, ids, now, dry_run=dry_run)
        except BackupError as exc:
            if store is catalog.local:
                raise
            errors = errors or [str(exc)]
            continue
        deleted.update(dict.fromkeys(ids))
        if store is catalog.local and not dry_run:
            for id in ids:
                await asyncio.to_thread(catalog.plaintext_path(id).unlink, missing_ok=True)
    return Pruned(list(deleted), files, total, None, tuple(errors))


async def _delete(store: Store, ids: Collection[str], now: datetime, *, dry_run: bool) -> int:
    """Delete the files of backups, and what interrupted uploads left, from a store; return how many there are."""
    names = await store.names()
    expired = [name for name in names if name.split(".", 1)[0] in ids or _is_orphan(name, names, now)]
    if not dry_run:
        # The manifest first: without it the backup no longer exists, whatever happens next.
        for name in sorted(expired, key=lambda name: not name.endswith(MANIFEST_SUFFIX)):
            await store.delete(name)
    return len(expired)


def _intact_in(store: Store, entries: Sequence[Entry]) -> dict[str, Manifest]:
    """Return the backups of this database of which a store has an intact copy."""
    return {
        entry.id: copy.manifest
        for entry in entries
        if entry.is_own
        for copy in entry.copies
        if copy.store is store and copy.problem is None and copy.manifest is not None
    }


def _is_older(first: str | None, second: str | None) -> bool:
    """Whether a revision is older than another one; False if one of them is not known."""
    if first == second or first is None or second is None:
        return False
    try:
        return bool(set(second.split(", ")) & set(_revisions().pending(first.split(", "))))
    except MigrationError:
        return False


@lru_cache(maxsize=1)
def _revisions() -> Revisions:
    """Return the revisions, read once: they do not change while a process runs, and reading them blocks."""
    return Revisions()


def _is_orphan(name: str, names: Collection[str], now: datetime) -> bool:
    """Return whether a file is an old archive or drill result without a manifest."""
    id, _, suffix = name.partition(".")
    if not ID.fullmatch(id) or f"{id}{MANIFEST_SUFFIX}" in names:
        return False
    if f".{suffix}" not in (ARCHIVE_SUFFIX, ENCRYPTED_SUFFIX, DRILL_SUFFIX, ACCEPTED_SUFFIX):
        return False
    return now - created_at(id) > timedelta(hours=ORPHAN_HOURS)
