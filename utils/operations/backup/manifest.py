"""What is written down of a backup, beside its archive: a backup without its manifest does not exist."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Literal

import orjson
from pydantic import TypeAdapter, ValidationError

from utils.exceptions import BackupError
from utils.text import format_bytes

#: Says whose backup it is: anything else is refused.
PROJECT = "guildbook"
#: Of the manifest. A newer one is refused: what it promises is not known.
FORMAT = 1
#: Ids sort by time.
ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{6}")
ARCHIVE, ENCRYPTED, SUFFIX = ".dump", ".dump.age", ".json"
#: Bytes that a manifest may have: what is larger is something else, and is not read.
LARGEST = 4_000_000

Kind = Literal["full", "tables", "schema"]


@dataclass(frozen=True, slots=True)
class Manifest:
    """One backup."""

    id: str
    #: ISO 8601, UTC: when its snapshot was taken.
    created_at: str
    #: Only a full one can take the database's place.
    kind: Kind
    #: manual, scheduled, before restore, …
    reason: str
    #: Name of the archive beside the manifest.
    file: str
    #: Of that file, as it is stored.
    size: int
    sha256: str
    #: Of the archive before encryption; the same without.
    plain_size: int
    plain_sha256: str
    #: The age recipient; None: it is not encrypted.
    recipient: str | None
    database: str
    #: PostgreSQL's version, and pg_dump's.
    server: str
    tool: str
    #: The schema's revision; None: it has no tables of ours.
    revision: str | None
    #: Exact rows by `schema.table`, of the same snapshot as the archive. Empty of a schema-only one.
    rows: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    project: str = PROJECT
    format: int = FORMAT

    @property
    def made_at(self) -> datetime:
        """When its snapshot was taken."""
        return datetime.fromisoformat(self.created_at)

    @property
    def major(self) -> int:
        """PostgreSQL's major that it was made with."""
        return int(re.split(r"\D", self.server, maxsplit=1)[0])

    @property
    def total(self) -> int:
        """Rows in all."""
        return sum(self.rows.values())

    @property
    def line(self) -> str:
        """It in a line for people."""
        what = {"full": "", "tables": ", some tables only", "schema": ", without rows"}[self.kind]
        sealed = ", encrypted" if self.recipient else ""
        return (
            f"{self.id}: {format_bytes(self.size)}, {self.total:,} rows in {len(self.rows)} tables, PostgreSQL"
            f" {self.server.split()[0]}, schema {self.revision or 'none'}, {self.reason}{what}{sealed}"
        )

    def packed(self) -> bytes:
        """Return it as the file that is stored: JSON, with a seal over all of it."""
        content = asdict(self)
        return orjson.dumps(content | {"seal": _seal(content)}, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)


_TYPES = TypeAdapter(Manifest)
_NAMES = {one.name for one in fields(Manifest)}


def new_id() -> str:
    """Return the id of a backup that begins now."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def unpacked(content: bytes, name: str) -> Manifest:
    """Return the manifest in a file called `name`. Raises `BackupError` when it is not whole, or not one of ours."""
    try:
        found = orjson.loads(content)
        seal = found.pop("seal")
        project, number = found["project"], found["format"]
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise BackupError(f"{name} is damaged: it is no manifest of a backup ({type(exc).__name__})") from None
    if project != PROJECT:
        raise BackupError(f"{name} belongs to the project {str(project)[:50]!r}, not to {PROJECT}: take it elsewhere")
    if number != FORMAT:
        raise BackupError(
            f"{name} has format {str(number)[:20]}, this version knows {FORMAT}: use the one that wrote it"
        )
    if seal != _seal(found):
        raise BackupError(f"{name} is damaged: what it says was changed after it was written")
    try:
        manifest = Manifest(**found)
        _TYPES.validate_json(orjson.dumps(found), strict=True)
        made_at, _ = manifest.made_at, manifest.major
    except ValidationError as exc:
        first = exc.errors()[0]
        raise BackupError(f"{name} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (TypeError, ValueError) as exc:
        raise BackupError(f"{name} is damaged: {exc}") from None
    # What is not said is not to be taken from the defaults: without rows nothing would be counted after a restore.
    if missing := _NAMES - found.keys():
        raise BackupError(f"{name} is damaged: it lacks {', '.join(sorted(missing))}")
    if made_at.tzinfo is None:
        raise BackupError(f"{name} is damaged: created_at has no time zone: {manifest.created_at}")
    if f"{manifest.id}{SUFFIX}" != name:
        raise BackupError(f"{name} holds the manifest of backup {manifest.id}: the files were swapped")
    if manifest.file not in (manifest.id + ARCHIVE, manifest.id + ENCRYPTED):
        raise BackupError(f"{name} names the archive {manifest.file[:80]!r}, which is not its own")
    return manifest


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()
