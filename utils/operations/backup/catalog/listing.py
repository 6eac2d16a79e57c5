"""What one store has: manifests, results of drills, and what operators have accepted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import SecretStr

from utils.exceptions import BackupError
from utils.operations.backup.archive.manifest import (
    ACCEPTED_SUFFIX,
    DRILL_SUFFIX,
    ID,
    MANIFEST_SUFFIX,
    MAX_DRILL_BYTES,
    MAX_MANIFEST_BYTES,
    DrillResult,
    Manifest,
    check_signature,
    parse_drill_result,
    parse_manifest,
)
from utils.operations.backup.catalog.entries import Copy
from utils.operations.backup.store import Content, Store

_log = logging.getLogger(__name__)

#: File names of a store with their sizes in bytes.
Names = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Listing:
    """What one store has."""

    #: Ids and backups.
    copies: list[tuple[str, Copy]]
    #: Results of drills by the id of their backup.
    drills: dict[str, DrillResult]
    #: Ids of backups that operators have accepted.
    accepted: set[str]


async def list_store(store: Store, key: SecretStr | None) -> Listing:
    """Return what a store has. Raises `BackupError` if it does not say. `key`: what manifests must be signed with."""
    names = await store.names()
    manifests = await store.read_many(filter(_is_manifest, names), MAX_MANIFEST_BYTES + 1)
    results = await store.read_many([name for name in names if name.endswith(DRILL_SUFFIX)], MAX_DRILL_BYTES)
    copies: list[tuple[str, Copy]] = []
    for name, content in manifests.items():
        id, manifest, problem = name.removesuffix(MANIFEST_SUFFIX), None, None
        try:
            manifest = read_manifest(id, content)
            assert isinstance(content, bytes), "it was parsed"
            check_signature(content, name, key)
            check_presence(store, manifest, names)
        except BackupError as exc:
            problem = str(exc)
        copies.append((id, Copy(store, manifest, problem)))
    drills = {
        name.removesuffix(DRILL_SUFFIX): drill
        for name, content in results.items()
        if isinstance(content, bytes) and (drill := _parse_drill(name, content)) is not None
    }
    accepted = {name.removesuffix(ACCEPTED_SUFFIX) for name in names if name.endswith(ACCEPTED_SUFFIX)}
    return Listing(copies, drills, accepted)


def read_manifest(id: str, content: Content) -> Manifest:
    """Return the manifest of a backup, given the content of its file. Raises `BackupError` if there is none."""
    name = f"{id}{MANIFEST_SUFFIX}"
    if isinstance(content, BackupError):
        raise content
    if content is None:
        raise BackupError(f"the manifest {name} does not exist")
    if len(content) > MAX_MANIFEST_BYTES:
        raise BackupError(f"{name} is damaged: larger than {MAX_MANIFEST_BYTES:,} bytes")
    return parse_manifest(content, name)


def check_presence(store: Store, manifest: Manifest, names: Names) -> None:
    """Raise `BackupError` unless the archive is among a store's files with the right size."""
    size = names.get(manifest.file)
    if size is None:
        raise BackupError(f"backup {manifest.id} is incomplete: its archive {manifest.file} is not in {store.name}")
    if size != manifest.size:
        raise BackupError(
            f"{manifest.file} in {store.name} is damaged: it has {size:,} bytes, expected {manifest.size:,}"
        )


def _parse_drill(name: str, content: bytes) -> DrillResult | None:
    try:
        return parse_drill_result(content)
    except ValueError as exc:
        _log.warning("%s is damaged: %s", name, exc)
        return None


def _is_manifest(name: str) -> bool:
    return name.endswith(MANIFEST_SUFFIX) and ID.fullmatch(name.removesuffix(MANIFEST_SUFFIX)) is not None
