"""Signs backups that were made before BACKUP_SIGNING_KEY was set, once they are verified."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

from utils.exceptions import BackupError, SettingsError, UnknownBackup
from utils.operations.action import Progress, ignore_progress
from utils.operations.backup.archive.manifest import (
    MANIFEST_SUFFIX,
    MAX_MANIFEST_BYTES,
    check_signature,
    is_signed,
)
from utils.operations.backup.archive.reading import Verification
from utils.operations.backup.catalog.catalog import LATEST, BackupCatalog
from utils.operations.backup.catalog.entries import Entry, describe_some
from utils.operations.backup.catalog.identity import describe_owner
from utils.operations.backup.catalog.listing import read_manifest
from utils.operations.backup.store import Store


@dataclass(slots=True)
class Signed:
    """What was signed, copy by copy; the keys are the id of a backup and the name of a store."""

    #: The copies that were signed now, with what was checked before.
    signed: dict[tuple[str, str], Verification] = field(default_factory=dict)
    #: The copies that were signed with this key already.
    already: list[tuple[str, str]] = field(default_factory=list)
    #: The copies that were not signed, and why.
    refused: dict[tuple[str, str], str] = field(default_factory=dict)
    #: Backups of other databases, which their own bots sign.
    foreign: list[str] = field(default_factory=list)
    #: Stores that did not answer.
    errors: list[str] = field(default_factory=list)


async def sign(catalog: BackupCatalog, id: str | None = None, *, progress: Progress = ignore_progress) -> Signed:
    """Sign one backup, or all of the catalog's database, in every store that has it.

    Each copy is verified first as `backup verify --deep` does: a damaged one is not signed, and neither is one that is
    signed with another key. `id` may be `latest`, the newest full one. Raises `SettingsError` without
    BACKUP_SIGNING_KEY, and `BackupError` for a backup that does not exist or is of another database.
    """
    key = catalog.settings.backup_signing_key
    if key is None:
        raise SettingsError("BACKUP_SIGNING_KEY is not set: set the key to sign with")
    entries, errors = await catalog.scan()
    result = Signed(errors=list(errors))
    if id is not None:
        # Without a signature none is good, which `latest` means elsewhere.
        named = (entry for entry in entries if entry.id == id or (id == LATEST and _may_be_latest(entry)))
        chosen = list(islice(named, 1))
        if not chosen:
            error = BackupError if errors else UnknownBackup
            raise error(f"there is no backup {id[:60]}: {describe_some(entries, errors)}")
        if not chosen[0].is_own and chosen[0].manifest is not None:
            owner = describe_owner(chosen[0].manifest)
            raise BackupError(f"backup {chosen[0].id} is of {owner}, not of {catalog.identity}: nothing was signed")
        entries = chosen
    result.foreign = [entry.id for entry in entries if not entry.is_own]
    for entry in reversed(entries):
        if entry.is_own:
            for copy in entry.copies:
                where = entry.id, copy.store.name
                try:
                    found = await _sign_copy(catalog, copy.store, entry.id, progress)
                except BackupError as exc:
                    result.refused[where] = str(exc)
                else:
                    if found is None:
                        result.already.append(where)
                    else:
                        result.signed[where] = found
    return result


def _may_be_latest(entry: Entry) -> bool:
    return entry.is_own and entry.manifest is not None and entry.manifest.is_regular


async def _sign_copy(catalog: BackupCatalog, store: Store, id: str, progress: Progress) -> Verification | None:
    """Verify and sign a copy; return None if it is signed already. Raises `BackupError` if it must not be signed."""
    name, key = f"{id}{MANIFEST_SUFFIX}", catalog.settings.backup_signing_key
    content = await store.read(name, MAX_MANIFEST_BYTES + 1)
    manifest = read_manifest(id, content)
    assert content is not None, "it was read"
    if is_signed(content):
        check_signature(content, name, key)
        return None
    verification = await catalog.verify_copy(store, manifest, is_deep=True, progress=progress)
    await store.write(name, manifest.serialize(key))
    return verification
