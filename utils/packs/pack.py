"""What a pack is: a Python package with a `pack.toml`, found by the path of its repository or by its name."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from utils.exceptions import SettingsError

#: The name of a pack. Its revisions' ids begin with it, and Alembic keeps 32 characters of an id.
NAME = re.compile(r"[a-z][a-z0-9_]{0,19}")
#: Says what a pack is called and what it needs; stands beside its `__init__.py`.
METADATA = "pack.toml"
_EXPECTED = {"name", "requires"}


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack that was found. Nothing of it has been imported."""

    name: str
    #: The importable name of its package: `economy`, or `bots.economy`.
    package: str
    #: The directory of that package.
    directory: Path
    #: The least revision of Guildbook's schema that it needs.
    requires: str
    #: What `COGS` says.
    origin: str

    @property
    def scripts(self) -> Path:
        """The directory of its revisions, in `versions/` there. It need not exist."""
        return self.directory / "migrations"

    @property
    def version_table(self) -> str:
        """The table that records which of its revisions a database is at, in the schema of the main tables."""
        return f"{self.name}_version"

    @property
    def settings_prefix(self) -> str:
        """How the variables of its settings begin."""
        return f"{self.name.upper()}_"

    def cogs(self) -> list[str]:
        """Return the modules and packages in its `cogs/`, except those whose names start with an underscore."""
        folder = self.directory / "cogs"
        names = {path.stem for path in folder.glob("*.py")} | {
            path.parent.name for path in folder.glob("*/__init__.py")
        }
        return [f"{self.package}.cogs.{name}" for name in sorted(names) if not name.startswith("_")]

    def contains(self, module: str | None) -> bool:
        """Whether a module is a part of it."""
        return module is not None and (module == self.package or module.startswith(f"{self.package}."))

    def short_name(self, module: str) -> str:
        """Return the name of one of its cogs for people: `economy.shop`, or `economy` for the cog of that name."""
        cog = module.rpartition(".")[2]
        return self.name if cog == self.name else f"{self.name}.{cog}"


def read_pack(origin: str) -> Pack:
    """Find the pack that an entry of `COGS` names: the path of a repository, or an importable package.

    A path has a slash or begins with a dot or `~`. Its directory becomes importable. Raises `SettingsError` if there is
    no pack, or if its metadata are wrong.
    """
    if "/" in origin or origin.startswith((".", "~")):
        directory = _find_directory(origin)
        root = str(directory.parent)
        package = directory.name
        if root not in sys.path:
            sys.path.append(root)  # at the end: a pack's `tests` must not hide another's
        _refuse_taken(origin, package, directory)
    else:
        directory, package = _find_package(origin), origin
    return _read(directory, package, origin)


def _find_directory(origin: str) -> Path:
    root = Path(origin).expanduser().resolve()
    if not root.is_dir():
        raise SettingsError(
            f"COGS: {origin} is no directory; expected the path of a pack's repository", variables=["COGS"]
        )
    if (root / METADATA).is_file():
        return root
    found = sorted(path.parent for path in (*root.glob(f"*/{METADATA}"), *root.glob(f"src/*/{METADATA}")))
    if len(found) != 1:
        what = "no pack" if not found else f"{len(found)} packs ({', '.join(path.name for path in found)})"
        raise SettingsError(
            f"COGS: {origin} contains {what}; expected one package with a {METADATA}, as python bot.py new pack writes",
            variables=["COGS"],
        )
    return found[0]


def _find_package(origin: str) -> Path:
    try:
        spec = importlib.util.find_spec(origin)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise SettingsError(
            f"COGS: no package {origin[:100]!r} is installed; expected one, or the path of a repository, which has a"
            " slash: ./economy",
            variables=["COGS"],
        )
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def _refuse_taken(origin: str, package: str, directory: Path) -> None:
    """Raise `SettingsError` if importing the pack's package would import something else."""
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(package)
    locations = [] if spec is None else [Path(path).resolve() for path in spec.submodule_search_locations or ()]
    if directory not in locations:
        other = "nothing" if spec is None else spec.origin or package
        raise SettingsError(
            f"COGS: {origin} has a package {package}, but Python imports {other} by that name; rename the pack",
            variables=["COGS"],
        )


def _read(directory: Path, package: str, origin: str) -> Pack:
    file = directory / METADATA
    try:
        data: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"COGS: {package} is no pack: there is no {file}", variables=["COGS"]) from None
    except (OSError, ValueError) as exc:
        raise SettingsError(f"COGS: {file} cannot be read: {exc}", variables=["COGS"]) from None
    wrong = [
        f"{key} is {data.get(key)!r}"
        for key in sorted(_EXPECTED)
        if not isinstance(data.get(key), str) or not data[key]
    ]
    if unknown := sorted(data.keys() - _EXPECTED):
        wrong.append(f"unknown: {', '.join(unknown)}")
    name = data.get("name")
    if isinstance(name, str) and (not NAME.fullmatch(name) or keyword.iskeyword(name)):
        wrong.append(f"the name {name!r} is not 1 to 20 lower-case letters, digits and underscores")
    if wrong:
        expected = f'name = "{package.rpartition(".")[2]}" and requires = "a revision of Guildbook"'
        raise SettingsError(f"COGS: {file}: {'; '.join(wrong)}; expected {expected}", variables=["COGS"])
    return Pack(data["name"], package, directory, data["requires"], origin)


def read_directory(directory: Path) -> Pack | None:
    """Return the pack whose package is a directory, whether or not it can be imported; None: there is none.

    Raises `SettingsError` for metadata that are wrong.
    """
    try:
        changed = (directory / METADATA).stat().st_mtime_ns
    except OSError:
        return None
    return _read_again(directory, changed)


@lru_cache(maxsize=32)
def _read_again(directory: Path, changed: int) -> Pack:
    return _read(directory, directory.name, str(directory))
