"""What a restore, a drill and the offer of one need of the place where backups are kept."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

from utils.database import Pool
from utils.operations.action import Progress


@dataclass(frozen=True, slots=True)
class Archive:
    """A backup that has been checked, as a file that pg_restore reads."""

    id: str
    file: Path
    #: The directory of pg_restore that reads it.
    tools: Path
    made_at: datetime
    #: PostgreSQL's major that it was made with.
    major: int
    #: The schema's revision; None: it has no tables of ours.
    revision: str | None
    #: Rows by schema and table, exactly.
    counts: Mapping[tuple[str, str], int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Known:
    """A backup that there is."""

    id: str
    made_at: datetime
    rows: int


class Backups(Protocol):
    """The place where backups are kept."""

    def opened(self, which: str, server: int, progress: Progress) -> AbstractAsyncContextManager[Archive]:
        """Lend a backup as a file: fetched, its checksum checked, decrypted, with the tools for a server's major.

        `which`: an id, or "latest", the newest full one. Raises `BackupError` for one that is not there, is of another
        project, partial, changed since it was made, encrypted without the identity, or of a major that the tools for
        `server` cannot read.
        """

    async def save(self, database: Pool, reason: str, progress: Progress) -> str:
        """Back the database up and return the backup's id. Raises `BackupError`."""

    async def newest(self) -> Known | None:
        """Return the newest full backup; None: there is none. Raises `BackupError`."""

    async def read_note(self, name: str) -> bytes | None:
        """Return a small file that stands beside the backups; None: there is none. Raises `BackupError`."""

    async def write_note(self, name: str, content: bytes) -> None:
        """Put a small file beside the backups, in place of one of that name. Raises `BackupError`."""
