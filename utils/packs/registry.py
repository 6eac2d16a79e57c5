"""The packs of this process, and what keeps one of them from being used.

One process serves one bot, so they are the process's. Who reads the settings activates them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from utils.exceptions import SettingsError
from utils.packs.pack import Pack, read_directory, read_pack

_active: dict[str, Pack] = {}
_problems: dict[str, str] = {}


def activate(entries: Iterable[str], *, taken: Iterable[str] = ()) -> list[Pack]:
    """Make the packs that `COGS` names the packs of this process, and return them in that order.

    `taken`: names that a pack must not have. Raises `SettingsError`, and changes nothing, if one cannot be found.
    """
    path = list(sys.path)
    try:
        found = _find(entries, {"guildbook", "alembic", *taken})  # their version tables are not a pack's
    except SettingsError:
        sys.path[:] = path
        raise
    for name, pack in _active.items():
        if found.get(name) != pack:
            _problems.pop(name, None)
    _active.clear()
    _active.update(found)
    return list(found.values())


def _find(entries: Iterable[str], forbidden: set[str]) -> dict[str, Pack]:
    found: dict[str, Pack] = {}
    for entry in entries:
        pack = read_pack(entry)
        if pack.name in forbidden:
            raise SettingsError(
                f"COGS: {entry}: the name {pack.name!r} is Guildbook's; rename the pack", variables=["COGS"]
            )
        if pack.name in found and found[pack.name].directory == pack.directory:
            raise SettingsError(
                f"COGS: {found[pack.name].origin} and {entry} are the same pack {pack.name!r}; remove one",
                variables=["COGS"],
            )
        if pack.name in found:
            raise SettingsError(
                f"COGS: {found[pack.name].origin} and {entry} are both named {pack.name!r}; remove or rename one",
                variables=["COGS"],
            )
        found[pack.name] = pack
    return found


def active() -> list[Pack]:
    """Return the packs of this process."""
    return list(_active.values())


@contextlib.contextmanager
def using(*entries: str) -> Iterator[list[Pack]]:
    """Activate packs for the duration of a block, for tests."""
    packs, problems, path = dict(_active), dict(_problems), list(sys.path)
    try:
        yield activate(entries)
    finally:
        sys.path[:] = path
        _active.clear()
        _active.update(packs)
        _problems.clear()
        _problems.update(problems)


def module_owner(module: str | None) -> Pack | None:
    """Return the active pack that a module is a part of; None: it is Guildbook's, or nobody's."""
    return next((pack for pack in _active.values() if pack.contains(module)), None)


def pack_of_scripts(scripts: Path) -> Pack | None:
    """Return the pack that a directory of revisions belongs to; None for Guildbook's own."""
    found = next((pack for pack in _active.values() if pack.scripts == scripts), None)
    return found or read_directory(scripts.parent)


def report_problem(pack: Pack, reason: str) -> None:
    """Keep an active pack from being loaded, for a reason in one line."""
    _problems[pack.name] = reason


def clear_problem(pack: Pack) -> None:
    """Let an active pack be loaded again."""
    _problems.pop(pack.name, None)


def problem(pack: Pack) -> str | None:
    """Return why an active pack must not be loaded; None: it may."""
    return _problems.get(pack.name)
