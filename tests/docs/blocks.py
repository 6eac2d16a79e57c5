"""The code blocks of README.md and docs/."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
)
#: Run from top to bottom by a test of its own: tests/docs/test_first_cog.py.
TUTORIAL = ROOT / "docs" / "how-to" / "first-cog.md"
#: Rehearsed by a test of its own, on a database that is dropped: tests/docs/test_database_gone.py.
REHEARSAL = ROOT / "docs" / "how-to" / "database-gone.md"

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block, and where it is."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """Return the blocks of these languages, of every page but the tutorial; without any: all blocks."""
    found = [block for page in PAGES if page != TUTORIAL for block in blocks_of(page)]
    return [block for block in found if not languages or block.language in languages]


def blocks_of(page: Path) -> list[Block]:
    """Return all blocks of a page."""
    whole = page.read_text(encoding="utf-8")
    return [
        Block(page, whole.count("\n", 0, match.start()) + 1, match["language"], textwrap.dedent(match["text"]))
        for match in _FENCE.finditer(whole)
    ]


def demo_output() -> str:
    """Return what the README says that `make demo` prints."""
    return next(block.text for block in blocks("text") if block.text.startswith("Guildbook:"))
