"""Converts the entries of a file to rows for COPY: validates and repairs them, and records what cannot be used."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from utils.documents.codec import MAX_BYTES
from utils.documents.documents import KEY_LENGTH, NAMESPACE
from utils.exceptions import ValidationError
from utils.operations.importing import repair
from utils.operations.importing.escaping import UnstorableValue, storable_json, storable_key
from utils.operations.importing.originals import Original, create_private_text
from utils.operations.importing.reader import WINDOW, Entry, Reader
from utils.operations.importing.repair import UnusableValue
from utils.operations.importing.shapes import EXPORT_FIELDS, Outline, Place

#: Kinds of files, recognized by file name; any other file is `documents`.
KINDS = ("members", "users", "emojis", "shop")
#: Kinds that an operator can choose besides.
OTHER_KINDS = ("settings", "documents")
#: Prefix of the namespaces in which the originals are stored.
PREFIX = "legacy."
_UNUSUAL = re.compile(r"[^A-Za-z0-9_.:-]")
#: Maximum number of rows and of characters in a batch.
BATCH_ROWS = 2_000
BATCH_CHARACTERS = 2**20
#: Columns of a row, in order. For entries other than members, all from `message_count` on are NULL.
COLUMNS = (
    "ordinal", "line", "guild_id", "key", "value", "is_record", "user_id", "message_count", "last_active_at", "xp",
    "notifications", "language",
)  # fmt: skip
_NO_VALUES = (None,) * 5
#: Why a value, or an entry, is left out that a later one replaces: JSON parsers use the last one.
REPLACED = "another value of the same key follows, which is used"
SAME_KEY = "another entry with the same key follows, which is used"
#: The repair of an entry that is there twice, with the same value.
TWICE = "entry that is there twice"

#: Names of fields in which bots keep the statistics, in order of preference. Only the first must be usable.
_COUNT_FIELDS = ("message_count", "messageCount", "messages", "msg_count", "total_messages")
_ACTIVE_FIELDS = ("last_active", "lastActive", "last_active_at", "last_seen", "lastSeen")
_XP_FIELDS = ("xp", "XP", "exp")
_BEFORE_VALUE = re.compile(r'\{\s*"guild_id"\s*:\s*"?\d+"?\s*,\s*"key"\s*:\s*"(?:[^"\\]|\\.)*"\s*,\s*"value"\s*:\s*')
_SPECIAL = re.compile(r"[\\\n\r\t]")
_COPY_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def kind_of(path: Path) -> str:
    """Return the kind of a file, by its name."""
    stem = path.stem.lower()
    return stem if stem in KINDS else "documents"


def namespace_of(path: Path, kind: str) -> str:
    """Return the namespace in which the originals of a file are stored."""
    name = kind if kind in KINDS else _UNUSUAL.sub("_", path.stem)
    return f"{PREFIX}{name}"[:100]


def namespace_in(place: str, name: str) -> str:
    """Return a namespace like `name` for another file of that name, found in a place."""
    return PREFIX + f"{_UNUSUAL.sub('_', place)}.{name.removeprefix(PREFIX)}"[-93:]


def namespaces_of(paths: Sequence[Path], kinds: Sequence[str]) -> list[str]:
    """Return the namespaces of several files, none of them twice.

    Files of one name are told apart by the directories that they are in, and those of one directory by a number.
    """
    names = [namespace_of(path, kind) for path, kind in zip(paths, kinds, strict=True)]
    directories = [path.resolve().parts[:-1] for path in paths]
    found: list[str] = []
    for name, directory in zip(names, directories, strict=True):
        others = {other for also, other in zip(names, directories, strict=True) if also == name} - {directory}
        depth = next((n for n in range(1, len(directory)) if all(one[-n:] != directory[-n:] for one in others)), 0)
        apart = name
        if others and depth:
            apart = namespace_in(".".join(directory[-depth:]), name)
        number, free = 1, apart
        while free in found:
            number += 1
            free = f"{apart[:95]}-{number}"
        found.append(free)
    return found


def check_namespace(namespace: str) -> None:
    """Raise `ValidationError` if this is not a valid namespace."""
    if not NAMESPACE.fullmatch(namespace):
        raise ValidationError(f"invalid namespace {namespace[:50]!r}: use 1 to 100 letters, digits and _ . : -")


#: Examples recorded of each kind of repair or rejection, and the length of an example in characters.
EXAMPLES = 3
EXAMPLE_LENGTH = 80


class Tally:
    """Counts repairs or rejections by kind, with the first few examples of each."""

    def __init__(self) -> None:
        self.kinds: dict[str, dict[str, Any]] = {}

    def add(self, kind: str, key: str | None, line: int, value: Any = None) -> None:
        """Count one occurrence; its key and value are recorded if it is among the first."""
        entry = self.kinds.setdefault(kind, {"count": 0, "examples": []})
        entry["count"] += 1
        if entry["count"] <= EXAMPLES:
            shown = None if value is None else ascii(value)[:EXAMPLE_LENGTH]
            entry["examples"].append({"line": line, "key": None if key is None else shorten_key(key), "value": shown})

    @property
    def total(self) -> int:
        """The number of occurrences of all kinds."""
        return sum(kind["count"] for kind in self.kinds.values())


class Rejects:
    """Writes the entries that could not be used, or only partly, to a file, which is created with the first one.

    Use it in a `with` block, which closes the file.
    """

    def __init__(self, path: Path | None) -> None:
        """`path` None: only count the entries."""
        self.path: Path | None = path
        self.entries: int = 0
        #: Number of entries of which nothing was stored.
        self.lost: int = 0
        self._file: TextIO | None = None

    def __enter__(self) -> Rejects:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, *, line: int, column: int, key: str | None, reasons: list[str], stored: bool, text: str) -> None:
        """Record an entry; `stored` means that its original is in `documents` nevertheless."""
        self.entries += 1
        self.lost += not stored
        if self.path is None:
            return
        if self._file is None:
            self._file = create_private_text(self.path)
        row = {"line": line, "column": column, "key": key, "reasons": reasons, "stored": stored, "text": text}
        self._file.write(json.dumps(row) + "\n")  # ASCII, because the text may hold lone surrogates


def shorten_key(key: str) -> str:
    """Return a key for a report: printable and at most 80 characters."""
    return key if key.isprintable() and len(key) <= EXAMPLE_LENGTH else ascii(key)[:EXAMPLE_LENGTH]


class Rows:
    """Reads one file as batches of rows and tallies repairs and rejections. Not thread-safe."""

    def __init__(
        self,
        original: Original,
        file: BinaryIO,
        kind: str,
        rejects: Rejects,
        *,
        stem: str,
        is_forced: bool = False,
        guild_id: int | None = None,
        encoding: str | None = None,
        window: int = WINDOW,
    ) -> None:
        """
        stem: the name of the file without its suffix.
        is_forced: the operator chose the kind, instead of the file's name.
        guild_id: the guild of entries that do not say theirs; None if unknown.
        encoding: of the file; None: recognized by its first bytes.
        """
        self.outline: Outline = Outline(kind, stem, guild_id=guild_id, is_forced=is_forced)
        self.reader: Reader = Reader(
            file, lines=original.is_lines, window=window, outline=self.outline, encoding=encoding
        )
        self.kind: str = kind
        self.rejects: Rejects = rejects
        self.repaired: Tally = Tally()
        self.rejected: Tally = Tally()
        #: Number of entries read so far.
        self.entries: int = 0
        self._entries: Iterator[Entry] = iter(self.reader)
        self._now = datetime.now(UTC)

    def batch(self) -> bytes:
        """Return the next rows in COPY's text format, b'' at the end. Raises `ValidationError` for invalid JSON."""
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
            if self.reader.has_bom and not self.repaired.kinds.get("byte order mark"):
                self.repaired.add("byte order mark", None, 1)
        return "".join(rows).encode()

    def _row(self, entry: Entry) -> str | None:
        self.entries += 1
        key = entry.key
        try:
            place, text, value = self._document(entry)
            key = place.key
            text = storable_json(text)
            self._check_document(key, text)
        except (UnusableValue, UnstorableValue) as exc:
            self._reject(entry, key, [str(exc)], stored=False)
            return None
        reasons = [place.problem] if place.problem is not None else []
        if place.repaired is not None:
            self.repaired.add(place.repaired, entry.key, entry.line)
        values: tuple[Any, ...] = _NO_VALUES
        if place.is_member:
            values = self._member_values(entry, place, value, reasons)
        reasons += [REPLACED] * entry.replaced
        if reasons:
            self._reject(entry, key, reasons, stored=True)
        fields = (
            self.entries, entry.line, place.guild_id, storable_key(key), text, place.is_record, place.user_id, *values
        )  # fmt: skip
        return "\t".join(map(_field, fields)) + "\n"

    def _document(self, entry: Entry) -> tuple[Place, str, Any]:
        """Return the document's place, text and value. Raises `UnusableValue`."""
        if entry.problem is not None:
            raise UnusableValue(entry.problem)
        text, value = entry.text, entry.value
        if (
            entry.key is None
            and isinstance(value, dict)
            and value.keys() == EXPORT_FIELDS
            and isinstance(value["key"], str)
        ):
            before = _BEFORE_VALUE.match(text)
            if before is None:
                raise UnusableValue("guild_id, key and value must be in this order")
            guild_id = int(value["guild_id"])
            if guild_id >= 2**63:
                raise UnusableValue("the id is not a Discord id")
            exported = replace(entry, key=value["key"], value=value["value"], scope=None)
            place = replace(self.outline.place(exported), guild_id=guild_id, key=value["key"], repaired=None)
            return place, text[before.end() : text.rindex("}")].rstrip(), value["value"]
        return self.outline.place(entry), text, value

    @staticmethod
    def _check_document(key: str, text: str) -> None:
        if not 0 < len(storable_key(key)) <= KEY_LENGTH:
            raise UnusableValue(f"the key must have 1 to {KEY_LENGTH} characters")
        if len(text) > MAX_BYTES // 4 and len(text.encode()) > MAX_BYTES:
            raise UnusableValue(f"the value is larger than {MAX_BYTES:,} bytes: split it over several keys")

    def _member_values(self, entry: Entry, place: Place, value: Any, reasons: list[str]) -> tuple[Any, ...]:
        """Return a member's values for the tables, and add to `reasons` why others cannot be used."""
        if not isinstance(value, dict):
            if self.kind == "members":
                reasons.append("it is not an object")
            return _NO_VALUES
        statistics = self._part(value, "statistics", reasons)
        choices = self._part(value, "preferences", reasons)

        def use(name: str, value: Any, convert: Any) -> Any:
            if value is None:
                return None
            try:
                result, repaired = convert(value)
            except UnusableValue as exc:
                reasons.append(f"{name}: {exc}")
                return None
            if repaired:
                self.repaired.add(f"{name}: {repaired}", place.key, entry.line, value)
            return result

        stats = value.get("stats")
        parts = (statistics, stats if isinstance(stats, dict) else {}, value)

        def statistic(names: tuple[str, ...], types: tuple[type, ...]) -> Any:
            for part, name in itertools.product(parts, names):
                found = part.get(name)
                if found is not None and (name == names[0] or (isinstance(found, types) and found is not True)):
                    return found
            return None

        return (
            use("message_count", statistic(_COUNT_FIELDS, (int, float)), repair.count),
            use(
                "last_active",
                statistic(_ACTIVE_FIELDS, (int, float, str)),
                lambda value: repair.moment(value, self._now),
            ),
            use("xp", statistic(_XP_FIELDS, (int, float)), repair.count),
            use("notifications", choices.get("notifications"), repair.flag),
            use("language", choices.get("language"), repair.language),
        )

    @staticmethod
    def _part(value: dict[str, Any], name: str, reasons: list[str]) -> dict[str, Any]:
        part = value.get(name)
        if part is not None and not isinstance(part, dict):
            reasons.append(f"{name}: it is not an object")
        return part if isinstance(part, dict) else {}

    def _reject(self, entry: Entry, key: str | None, reasons: list[str], *, stored: bool) -> None:
        for reason in reasons:
            self.rejected.add(reason, key, entry.line)
        self.rejects.add(
            line=entry.line, column=entry.column, key=key, reasons=list(dict.fromkeys(reasons)), stored=stored,
            text=entry.text,
        )  # fmt: skip

    def replace(self, *, line: int, key: str, text: str, is_lost: bool) -> None:
        """Record that another entry with the same key follows; `is_lost`: with another value."""
        if not is_lost:
            self.repaired.add(TWICE, key, line)
            return
        self.rejected.add(SAME_KEY, key, line)
        self.rejects.add(line=line, column=1, key=key, reasons=[SAME_KEY], stored=False, text=text)


def _field(value: Any) -> str:
    """Encode a value as a field of COPY's text format."""
    if value is None:
        return "\\N"
    if isinstance(value, str):
        return _SPECIAL.sub(lambda found: _COPY_ESCAPES[found[0]], value) if _SPECIAL.search(value) else value
    return value.isoformat() if isinstance(value, datetime) else str(value)
