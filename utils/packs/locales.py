"""Texts of a pack in several languages: one JSON object for each locale in its `locales/`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from utils.exceptions import SettingsError
from utils.packs.pack import Pack

#: The locale that has every text.
DEFAULT = "en-US"


class Locales:
    """The texts of one pack, read from files such as `locales/de.json`. Names are Discord's: `en-US`, `de`, `pt-BR`."""

    def __init__(self, texts: Mapping[str, Mapping[str, str]]) -> None:
        self._texts = texts

    @classmethod
    def of(cls, pack: Pack) -> Locales:
        """Read the files of a pack. Raises `SettingsError` for one that is not a JSON object of texts."""
        files = sorted((pack.directory / "locales").glob("*.json"))
        return _read(tuple((path, path.stat().st_mtime_ns) for path in files))

    def text(self, key: str, locale: str = DEFAULT, /, **values: object) -> str:
        """Return a text in a locale, with `values` in place of its `{names}`.

        Without that text in the locale, the one of the same language is used, then `en-US`. Raises `KeyError` if that
        has none either.
        """
        language = locale.partition("-")[0]
        for name in (locale, language, *(other for other in self._texts if other.startswith(f"{language}-")), DEFAULT):
            found = self._texts.get(name, {}).get(key)
            if found is not None:
                return found.format(**values)
        raise KeyError(f"no text {key!r} in locales/{DEFAULT}.json")


@lru_cache(maxsize=32)
def _read(files: tuple[tuple[Path, int], ...]) -> Locales:
    texts: dict[str, dict[str, str]] = {}
    for path, _ in files:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as exc:
            raise SettingsError(f"{path} cannot be read: {exc}") from None
        if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
            raise SettingsError(f"{path}: expected a JSON object whose values are texts")
        texts[path.stem] = found
    return Locales(texts)
