"""/preferences over the wire, and the preferences of members in the database."""

from __future__ import annotations

from typing import Any

import pytest

from cogs.preferences import language_choices
from simulator import InteractionResult, Simulator
from tests.bot.running import running_bot
from utils.database import Pool
from utils.documents import preferences
from utils.documents.preferences import Preferences
from utils.exceptions import ValidationError

EXTENSIONS = ("cogs.preferences",)
NOTHING = "**Notifications**: not set\n**Language**: not set"


async def run(simulator: Simulator, subcommand: str, user_id: int, guild_id: int, **options: Any) -> InteractionResult:
    """Run /preferences and wait for its answer."""
    result = await simulator.run_command(
        "preferences", subcommand=subcommand, user_id=user_id, guild_id=guild_id, options=options
    )
    return await result.wait_done(30)


async def test_member_sets_shows_and_clears_preferences(
    database: Pool, simulator: Simulator, large: int, small: int
) -> None:
    one = next(id for id in simulator.world.guild(small).ordered_member_ids() if id != simulator.world.bot.id)
    async with running_bot(database, simulator, extensions=EXTENSIONS):
        result = await run(simulator, "show", one, small)
        assert (result.ephemeral, result.final_content) == (True, NOTHING)
        result = await run(simulator, "set", one, small, notifications="off", language="pt_br")
        assert (result.ephemeral, result.final_content) == (True, "**Notifications**: off\n**Language**: pt-BR")
        await run(simulator, "set", one, small, notifications="on")
        result = await run(simulator, "show", one, small)
        assert result.final_content == "**Notifications**: on\n**Language**: pt-BR"
        result = await run(simulator, "set", one, small, language="Default")
        assert result.final_content == "**Notifications**: on\n**Language**: not set"
        assert await preferences.get(database, large, one) == Preferences()
    row = await database.fetchrow("SELECT * FROM member_preferences")
    assert row is not None
    assert tuple(row) == (small, one, True, None, {})


async def test_invalid_language_is_rejected_in_one_line(database: Pool, simulator: Simulator, small: int) -> None:
    someone = simulator.world.guild(small).owner_id
    async with running_bot(database, simulator, extensions=EXTENSIONS):
        result = await run(simulator, "set", someone, small, notifications="on", language="klingonese")
    told = "Nothing was changed: 'klingonese' is not a language tag: use one like en, de or pt-BR"
    assert (result.ephemeral, result.final_content) == (True, told)
    assert await database.fetchval("SELECT count(*) FROM member_preferences") == 0


async def test_database_error_is_answered_in_one_line(database: Pool, simulator: Simulator, small: int) -> None:
    someone = simulator.world.guild(small).owner_id
    async with running_bot(database, simulator, extensions=EXTENSIONS):
        await database.execute("DROP TABLE member_preferences")
        result = await run(simulator, "show", someone, small)
    assert (result.final_content or "").startswith("Something went wrong. The error was logged (ref ")


async def test_command_exists_only_in_guilds(database: Pool, simulator: Simulator, small: int) -> None:
    async with running_bot(database, simulator, extensions=EXTENSIONS):
        (command,) = simulator.interactions.commands()
        assert (command["contexts"], command["default_member_permissions"]) == ([0], None)


async def test_cogs_keep_choices_of_their_own_beside_them(database: Pool) -> None:
    await preferences.put(database, 1, 2, language="de")
    await preferences.put_extra(database, 1, 2, "tally", {"hidden": "\0"})
    chosen = await preferences.put_extra(database, 1, 2, "pings", None)
    assert chosen == await preferences.get(database, 1, 2)
    assert chosen == Preferences(None, "de", {"tally": {"hidden": "\ufffd"}, "pings": None})
    assert await preferences.reset(database, 1, 2)
    assert not await preferences.reset(database, 1, 2)
    assert await preferences.put_extra(database, 1, 2, "tally", 1) == Preferences(extra={"tally": 1})


@pytest.mark.parametrize(
    ("given", "tag"),
    [("DE", "de"), ("pt-br", "pt-BR"), (" en_US ", "en-US"), ("zh-hant-tw", "zh-Hant-TW"), ("es-419", "es-419")],
)
def test_a_language_is_written_as_usual(given: str, tag: str) -> None:
    assert preferences.language_tag(given) == tag


@pytest.mark.parametrize("given", ["", "e", "english", "en-", "de-DE-1996", "дe", "en\n-US", "e1"])
def test_what_is_no_language_is_refused(given: str) -> None:
    with pytest.raises(ValidationError, match="is not a language tag"):
        preferences.language_tag(given)


def test_languages_are_suggested_by_tag_and_name() -> None:
    assert [choice.value for choice in language_choices("germ")] == ["de"]
    assert {"pt-BR"} == {choice.value for choice in language_choices("PT")}
    assert len(language_choices("")) == 25
    assert language_choices("klingon") == []
    assert all(preferences.language_tag(choice.value) == choice.value for choice in language_choices(""))
