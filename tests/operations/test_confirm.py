"""A question before what cannot be taken back: who may answer, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from simulator import InteractionResult, Simulator
from tests.bot.running import running
from utils.bot.client import Guildbook
from utils.database import Pool
from utils.operations import confirm
from utils.operations.confirm import EXPIRED, OTHERS

COG = "tests.bot.cogs.dangerous"


@pytest.fixture
async def bot(database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Guildbook]:
    async with running(database, simulator, monkeypatch, extensions=[COG]) as running_bot:
        yield running_bot


async def asked(simulator: Simulator) -> tuple[InteractionResult, dict[str, str]]:
    """Give the command, and return its reply and the buttons by label."""
    result = await simulator.run_command("danger", user_id=simulator.world.operator_id)
    await result.wait_done(until=lambda seen: bool(seen.buttons))
    return result, result.buttons


def times_done(bot: Guildbook) -> int:
    cog = bot.get_cog("Dangerous")
    done: int = getattr(cog, "done")  # noqa: B009 - discord.py has loaded a class of its own
    return done


async def last_word(result: InteractionResult) -> str | None:
    await result.wait_done(until=lambda seen: not seen.buttons and seen.final_content not in ("Sure?", "Confirmed."))
    return result.final_content


async def test_nothing_is_done_before_the_button_is_pressed_and_it_is_done_once(
    bot: Guildbook, simulator: Simulator
) -> None:
    result, buttons = await asked(simulator)
    assert (result.final_content, set(buttons), times_done(bot)) == ("Sure?", {"Do it", "Cancel"}, 0)
    operator = simulator.world.operator_id
    first, second = await asyncio.gather(
        simulator.press(result, buttons["Do it"], user_id=operator),
        simulator.press(result, buttons["Do it"], user_id=operator),
    )
    assert await last_word(result) == "done"
    assert times_done(bot) == 1
    await second.wait_done(until=lambda seen: seen.type is not None)
    assert {first.content, second.content} == {None, EXPIRED}


async def test_a_cancelled_question_does_nothing(bot: Guildbook, simulator: Simulator, database: Pool) -> None:
    result, buttons = await asked(simulator)
    await simulator.press(result, buttons["Cancel"], user_id=simulator.world.operator_id)
    assert await last_word(result) == "Failed: called off: nothing was done"
    assert times_done(bot) == 0
    row: Any = await database.fetchrow("SELECT command, result FROM ops.admin_actions")
    assert tuple(row) == ("danger", result.final_content)


async def test_nobody_else_can_press_the_button_not_even_another_operator(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = next(id for id in simulator.world.users if id not in (simulator.world.bot.id, simulator.world.operator_id))
    settings = {"admin_user_ids": frozenset((other,))}
    async with running(database, simulator, monkeypatch, extensions=[COG], **settings) as bot:
        result, buttons = await asked(simulator)
        press = await simulator.press(result, buttons["Do it"], user_id=other)
        await press.wait_done()
        assert (press.content, press.ephemeral) == (OTHERS, True)
        assert times_done(bot) == 0
        await simulator.press(result, buttons["Cancel"], user_id=simulator.world.operator_id)
        await last_word(result)


async def test_a_question_expires_and_its_button_says_so_afterwards(
    bot: Guildbook, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confirm.Confirmations.ask, "__kwdefaults__", {"timeout": 0.3})
    result, buttons = await asked(simulator)
    assert await last_word(result) == "Failed: not confirmed within 0.3 s: nothing was done"
    press = await simulator.press(result, buttons["Do it"], user_id=simulator.world.operator_id)
    await press.wait_done()
    assert (press.content, press.ephemeral, times_done(bot)) == (EXPIRED, True, 0)


async def test_a_button_from_before_a_restart_says_that_it_has_expired(bot: Guildbook, simulator: Simulator) -> None:
    result, buttons = await asked(simulator)
    press = await simulator.press(result, "guildbook-confirm:0123456789abcdef:yes", user_id=simulator.world.operator_id)
    await press.wait_done()
    assert press.content == EXPIRED
    await simulator.press(result, buttons["Cancel"], user_id=simulator.world.operator_id)
    await last_word(result)
