"""What a listing of backups consists of: each backup, with its copies in the stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from utils.operations.backup.archive.manifest import DrillResult, Manifest, created_at
from utils.operations.backup.catalog.identity import describe_owner
from utils.operations.backup.catalog.retention import AHEAD
from utils.operations.backup.store import Remote, Store
from utils.text import format_duration


@dataclass(frozen=True, slots=True)
class Copy:
    """A backup as one store has it."""

    store: Store
    #: None if it cannot be read.
    manifest: Manifest | None
    #: What its name, size and manifest show to be damaged; None if nothing.
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One backup in a listing."""

    id: str
    copies: tuple[Copy, ...]
    #: Whether a copy is in this bot's DATA_DIR.
    is_local: bool = False
    #: False if it is of another database or application than the one that the catalog serves.
    is_own: bool = True
    #: How long ago it was made; negative if it is dated in the future.
    age: timedelta = timedelta(0)
    #: Whether an operator has said that it may have less than the backups before it.
    is_accepted: bool = False
    #: Result of its last drill; None if there was none.
    drill: DrillResult | None = None

    @property
    def places(self) -> tuple[str, ...]:
        """Names of the stores that have it."""
        return tuple(copy.store.name for copy in self.copies)

    @property
    def manifest(self) -> Manifest | None:
        """Its manifest, of an intact copy if there is one; None if it cannot be read, and `problem` says why."""
        return manifest_of(self.copies)

    @property
    def problem(self) -> str | None:
        """What is damaged, in any store; None if nothing."""
        return "; ".join(copy.problem for copy in self.copies if copy.problem is not None) or None

    @property
    def intact(self) -> Copy | None:
        """The first intact copy; None if all are damaged."""
        return next((copy for copy in self.copies if copy.problem is None), None)

    @property
    def is_restorable(self) -> bool:
        """Whether it is an intact full backup that is no safety copy, of whatever database."""
        return self.manifest is not None and self.manifest.is_regular and self.intact is not None

    @property
    def is_good(self) -> bool:
        """Whether `latest` may mean it: it is of this database, and restorable."""
        return self.is_own and self.is_restorable

    @property
    def line(self) -> str:
        """A one-line summary for people."""
        manifest = self.manifest
        if manifest is None:
            return f"{self.id}: DAMAGED: {self.problem}"
        places = [copy.store.name if isinstance(copy.store, Remote) else "DATA_DIR" for copy in self.copies]
        parts = [f"{manifest.line}, {self.age_text}, of {describe_owner(manifest)}, in {' and '.join(places)}"]
        if not self.is_own:
            parts.append("FOREIGN" if manifest.host is not None else "if it is yours, restore it with --from-other")
        if self.problem:
            parts.append(f"DAMAGED: {self.problem}")
        if self.drill is not None:
            parts.append(self.drill.line)
        return "; ".join(parts)

    @property
    def age_text(self) -> str:
        """Its age for people."""
        if self.age < -AHEAD:
            return f"dated {format_duration(-self.age)} in the FUTURE"
        return f"{format_duration(max(self.age, timedelta(0)))} old"


def manifest_of(copies: Sequence[Copy]) -> Manifest | None:
    """Return the manifest of the first intact copy, or else the first that can be read; None if none can."""
    readable = [copy for copy in copies if copy.manifest is not None]
    return next((copy.manifest for copy in sorted(readable, key=lambda copy: copy.problem is not None)), None)


def newest_good(entries: Sequence[Entry]) -> Entry | None:
    """Return what `latest` means among backups, which are newest first; None if there is none."""
    return next((entry for entry in entries if entry.is_good), None)


def damaged_since(newest: Entry | None, entries: Sequence[Entry]) -> list[Entry]:
    """Return the damaged backups of this database that were not made before the newest good one, itself included."""
    return [
        entry
        for entry in entries
        if entry.is_own and entry.problem is not None and (newest is None or entry.id >= newest.id)
    ]


def newest_last(entry: Entry) -> tuple[bool, datetime, datetime, str]:
    """Sort key: by age, and what has no readable manifest, which nobody should overlook, after the newest."""
    if entry.manifest is None:
        return True, created_at(entry.id), created_at(entry.id), entry.id
    return False, *entry.manifest.order


def describe_some(entries: Sequence[Entry], errors: Sequence[str]) -> str:
    """Return which backups there are instead of the one that was asked for, for people."""
    known = "there are no backups"
    if entries:
        known = f"the newest are {', '.join(_describe_shortly(entry) for entry in entries[:3])}"
    return "; ".join([known, *errors])


def _describe_shortly(entry: Entry) -> str:
    manifest = entry.manifest
    if manifest is None or entry.intact is None:
        return f"{entry.id} (damaged: {entry.problem})"
    if not entry.is_own:
        how = "" if manifest.host is not None else ": if it is yours, restore it by its id with --from-other"
        return f"{entry.id} (of {describe_owner(manifest)}{how})"
    if not manifest.is_regular:
        return f"{entry.id} ({manifest.reason if manifest.is_safety_copy else manifest.kind})"
    return entry.id
