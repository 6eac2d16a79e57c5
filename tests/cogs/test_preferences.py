"""/preferences, run over the wire."""

from __future__ import annotations

from typing import Any

from cogs.preferences import language_choices
from simulator import InteractionResult, Simulator
from tests.bot.running import running_bot
from utils.database import Pool
from utils.documents import preferences
from utils.documents.preferences import Preferences

EXTENSIONS = ("cogs.preferences",)
UNSET = "**Notifications**: not set\n**Language**: not set"


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
        assert (result.ephemeral, result.final_content) == (True, UNSET)
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
    answer = "Nothing was changed: 'klingonese' is not a language tag: use one like en, de or pt-BR"
    assert (result.ephemeral, result.final_content) == (True, answer)
    assert await database.fetchval("SELECT count(*) FROM member_preferences") == 0


async def test_value_outside_the_choices_is_rejected_in_one_line(
    database: Pool, simulator: Simulator, small: int
) -> None:
    someone = simulator.world.guild(small).owner_id
    async with running_bot(database, simulator, extensions=EXTENSIONS):
        result = await run(simulator, "set", someone, small, notifications="perhaps")
        assert (result.final_content or "").startswith(
            "notifications: 'perhaps' is not valid here. Expected: one of on"
        )
        result = await run(simulator, "set", someone, small, language="x" * 31)
        assert "Expected: 1 to 30 characters" in (result.final_content or "")
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


def test_languages_are_suggested_by_tag_and_name() -> None:
    assert [choice.value for choice in language_choices("germ")] == ["de"]
    assert {"pt-BR"} == {choice.value for choice in language_choices("PT")}
    assert len(language_choices("")) == 25
    assert language_choices("klingon") == []
    assert all(preferences.language_tag(choice.value) == choice.value for choice in language_choices(""))
