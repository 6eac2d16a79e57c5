"""Confirmation buttons: who may press them, and when they expire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from simulator import InteractionResult, Simulator
from tests.bot.running import running_bot
from utils.bot.client import Guildbook
from utils.database import Pool
from utils.operations.confirm import EXPIRED, NOT_YOURS

COG = "tests.bot.cogs.confirming"


@pytest.fixture
async def bot(database: Pool, simulator: Simulator) -> AsyncIterator[Guildbook]:
    async with running_bot(database, simulator, extensions=[COG]) as client:
        yield client


async def ask(simulator: Simulator) -> tuple[InteractionResult, dict[str, str]]:
    """Run the command, and return its reply and the custom ids of its buttons by label."""
    result = await simulator.run_command("danger", user_id=simulator.world.operator_id)
    await result.wait_done(until=lambda seen: bool(seen.buttons))
    return result, result.buttons


def run_count(bot: Guildbook) -> int:
    cog = bot.get_cog("Confirming")
    runs: int = getattr(cog, "runs")  # noqa: B009 - discord.py imported the module again: its class is another one
    return runs


async def final_answer(result: InteractionResult) -> str | None:
    await result.wait_done(until=lambda seen: not seen.buttons and seen.final_content not in ("Sure?", "Confirmed."))
    return result.final_content


async def test_runs_once_and_only_after_the_button_was_pressed(bot: Guildbook, simulator: Simulator) -> None:
    result, buttons = await ask(simulator)
    assert (result.final_content, set(buttons), run_count(bot)) == ("Sure?", {"Run", "Cancel"}, 0)
    operator = simulator.world.operator_id
    first, second = await asyncio.gather(
        simulator.press(result, buttons["Run"], user_id=operator),
        simulator.press(result, buttons["Run"], user_id=operator),
    )
    assert await final_answer(result) == "done"
    assert run_count(bot) == 1
    await second.wait_done(until=lambda seen: seen.type is not None)
    assert {first.content, second.content} == {None, EXPIRED}


async def test_cancel_button_stops_the_command(bot: Guildbook, simulator: Simulator, database: Pool) -> None:
    result, buttons = await ask(simulator)
    await simulator.press(result, buttons["Cancel"], user_id=simulator.world.operator_id)
    assert await final_answer(result) == "Cancelled: nothing was done."
    assert run_count(bot) == 0
    row: Any = await database.fetchrow("SELECT command, result FROM ops.admin_actions")
    assert tuple(row) == ("danger", result.final_content)


async def test_rejects_button_presses_by_other_operators(database: Pool, simulator: Simulator) -> None:
    other = next(id for id in simulator.world.users if id not in (simulator.world.bot.id, simulator.world.operator_id))
    settings: dict[str, Any] = {"admin_user_ids": frozenset((other,))}
    async with running_bot(database, simulator, extensions=[COG], **settings) as bot:
        result, buttons = await ask(simulator)
        press = await simulator.press(result, buttons["Run"], user_id=other)
        await press.wait_done()
        assert (press.content, press.ephemeral) == (NOT_YOURS, True)
        assert run_count(bot) == 0
        await simulator.press(result, buttons["Cancel"], user_id=simulator.world.operator_id)
        await final_answer(result)


async def test_expired_question_is_reported_by_its_button(
    bot: Guildbook, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot.confirmations.timeout = 0.3
    result, buttons = await ask(simulator)
    assert await final_answer(result) == "Not confirmed within 0.3 s: nothing was done."
    press = await simulator.press(result, buttons["Run"], user_id=simulator.world.operator_id)
    await press.wait_done()
    assert (press.content, press.ephemeral, run_count(bot)) == (EXPIRED, True, 0)


async def test_button_from_before_a_restart_is_reported_expired(bot: Guildbook, simulator: Simulator) -> None:
    result, buttons = await ask(simulator)
    press = await simulator.press(result, "guildbook-confirm:0123456789abcdef:yes", user_id=simulator.world.operator_id)
    await press.wait_done()
    assert press.content == EXPIRED
    await simulator.press(result, buttons["Cancel"], user_id=simulator.world.operator_id)
    await final_answer(result)
