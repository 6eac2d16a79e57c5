"""Slash commands are registered when they changed, and only then."""

from __future__ import annotations

import logging

import pytest

from simulator import Simulator
from tests.bot.cogs import greeter
from tests.bot.running import running
from utils.database import Pool

COGS = ("cogs.mirror", "tests.bot.cogs.greeter")


async def test_only_the_first_start_registers_the_commands(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        async with running(database, simulator, monkeypatch, extensions=COGS):
            assert sorted(command["name"] for command in simulator.interactions.commands()) == ["hello", "mirror"]
    assert simulator.interactions.syncs == {None: 1}


async def test_the_order_of_the_cogs_makes_no_difference(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for extensions in (COGS, COGS[::-1]):
        async with running(database, simulator, monkeypatch, extensions=extensions):
            pass
    assert simulator.interactions.syncs == {None: 1}


async def test_a_changed_command_is_registered_once_more(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(database, simulator, monkeypatch, extensions=COGS):
        pass
    monkeypatch.setenv(greeter.VARIABLE, "Say good morning")
    for _ in range(2):
        async with running(database, simulator, monkeypatch, extensions=COGS):
            said = {command["name"]: command["description"] for command in simulator.interactions.commands()}
            assert said["hello"] == "Say good morning"
    assert simulator.interactions.syncs == {None: 2}


async def test_an_emptied_guild_loses_its_commands(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, small: int, large: int
) -> None:
    async with running(database, simulator, monkeypatch, extensions=COGS, admin_guild_id=small):
        assert [command["name"] for command in simulator.interactions.commands(small)] == ["mirror"]
    async with running(database, simulator, monkeypatch, extensions=COGS, admin_guild_id=large):
        assert simulator.interactions.commands(small) == []
        assert [command["name"] for command in simulator.interactions.commands(large)] == ["mirror"]
    assert simulator.interactions.syncs == {None: 1, small: 2, large: 1}


async def test_a_refused_registration_is_logged_and_tried_again_at_the_next_start(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    simulator.faults.rest_fail("PUT /applications", status=403)
    with caplog.at_level(logging.WARNING, "utils.bot.command_sync"):
        async with running(database, simulator, monkeypatch, extensions=COGS):
            assert simulator.interactions.commands() == []
    assert "applications.commands" in caplog.text
    async with running(database, simulator, monkeypatch, extensions=COGS):
        assert len(simulator.interactions.commands()) == 2
