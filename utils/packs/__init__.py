"""Packs: cogs, models, revisions and settings that live outside of this repository, loaded through `COGS`."""

from utils.packs.locales import Locales
from utils.packs.pack import NAME, Pack, read_pack
from utils.packs.registry import (
    activate,
    active,
    clear_problem,
    module_owner,
    pack_of_scripts,
    problem,
    report_problem,
    using,
)
from utils.packs.settings import PackSettings, load_pack_settings

__all__ = [
    "NAME",
    "Locales",
    "Pack",
    "PackSettings",
    "activate",
    "active",
    "clear_problem",
    "load_pack_settings",
    "module_owner",
    "pack_of_scripts",
    "problem",
    "read_pack",
    "report_problem",
    "using",
]
