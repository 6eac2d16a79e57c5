"""Slash commands are registered only when they have changed."""

from __future__ import annotations

import logging

import pytest
from discord import app_commands

from simulator import Simulator
from tests.bot.cogs import greeter
from tests.bot.running import running_bot
from utils.bot.command_sync import sync_commands
from utils.database import Pool

COGS = ("cogs.mirror", "tests.bot.cogs.greeter")


async def test_only_the_first_start_registers_commands(database: Pool, simulator: Simulator) -> None:
    for _ in range(2):
        async with running_bot(database, simulator, extensions=COGS):
            assert sorted(command["name"] for command in simulator.interactions.commands()) == ["hello", "mirror"]
    assert simulator.interactions.syncs == {None: 1}


async def test_order_of_cogs_does_not_matter(database: Pool, simulator: Simulator) -> None:
    for extensions in (COGS, COGS[::-1]):
        async with running_bot(database, simulator, extensions=extensions):
            pass
    assert simulator.interactions.syncs == {None: 1}


async def test_changed_command_is_registered_again(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_bot(database, simulator, extensions=COGS):
        pass
    monkeypatch.setenv(greeter.VARIABLE, "Say good morning")
    for _ in range(2):
        async with running_bot(database, simulator, extensions=COGS):
            descriptions = {command["name"]: command["description"] for command in simulator.interactions.commands()}
            assert descriptions["hello"] == "Say good morning"
    assert simulator.interactions.syncs == {None: 2}


async def test_guild_without_commands_is_emptied(database: Pool, simulator: Simulator, small: int, large: int) -> None:
    async with running_bot(database, simulator, extensions=COGS, admin_guild_id=small):
        assert [command["name"] for command in simulator.interactions.commands(small)] == ["mirror"]
    async with running_bot(database, simulator, extensions=COGS, admin_guild_id=large):
        assert simulator.interactions.commands(small) == []
        assert [command["name"] for command in simulator.interactions.commands(large)] == ["mirror"]
    assert simulator.interactions.syncs == {None: 1, small: 2, large: 1}


async def test_refused_registration_is_retried_at_the_next_start(
    database: Pool, simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    simulator.faults.rest_fail("PUT /applications", status=403)
    with caplog.at_level(logging.WARNING, "utils.bot.command_sync"):
        async with running_bot(database, simulator, extensions=COGS):
            assert simulator.interactions.commands() == []
    assert "applications.commands" in caplog.text
    async with running_bot(database, simulator, extensions=COGS):
        assert len(simulator.interactions.commands()) == 2


async def test_no_failure_of_a_registration_ends_the_bot(
    database: Pool, simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(app_commands.Translator):
        async def translate(self, *_: object) -> str:
            raise RuntimeError("no translation")

    async with running_bot(database, simulator, extensions=COGS) as bot:
        await bot.tree.set_translator(Broken())
        assert await sync_commands(bot) == []
    assert "slash commands not registered globally" in caplog.text
