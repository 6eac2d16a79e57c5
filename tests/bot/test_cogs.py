"""Cogs: found, loaded apart from one another, and not in each other's way."""

from __future__ import annotations

import logging

import pytest
from discord import app_commands
from discord.ext import commands

from simulator import Simulator
from tests.bot.running import running, until_equal
from utils.bot.loader import found_extensions
from utils.database import Pool


async def test_a_broken_cog_costs_itself_alone(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    extensions = ("tests.bot.cogs.unreadable", "tests.bot.cogs.failing", "tests.bot.cogs.missing", "cogs.mirror")
    with caplog.at_level(logging.ERROR, "utils.bot.loader"):
        async with running(database, simulator, monkeypatch, extensions=extensions) as bot:
            assert list(bot.cogs) == ["MirrorCommands"]
            await until_equal(database, simulator)
    told = sorted(record.getMessage() for record in caplog.records if record.name == "utils.bot.loader")
    for name, line in zip(sorted(extensions[:3]), told, strict=True):
        assert line.startswith(f"{name} is left out")
    assert "broken at its loading" in told[0]
    assert "broken at its import" in told[2]


async def test_every_cog_loads_and_no_two_have_the_same_command_or_listener_name(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(database, simulator, monkeypatch) as bot:
        assert sorted(bot.extensions) == found_extensions()
        assert found_extensions() == ["cogs.cogs", "cogs.db", "cogs.mirror", "cogs.preferences"]
        names: list[str] = []
        for cog in bot.cogs.values():
            names += [command.qualified_name for command in cog.walk_app_commands()]
            names += [command.qualified_name for command in cog.walk_commands()]
            for command in cog.walk_app_commands():
                assert isinstance(command, app_commands.Command | app_commands.Group)
                assert command.description not in ("", "…")
            assert isinstance(cog, commands.Cog)
        assert len(names) == len(set(names)), sorted(names)
