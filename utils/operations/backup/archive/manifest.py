"""What is stored beside an archive: its manifest, without which it is no backup, and the result of its last drill."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Literal

import orjson
from pydantic import SecretStr, TypeAdapter, ValidationError

from utils.database.ownership import FORMER_VERSION_TABLE, VERSION_TABLE
from utils.exceptions import BackupError
from utils.operations.backup.archive.objects import placement_of_backup
from utils.text import format_bytes, format_count

#: The project that a backup belongs to; any other is refused.
PROJECT = "guildbook"
#: Version of the manifest's format. Any other is refused, because its meaning is unknown.
FORMAT = 1
#: Ids sort by time: the second of creation, then random digits.
ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{6}")
#: Length of the part of an id that is the second of creation.
TIMESTAMP_LENGTH = len("20260102T030405Z")
ARCHIVE_SUFFIX, ENCRYPTED_SUFFIX, MANIFEST_SUFFIX, DRILL_SUFFIX = ".dump", ".dump.age", ".json", ".drill.json"
#: Beside a backup that an operator has accepted although it has much less than the ones before it.
ACCEPTED_SUFFIX = ".accepted.json"
#: Largest manifest and largest drill result in bytes. A larger file is something else and is not read.
MAX_MANIFEST_BYTES, MAX_DRILL_BYTES = 4_000_000, 1_000_000

#: `empty` is a full one of a database without rows, which replaces no other.
Kind = Literal["full", "tables", "schema", "empty"]
#: Why a backup was made.
Reason = Literal["manual", "scheduled", "before restore", "before downgrade", "before upgrade", "before reset"]
#: The reasons of safety copies, which are made automatically before a dangerous operation.
SAFETY_REASONS: frozenset[Reason] = frozenset({"before restore", "before downgrade", "before upgrade", "before reset"})


@dataclass(frozen=True, slots=True)
class Manifest:
    """The description of one backup."""

    id: str
    #: When the snapshot was taken: ISO 8601, UTC.
    created_at: str
    kind: Kind
    reason: Reason
    #: Name of the archive, in the same store as the manifest.
    file: str
    #: Bytes and SHA-256 of the archive as stored.
    size: int
    sha256: str
    #: The same before encryption; equal to `size` and `sha256` if it is not encrypted.
    plain_size: int
    plain_sha256: str
    #: The age recipient; None if it is not encrypted.
    recipient: str | None
    database: str
    #: Version of the PostgreSQL server, and of pg_dump.
    server: str
    tool: str
    #: Revision of the schema; None if the database had no Guildbook tables.
    revision: str | None
    #: Exact row counts by `schema.table`, from the snapshot that was dumped. Empty for a schema-only backup.
    rows: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    #: The application that the database belongs to, and its server (`ConnectTarget.location`); None if unknown, which
    #: no database matches.
    application_id: int | None = None
    host: str | None = None
    #: `created_at`, or later than every backup of the database that was known, so that a clock that was set back does
    #: not make a new backup the older one; None: made by 0.1.0, which went by `created_at`.
    ordered_at: str | None = None
    #: The revisions of each pack that the database has tables of (several separated by commas), by its name.
    packs: dict[str, str] = field(default_factory=dict)
    project: str = PROJECT
    format: int = FORMAT

    @property
    def made_at(self) -> datetime:
        """When the snapshot was taken."""
        return datetime.fromisoformat(self.created_at)

    @property
    def order(self) -> tuple[datetime, datetime, str]:
        """Sort key: which of two backups is the newer one."""
        return datetime.fromisoformat(self.ordered_at or self.created_at), self.made_at, self.id

    @property
    def major(self) -> int:
        """Major version of the PostgreSQL server."""
        return int(re.split(r"\D", self.server, maxsplit=1)[0])

    @property
    def total_rows(self) -> int:
        """Number of rows in all tables."""
        return sum(self.rows.values())

    @property
    def guilds(self) -> int:
        """Number of rows in the table of guilds."""
        return self.counts.get((placement_of_backup(self.counts).main, "guilds"), 0)

    @property
    def data_rows(self) -> int:
        """Number of rows in all tables but those that say what Guildbook itself did."""
        return sum(self.data_counts.values())

    @property
    def data_counts(self) -> dict[str, int]:
        """Number of rows of each of these tables, by name; of cogs' tables in another schema, with that."""
        placed = placement_of_backup(self.counts)
        return {
            name if schema == placed.main else f"{schema}.{name}": rows
            for (schema, name), rows in self.counts.items()
            if schema != placed.ops and name not in VERSION_TABLES and name.removesuffix("_version") not in self.packs
        }

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        """Exact row counts by schema and table."""
        split = {name: name.partition(".") for name in self.rows}
        return {(schema, table): self.rows[name] for name, (schema, _, table) in split.items()}

    @property
    def is_safety_copy(self) -> bool:
        """Whether it was made automatically before a dangerous operation."""
        return self.reason in SAFETY_REASONS

    @property
    def is_regular(self) -> bool:
        """Whether it is a full backup and no safety copy: one that `latest` may mean, if it is intact."""
        return self.kind == "full" and not self.is_safety_copy

    @property
    def line(self) -> str:
        """A one-line summary for people."""
        some = f", some tables only: {', '.join(sorted(name for _, name in self.counts))}"
        scope = {"full": "", "tables": some, "schema": ", without rows", "empty": ", EMPTY"}[self.kind]
        encrypted = ", encrypted" if self.recipient else ""
        return (
            f"{self.id}: {format_bytes(self.size)}, {format_count(self.total_rows, 'row')} in"
            f" {format_count(len(self.rows), 'table')}, PostgreSQL {self.server.split()[0]},"
            f" schema {self.revision or 'none'}, {self.reason}{scope}{encrypted}"
        )

    def serialize(self, signing_key: SecretStr | None = None) -> bytes:
        """Return the content of the manifest file: JSON with a checksum ("seal") over all fields, signed with a key."""
        content = asdict(self)
        if not self.packs:
            del content["packs"]  # versions without packs know no such field
        sealed = content | {"seal": checksum_of(content)}
        if signing_key is not None:
            sealed["signature"] = signature_of(content, signing_key)
        return orjson.dumps(sealed, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)


_FIELD_TYPES = TypeAdapter(Manifest)
#: Fields that a manifest must have. Backups of 0.1.0 do not say what they are of.
_REQUIRED = {one.name for one in fields(Manifest)} - {"application_id", "host", "ordered_at", "packs"}
#: The tables of the revision, the former one included.
VERSION_TABLES = (VERSION_TABLE, FORMER_VERSION_TABLE)


def new_id(now: datetime) -> str:
    """Return the id of a backup that starts now."""
    return f"{now.astimezone(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def created_at(id: str) -> datetime:
    """Return the second in which the backup with this id was started."""
    return datetime.strptime(id[:TIMESTAMP_LENGTH], "%Y%m%dT%H%M%S%z")


def parse_manifest(content: bytes, name: str) -> Manifest:
    """Return the manifest in a file called `name`. Raises `BackupError` if it is damaged or not one of ours.

    Its signature is not checked: `check_signature` does.
    """
    try:
        values = orjson.loads(content)
        stored_checksum, _ = values.pop("seal"), values.pop("signature", None)
        project, version = values["project"], values["format"]
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise BackupError(f"{name} is damaged: not the manifest of a backup ({type(exc).__name__})") from None
    if project != PROJECT:
        raise BackupError(
            f"{name} belongs to the project {str(project)[:50]!r}, not to {PROJECT}: use a store of its own"
        )
    if version != FORMAT:
        raise BackupError(
            f"{name} has format {str(version)[:20]}, this version reads {FORMAT}: use the version that wrote it"
        )
    if stored_checksum != checksum_of(values):
        raise BackupError(f"{name} is damaged: its content does not match its checksum")
    try:
        manifest = Manifest(**values)
        _FIELD_TYPES.validate_json(orjson.dumps(values), strict=True)
        made_at, (ordered_at, *_), _ = manifest.made_at, manifest.order, manifest.major
    except ValidationError as exc:
        first = exc.errors()[0]
        raise BackupError(f"{name} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (TypeError, ValueError) as exc:
        raise BackupError(f"{name} is damaged: {exc}") from None
    # Defaults must not fill gaps: without `rows`, a restore would count nothing.
    if missing := _REQUIRED - values.keys():
        raise BackupError(f"{name} is damaged: it lacks {', '.join(sorted(missing))}")
    if made_at.tzinfo is None or ordered_at.tzinfo is None:
        raise BackupError(f"{name} is damaged: a time has no time zone: {manifest.created_at}, {manifest.ordered_at}")
    tables = {table for _, table in manifest.counts}
    if (manifest.kind in ("full", "empty") and "guilds" not in tables) or (manifest.kind == "tables" and not tables):
        raise BackupError(f"{name} counts no rows of Guildbook's tables, so that nothing could be checked: not usable")
    if f"{manifest.id}{MANIFEST_SUFFIX}" != name:
        raise BackupError(f"{name} holds the manifest of backup {manifest.id}: the files were swapped")
    if manifest.file not in (manifest.id + ARCHIVE_SUFFIX, manifest.id + ENCRYPTED_SUFFIX):
        raise BackupError(f"{name} names {manifest.file[:80]!r} as its archive, which belongs to another backup")
    return manifest


def checksum_of(content: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest's fields; it reveals damage, not forgery."""
    return hashlib.sha256(_canonical(content)).hexdigest()


def signature_of(content: dict[str, Any], key: SecretStr) -> str:
    """Return the HMAC-SHA256 of a manifest's fields, which nobody can make without the key."""
    return hmac.new(key.get_secret_value().encode(), _canonical(content), hashlib.sha256).hexdigest()


def is_signed(content: bytes) -> bool:
    """Return whether a readable manifest has a signature, of whatever key."""
    return orjson.loads(content).get("signature") is not None


def check_signature(content: bytes, name: str, key: SecretStr | None) -> None:
    """Raise `BackupError` unless a readable manifest is signed with the key; None: nothing is checked."""
    if key is None:
        return
    values = orjson.loads(content)
    signature = values.pop("signature", None)
    del values["seal"]
    if signature is None:
        raise BackupError(
            f"{name} is not signed, and BACKUP_SIGNING_KEY is set: if you know who made it, sign it with python bot.py"
            " backup sign"
        )
    expected = signature_of(values, key)
    if not isinstance(signature, str) or not hmac.compare_digest(signature.encode(), expected.encode()):
        raise BackupError(
            f"{name} is not signed with BACKUP_SIGNING_KEY: somebody without the key has written it, or the key has"
            " changed"
        )


def _canonical(content: dict[str, Any]) -> bytes:
    return orjson.dumps(content, option=orjson.OPT_SORT_KEYS)


@dataclass(frozen=True, slots=True)
class DrillResult:
    """The result of a drill, stored as `<id>.drill.json`."""

    backup: str
    #: ISO 8601, UTC.
    at: str
    ok: bool
    seconds: float
    #: In which scratch tables it was restored, for people.
    where: str
    #: Tables and rows counted, equal to the manifest's unless `problems` says otherwise.
    tables: int
    rows: int
    #: Sampled rows: read, equal to the live database's, and changed there since.
    rows_read: int = 0
    rows_compared: int = 0
    rows_changed: int = 0
    problems: tuple[str, ...] = ()

    @property
    def made_at(self) -> datetime:
        """When the drill ended."""
        return datetime.fromisoformat(self.at)

    @property
    def line(self) -> str:
        """A short summary for listings."""
        return f"drill of {self.at[:16].replace('T', ' ')} {'passed' if self.ok else 'FAILED'}"

    def lines(self) -> list[str]:
        """Return the full report for people."""
        verdict = "was restored completely" if self.ok else "COULD NOT BE RESTORED COMPLETELY"
        lines = [f"Backup {self.backup} {verdict} {self.where}, in {self.seconds:.1f} s."]
        if self.ok:
            counted = f"{format_count(self.rows, 'row')} in {format_count(self.tables, 'table')}"
            lines.append(f"Counted {counted} and read {self.rows_read:,} of them.")
        if self.rows_compared:
            lines.append(
                f"Of these, {self.rows_compared:,} are the same in the live database and {self.rows_changed:,} have"
                " changed there since."
            )
        return [*lines, *self.problems]

    def serialize(self) -> bytes:
        """Return the content of the result file."""
        return json.dumps(asdict(self), indent=2).encode()


def parse_drill_result(content: bytes) -> DrillResult:
    """Return the drill result in a file's content. Raises `ValueError` if it is damaged."""
    try:
        values = json.loads(content)
        return DrillResult(**{**values, "problems": tuple(values["problems"])})
    except (TypeError, KeyError) as exc:
        raise ValueError(f"not the result of a drill: {exc}") from exc
