"""The preferences of members."""

from __future__ import annotations

import pytest

from utils.database import Pool
from utils.documents import preferences
from utils.documents.preferences import Preferences
from utils.exceptions import ValidationError


async def test_stores_extra_values_of_cogs(database: Pool) -> None:
    await preferences.put(database, 1, 2, language="de")
    await preferences.put_extra(database, 1, 2, "tally", {"hidden": "\0"})
    chosen = await preferences.put_extra(database, 1, 2, "pings", None)
    assert chosen == await preferences.get(database, 1, 2)
    assert chosen == Preferences(None, "de", {"tally": {"hidden": "\ufffd"}, "pings": None})
    assert await preferences.reset(database, 1, 2)
    assert not await preferences.reset(database, 1, 2)
    assert await preferences.put_extra(database, 1, 2, "tally", 1) == Preferences(extra={"tally": 1})


@pytest.mark.parametrize(
    ("text", "tag"),
    [("DE", "de"), ("pt-br", "pt-BR"), (" en_US ", "en-US"), ("zh-hant-tw", "zh-Hant-TW"), ("es-419", "es-419")],
)
def test_normalizes_language_tags(text: str, tag: str) -> None:
    assert preferences.language_tag(text) == tag


@pytest.mark.parametrize("text", ["", "e", "english", "en-", "de-DE-1996", "дe", "en\n-US", "e1"])
def test_rejects_invalid_language_tags(text: str) -> None:
    with pytest.raises(ValidationError, match="is not a language tag"):
        preferences.language_tag(text)
