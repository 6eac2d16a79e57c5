"""`python bot.py new pack NAME`: writes the repository of a pack, as a starting point.

Its files are in `pack_template/`: `@name@` and the like are replaced, the directory `package` gets the pack's name, and
what Git or a linter would take for its own has another name there.
"""

from __future__ import annotations

import keyword
import os
import sys
from pathlib import Path

from utils.exceptions import ValidationError
from utils.operations import migrations
from utils.packs import NAME
from utils.settings import RESERVED_NAMES

ROOT = Path(__file__).resolve().parents[3]
TEMPLATE = Path(__file__).with_name("pack_template")
#: Names in the template, and in the repository.
_RENAMED = {"gitignore": ".gitignore", "dockerignore": ".dockerignore", "env.example": ".env.example"}
#: Packages of Guildbook's that a pack's package would hide, or be hidden by.
_PACKAGES = frozenset(path.name for path in ROOT.iterdir() if path.is_dir())


def new_pack(name: str, directory: Path | None = None) -> list[Path]:
    """Write a pack's repository and return its files, relative to the current directory where that is shorter.

    `directory`: where; None: beside this clone, named for the pack. It must be empty or not exist.

    Raises `ValidationError`, without writing anything, if the name is invalid or taken, or if there is no room.
    """
    directory = (ROOT.parent / name if directory is None else directory).resolve()
    if not NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ValidationError(
            f"{name[:50]!r} is not a valid name for a pack: use 1 to 20 lower-case letters, digits and underscores,"
            " starting with a letter, and no Python keyword"
        )
    if name in {*RESERVED_NAMES, *_PACKAGES, *sys.stdlib_module_names, "guildbook", "alembic"}:
        raise ValidationError(f"{name!r} is the name of something else in Python or in Guildbook: choose another name")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValidationError(f"{directory} exists and is not empty: choose another directory with --directory")
    words = {
        "name": name,
        "NAME": name.upper(),
        "dashed": name.replace("_", "-"),
        "title": "".join(word.capitalize() for word in name.split("_")),
        "guildbook": os.path.relpath(ROOT, directory),
        "requires": migrations.known_revisions()[-1].id,
    }
    files = {
        directory / _target(path.relative_to(TEMPLATE), name): _filled(path.read_text(encoding="utf-8"), words)
        for path in sorted(TEMPLATE.rglob("*"))
        if path.is_file()
    }
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise ValidationError(f"cannot write {exc.filename or directory}: {exc.strerror}") from exc
    return [_shorter(path) for path in files]


def _target(path: Path, name: str) -> Path:
    parts = list(path.parts)
    parts[-1] = _RENAMED.get(parts[-1], parts[-1].removesuffix(".template"))
    if parts[-1] == "first.py":
        parts[-1] = f"{name}_0001_create_the_tables.py"
    if parts[-1] == "main.py":
        parts[-1] = f"{name}.py"
    if parts[-1] == "test_pack.py":
        parts[-1] = f"test_{name}.py"
    return Path(*(name if part == "package" else part for part in parts))


def _filled(text: str, words: dict[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(f"@{word}@", value)
    return text


def _shorter(path: Path) -> Path:
    relative = Path(os.path.relpath(path))
    return min(path, relative, key=lambda one: len(str(one)))
