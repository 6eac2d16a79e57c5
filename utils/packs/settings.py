"""Settings of a pack: a class `Settings` in its `settings.py`, filled from the environment and `.env`."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from utils.exceptions import SettingsError
from utils.packs.pack import Pack


class PackSettings(BaseSettings):
    """The base class of a pack's settings. The variable of a field has the pack's name before it, in upper case.

    Example, whose variable is `ECONOMY_DAILY` in the pack `economy`::

        class Settings(PackSettings):
            daily: int = Field(default=100, ge=1, description="Coins a day.")
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_ignore_empty=True, case_sensitive=False, env_file_encoding="utf-8"
    )


def load_pack_settings(pack: Pack, env_file: str | Path | None = ".env") -> PackSettings:
    """Read a pack's settings; those of a pack without a `settings.py` are empty.

    Raises `SettingsError` with one line for each wrong value, and for a module that has no class `Settings`.
    """
    module = f"{pack.package}.settings"
    if importlib.util.find_spec(module) is None:
        return PackSettings()
    try:
        found: Any = getattr(importlib.import_module(module), "Settings", None)
    except Exception as exc:
        raise SettingsError(f"pack {pack.name}: {module} cannot be imported: {type(exc).__name__}: {exc}") from exc
    if not (isinstance(found, type) and issubclass(found, PackSettings)):
        raise SettingsError(f"pack {pack.name}: {module} has no class Settings that is derived from PackSettings")
    try:
        settings: PackSettings = found(
            _env_prefix=pack.settings_prefix,  # type: ignore[call-arg]
            _env_file=env_file,
        )
    except ValidationError as exc:
        lines = [_line(pack, error) for error in exc.errors()]
        raise SettingsError("\n".join(lines), variables=[line.partition(":")[0] for line in lines]) from None
    return settings


def _line(pack: Pack, error: Any) -> str:
    name = "_".join(map(str, error["loc"])).upper() or "SETTINGS"
    # An error about one field names the variable with its prefix already if an alias was given.
    variable = name if name.startswith(pack.settings_prefix) else f"{pack.settings_prefix}{name}"
    expected = f"{error['msg'][:1].lower()}{error['msg'][1:]}"
    return f"{variable}: {expected}"
