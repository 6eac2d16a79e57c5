"""What an import found in one file: counts by kind, some examples of each, and the entries that were left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from utils.operations.importing.originals import created

#: Examples of each kind.
EXAMPLES = 3
#: Characters of an example.
_SHOWN = 80


class Tally:
    """How often each kind came up, with the first examples."""

    def __init__(self) -> None:
        self.kinds: dict[str, dict[str, Any]] = {}

    def add(self, kind: str, key: str | None, line: int, value: Any = None) -> None:
        """Count one; its key and value are shown when it is among the first."""
        found = self.kinds.setdefault(kind, {"count": 0, "examples": []})
        found["count"] += 1
        if found["count"] <= EXAMPLES:
            shown = None if value is None else ascii(value)[:_SHOWN]
            found["examples"].append({"line": line, "key": None if key is None else shortened(key), "value": shown})

    @property
    def total(self) -> int:
        """How many there were of all kinds."""
        return sum(kind["count"] for kind in self.kinds.values())


class Rejects:
    """The file of entries that could not be used, or only in part; made when there is one. Closed by `with`."""

    def __init__(self, path: Path | None) -> None:
        """`path` None: they are counted only."""
        self.path: Path | None = path
        self.entries: int = 0
        #: Entries of which nothing was stored.
        self.lost: int = 0
        self._file: TextIO | None = None

    def __enter__(self) -> Rejects:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, *, line: int, column: int, key: str | None, reasons: list[str], stored: bool, text: str) -> None:
        """Write one down; `stored`: the original is in `documents` all the same."""
        self.entries += 1
        self.lost += not stored
        if self.path is None:
            return
        if self._file is None:
            self._file = created(self.path)
        row = {"line": line, "column": column, "key": key, "reasons": reasons, "stored": stored, "text": text}
        self._file.write(json.dumps(row) + "\n")  # in ASCII: whatever the text holds, it can be written


def shortened(key: str) -> str:
    """Return a key for a report: printable, and not too long."""
    return key if key.isprintable() and len(key) <= _SHOWN else ascii(key)[:_SHOWN]
