"""Shared helpers: files as old bots wrote them, import and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils.database import Pool
from utils.operations.action import Outcome
from utils.operations.importing.exporting import Format, export
from utils.operations.importing.importer import import_files
from utils.settings import Settings

GUILD = 41771983423143937
USER = 80351110224678912
STATS = "SELECT guild_id, user_id, message_count, last_active_at FROM member_stats ORDER BY guild_id, user_id"
PREFERENCES = "SELECT guild_id, user_id, notifications, language FROM member_preferences ORDER BY guild_id, user_id"
DOCUMENTS = (
    "SELECT guild_id, namespace, key, value, version FROM documents WHERE namespace <> 'legacy' ORDER BY 1, 2, 3"
)


def settings(directory: Path) -> Settings:
    return Settings(_env_file=None, data_dir=directory / "data")  # type: ignore[call-arg]


def member(**changes: Any) -> dict[str, Any]:
    """Return a valid entry of members.json."""
    return {
        "join_date": "2021-03-04T05:06:07+00:00",
        "roles": [str(GUILD), str(GUILD + 1)],
        "preferences": {"notifications": True, "language": "de"},
        "statistics": {"message_count": 17, "last_active": "2024-05-06T07:08:09+00:00"},
        **changes,
    }


async def import_content(database: Pool, directory: Path, name: str, content: Any, **options: Any) -> Outcome:
    """Import one file; `content` is its text, its bytes, or a value to encode as JSON."""
    path = directory / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return await import_files(database, settings(directory), [path], **options)


async def export_text(database: Pool, directory: Path, what: str, form: Format = "json", **options: Any) -> str:
    """Export to a file and return its text."""
    path = directory / f"out.{form}"
    outcome = await export(database, what, path, form=form, **options)
    assert outcome.ok
    assert path.stat().st_mode & 0o777 == 0o600
    return path.read_bytes().decode()


async def stored_rows(database: Pool) -> list[list[tuple[Any, ...]]]:
    """Return all rows that imports write: documents, statistics and preferences."""
    return [[tuple(row) for row in await database.fetch(sql)] for sql in (DOCUMENTS, STATS, PREFERENCES)]


def files_in(directory: Path) -> list[Path]:
    """List a directory, sorted."""
    return sorted(directory.iterdir())
