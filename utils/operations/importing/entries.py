"""From entries of a file to rows for COPY: checked, repaired, and written down where they cannot be used."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from utils.documents.codec import MAX_BYTES
from utils.documents.documents import KEY_LENGTH, NAMESPACE
from utils.exceptions import ValidationError
from utils.operations.importing import repair
from utils.operations.importing.escaping import Unstorable, storable_json, storable_key
from utils.operations.importing.originals import Original
from utils.operations.importing.reader import WINDOW, Entry, Reader
from utils.operations.importing.repair import Unusable
from utils.operations.importing.report import Rejects, Tally

T = TypeVar("T")

#: Kinds of files by their names; any other is `documents`.
KINDS = ("members", "users", "emojis", "shop")
#: What the originals of a file are kept under.
PREFIX = "legacy."
#: Rows and characters of one batch.
BATCH_ROWS = 2_000
BATCH_CHARACTERS = 2**20
#: Columns of a row, in order; of an entry that is no member all from `message_count` on are NULL.
COLUMNS = (
    "ordinal", "line", "guild_id", "key", "value", "user_id", "message_count", "last_active_at", "notifications",
    "language",
)  # fmt: skip

#: Where an object of an array or a line may say which one it is.
_NAMED = ("key", "id", "_id", "user_id")
#: A line of our own export.
_EXPORTED = frozenset(("guild_id", "key", "value"))
_BEFORE_VALUE = re.compile(r'\{\s*"guild_id"\s*:\s*"?\d+"?\s*,\s*"key"\s*:\s*"(?:[^"\\]|\\.)*"\s*,\s*"value"\s*:\s*')
_SPECIAL = re.compile(r"[\\\n\r\t]")
_COPY_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def kind_of(path: Path) -> str:
    """Return what a file holds, by its name."""
    stem = path.stem.lower()
    return stem if stem in KINDS else "documents"


def namespace_of(path: Path, kind: str) -> str:
    """Return where the originals of a file are kept."""
    name = kind if kind != "documents" else re.sub(r"[^A-Za-z0-9_.:-]", "_", path.stem)
    return f"{PREFIX}{name}"[:100]


def checked_namespace(namespace: str) -> str:
    """Return a namespace that somebody chose. Raises `ValidationError`."""
    if not NAMESPACE.fullmatch(namespace):
        raise ValidationError(f"{namespace[:50]!r} is no namespace: up to 100 letters, digits and any of _ . : -")
    return namespace


class Rows:
    """The rows of one file, with the tally of what was repaired and rejected; used by one thread at a time."""

    def __init__(
        self, original: Original, file: BinaryIO, kind: str, rejects: Rejects, *, window: int = WINDOW
    ) -> None:
        self.reader: Reader = Reader(file, lines=original.is_lines, window=window)
        self.kind: str = kind
        self.rejects: Rejects = rejects
        self.repaired: Tally = Tally()
        self.rejected: Tally = Tally()
        #: Entries in the file so far.
        self.entries: int = 0
        self._entries: Iterator[Entry] = iter(self.reader)
        self._now = datetime.now(UTC)

    def batch(self) -> bytes:
        """Return the next rows in COPY's text format, b'' at the end. Raises `ValidationError` for what is no JSON."""
        rows: list[str] = []
        size = 0
        for entry in self._entries:
            row = self._row(entry)
            if row is not None:
                rows.append(row)
                size += len(row)
            if len(rows) >= BATCH_ROWS or size >= BATCH_CHARACTERS:
                break
        else:
            if self.reader.marked and not self.repaired.kinds.get("byte order mark"):
                self.repaired.add("byte order mark", None, 1)
        return "".join(rows).encode()

    def _row(self, entry: Entry) -> str | None:
        self.entries += 1
        key, reasons = entry.key, list[str]()
        try:
            guild_id, key, text, value = self._document(entry)
        except (Unusable, Unstorable) as exc:
            self._reject(entry, key, [str(exc)], stored=False)
            return None
        user_id: int | None = None
        chosen: tuple[Any, ...] = (None, None, None, None)
        if self.kind == "members":
            guild_id, user_id, chosen, reasons = self._member(entry, key, value)
        elif self.kind == "users":
            try:
                user_id = repair.snowflake(key)
            except Unusable as exc:
                reasons = [str(exc)]
        if reasons:
            self._reject(entry, key, reasons, stored=True)
        fields = (self.entries, entry.line, guild_id, storable_key(key), text, user_id, *chosen)
        return "\t".join(map(_field, fields)) + "\n"

    def _document(self, entry: Entry) -> tuple[int, str, str, Any]:
        """Return guild, key, text and value of the document. Raises `Unusable` and `Unstorable`."""
        if entry.problem is not None:
            raise Unusable(entry.problem)
        guild_id, key, text, value = 0, entry.key, entry.text, entry.value
        if key is None and isinstance(value, dict) and value.keys() == _EXPORTED and isinstance(value["key"], str):
            before = _BEFORE_VALUE.match(text)
            if before is None:
                raise Unusable("guild_id, key and value are not in this order")
            guild_id = int(value["guild_id"])
            if guild_id >= 2**63:
                raise Unusable("the id is no Discord id")
            key, text, value = value["key"], text[before.end() : text.rindex("}")].rstrip(), value["value"]
        elif key is None:
            key = _key_in(value, self.kind)
        if not 0 < len(storable_key(key)) <= KEY_LENGTH:
            raise Unusable(f"the key has not 1 to {KEY_LENGTH} characters")
        text = storable_json(text)
        if len(text) > MAX_BYTES // 4 and len(text.encode()) > MAX_BYTES:
            raise Unusable(f"it has more than {MAX_BYTES:,} bytes: split it over several keys")
        return guild_id, key, text, value

    def _member(self, entry: Entry, key: str, value: Any) -> tuple[int, int | None, tuple[Any, ...], list[str]]:
        """Return guild, user, what goes into tables, and what could not be used."""
        try:
            guild_id, user_id, repaired = repair.member_key(key)
        except Unusable as exc:
            return 0, None, (None, None, None, None), [str(exc)]
        if repaired:
            self.repaired.add(repaired, key, entry.line)
        reasons: list[str] = []
        if not isinstance(value, dict):
            return guild_id, user_id, (None, None, None, None), ["it is no object"]
        statistics = self._part(value, "statistics", reasons)
        choices = self._part(value, "preferences", reasons)

        def use(name: str, value: Any, convert: Any) -> Any:
            if value is None:
                return None
            try:
                result, repaired = convert(value)
            except Unusable as exc:
                reasons.append(f"{name}: {exc}")
                return None
            if repaired:
                self.repaired.add(f"{name}: {repaired}", key, entry.line, value)
            return result

        return guild_id, user_id, (
            use("message_count", statistics.get("message_count"), repair.count),
            use("last_active", statistics.get("last_active"), lambda value: repair.moment(value, self._now)),
            use("notifications", choices.get("notifications"), repair.flag),
            use("language", choices.get("language"), repair.language),
        ), reasons  # fmt: skip

    @staticmethod
    def _part(value: dict[str, Any], name: str, reasons: list[str]) -> dict[str, Any]:
        part = value.get(name)
        if part is not None and not isinstance(part, dict):
            reasons.append(f"{name}: it is no object")
        return part if isinstance(part, dict) else {}

    def _reject(self, entry: Entry, key: str | None, reasons: list[str], *, stored: bool) -> None:
        for reason in reasons:
            self.rejected.add(reason, key, entry.line)
        self.rejects.add(
            line=entry.line, column=entry.column, key=key, reasons=reasons, stored=stored, text=entry.text
        )  # fmt: skip


def _key_in(value: Any, kind: str) -> str:
    """Return the key of an object of an array or a line. Raises `Unusable`."""
    if isinstance(value, dict):
        if kind == "members" and "guild_id" in value and "user_id" in value:
            return f"{repair.snowflake(value['guild_id'])}_{repair.snowflake(value['user_id'])}"
        for name in _NAMED:
            found = value.get(name)
            if isinstance(found, str) or (isinstance(found, int) and not isinstance(found, bool)):
                return str(found)
    raise Unusable("nothing in it says its key: none of key, id, _id, user_id")


def _field(value: Any) -> str:
    """Return a value as a field of COPY's text format."""
    if value is None:
        return "\\N"
    if isinstance(value, str):
        return _SPECIAL.sub(lambda found: _COPY_ESCAPES[found[0]], value) if _SPECIAL.search(value) else value
    return value.isoformat() if isinstance(value, datetime) else str(value)
