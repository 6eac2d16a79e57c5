"""What fires with which intents and caches: the table, compared with discord.py's source and with a running bot."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import discord
import pytest

from simulator import Simulator
from tests.bot.activity import let_everything_happen
from tests.bot.running import running_bot, wait_until_mirrored
from utils.bot.client import Guildbook
from utils.bot.listeners import ALWAYS, EVENTS, Present, find_problem
from utils.database import Pool

pytestmark = pytest.mark.guilds(10)


def test_the_table_names_every_event_of_discord_py() -> None:
    dispatched: set[str] = set()
    for file in Path(discord.__file__).parent.rglob("*.py"):
        dispatched |= set(re.findall(r"""dispatch\(\s*['"](\w+)['"]""", file.read_text(encoding="utf-8")))
    assert dispatched == EVENTS.keys() | ALWAYS
    assert not EVENTS.keys() & ALWAYS
    assert {name for event in EVENTS.values() for name in event.intents} <= discord.Intents.VALID_FLAGS.keys()
    assert {event.instead for event in EVENTS.values()} - {None, "mirror_change"} <= EVENTS.keys() | ALWAYS


#: Without a member cache some events are dispatched for the bot itself alone, which does nothing here.
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"intents": ("all",)},
        {"intents": ("all",), "member_cache": "all"},
        {"intents": ("all",), "member_cache": "all", "message_cache": 100},
        {"intents": ("dm_messages", "guild_reactions", "expressions"), "member_cache": "all", "message_cache": 5},
    ],
    ids=["nothing", "all intents", "and members", "and messages", "some"],
)
async def test_an_event_fires_exactly_if_the_table_says_so(
    database: Pool, simulator: Simulator, settings: dict[str, Any]
) -> None:
    fired: set[str] = set()

    def listen(bot: Guildbook) -> None:
        for event in EVENTS:

            async def listener(*_: object, event: str = event) -> None:
                fired.add(event)

            bot.add_listener(listener, f"on_{event}")

    (guild_id,) = simulator.world.guilds
    async with running_bot(database, simulator, extensions=[], configure=listen, **settings) as bot:
        fired.clear()
        user = await let_everything_happen(bot, simulator, guild_id)
        present = bot.present()
        assert {event for event in EVENTS if find_problem(event, present) is None} == fired
        rng = random.Random(7)
        for _ in range(200):
            simulator.world.random_event(rng)
        await wait_until_mirrored(database, simulator)
    counted = await database.fetchval("SELECT message_count FROM member_stats WHERE user_id = $1", user)
    assert counted == 4, "direct messages are not counted"


def test_a_problem_is_one_line_with_the_replacement() -> None:
    nothing = Present(discord.Intents(guilds=True, members=True, guild_messages=True), "none", 0)
    assert find_problem("message_edit", nothing) == (
        "is never called without messages in memory; use on_raw_message_edit, or set MESSAGE_CACHE=1000"
    )
    assert find_problem("raw_reaction_add", nothing) == (
        "is never called without the intent guild_reactions or dm_reactions; declare intents ="
        " discord.Intents(guild_reactions=True) in the cog, or set INTENTS=guild_reactions"
    )
    assert find_problem("member_remove", nothing) == (
        "is called for the bot itself only (MEMBER_CACHE=none); use on_raw_member_remove, or set"
        " EVENTS_FROM_MIRROR=1 or MEMBER_CACHE=all"
    )
    problems = [problem for event in EVENTS if (problem := find_problem(event, nothing)) is not None]
    assert [problem for problem in problems if "\n" in problem or ";" not in problem] == [
        find_problem("private_channel_update", nothing), find_problem("socket_raw_send", nothing),
    ]  # fmt: skip
    assert find_problem("message", nothing) is find_problem("an_event_of_a_cog", nothing) is None
