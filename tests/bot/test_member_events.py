"""EVENTS_FROM_MIRROR=1 over the wire: each change of a member fires once, in order, whatever is cached or breaks."""

from __future__ import annotations

import random
from typing import Any

import discord
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator import Limits, Simulator, World
from tests.bot.activity import until_received
from tests.bot.running import running_bot
from tests.mirror.driver import empty
from tests.mirror.faults.test_database import refusing
from tests.waiting import until
from utils.bot.client import Guildbook
from utils.bot.listeners import find_problem
from utils.database import Pool

Notes = dict[tuple[int, ...], list[Any]]


class Recorder:
    """Listeners that note what they were told of a member, and what a world's changes should have told them."""

    def __init__(self, world: World) -> None:
        self.world = world
        #: By guild id and user id; by user id for what is about a user.
        self.told: Notes = {}
        self.expected: Notes = {}
        self.objects: list[tuple[Any, ...]] = []

    def listen(self, bot: Guildbook) -> None:
        """Register the listeners."""

        async def on_member_update(before: discord.Member, after: discord.Member) -> None:
            self.objects.append((before, after))
            self._note(self.told, (after.guild.id, after.id), "update", _shown(before), _shown(after))

        async def on_user_update(before: discord.User, after: discord.User) -> None:
            self.objects.append((before, after))
            self._note(self.told, (after.id,), "user", before.global_name, after.global_name)

        async def on_member_remove(member: discord.Member) -> None:
            self.objects.append((member,))
            self._note(self.told, (member.guild.id, member.id), "remove", _shown(member))

        async def on_member_join(member: discord.Member) -> None:
            self._note(self.told, (member.guild.id, member.id), "join")

        for listener in (on_member_update, on_user_update, on_member_remove, on_member_join):
            bot.add_listener(listener)

    @staticmethod
    def _note(notes: Notes, key: tuple[int, ...], *what: Any) -> None:
        notes.setdefault(key, []).append(what)

    def change(self, chance: random.Random, guild_id: int) -> None:
        """Change the world in one way, and note what has to be told."""
        world, guild = self.world, self.world.guild(guild_id)
        others = [id for id in guild.ordered_member_ids() if id not in (world.bot.id, guild.owner_id)]
        user_id = chance.choice(others or [guild.owner_id])
        member = guild.members[user_id]
        before = member.nick, tuple(sorted(member.roles))
        kind = chance.choice(("nick", "nick", "roles", "name", "leave", "join")) if others[3:] else "join"
        if kind == "name":
            name, known = f"name {chance.randrange(3)}", member.user.global_name
            world.rename_user(user_id, global_name=name)
            if name != known:
                self._note(self.expected, (user_id,), "user", known, name)
        elif kind == "leave":
            world.leave(guild_id, user_id)
            self._note(self.expected, (guild_id, user_id), "remove", before)
        elif kind == "join":
            gone = sorted(set(world.user_ids) - guild.members.keys())
            user_id = world.join(guild_id, chance.choice(gone) if gone else None)
            self._note(self.expected, (guild_id, user_id), "join")
        else:
            roles = sorted(guild.roles.keys() - {guild_id})
            if kind == "nick":
                world.update_member(guild_id, user_id, nick=f"nick {chance.randrange(3)}")
            else:
                world.update_member(guild_id, user_id, roles=roles[: chance.randrange(3)])
            after = member.nick, tuple(sorted(member.roles))
            if after != before:
                self._note(self.expected, (guild_id, user_id), "update", before, after)

    async def wait(self, bot: Guildbook) -> None:
        """Wait until everything expected was told, and nothing waits."""
        mirror = bot.mirror
        await until(lambda: sum(map(len, self.told.values())) >= sum(map(len, self.expected.values())))
        await mirror.writer.flush()
        assert self.told == self.expected
        assert mirror.writer.live_events is not None
        assert len(mirror.writer.live_events) == 0


def _shown(member: discord.Member) -> tuple[str | None, tuple[int, ...]]:
    return member.nick, tuple(sorted(role.id for role in member.roles if not role.is_default()))


@settings(max_examples=4)
@given(
    seed=st.integers(0, 9_999),
    member_cache=st.sampled_from(["none", "voice", "all"]),
    outage=st.sampled_from(["gone", "read-only", "locked"]),
    flush=st.sampled_from([(0.02, 500), (0.3, 500), (1.0, 3)]),
)
async def test_each_change_fires_once_in_order_through_resumes_and_outages(
    database: Pool, seed: int, member_cache: str, outage: str, flush: tuple[float, int]
) -> None:
    await empty(database)
    world, chance = World(seed=seed), random.Random(seed)
    guild_ids = [world.add_guild(members=size, roles=4) for size in (12, 8)]
    recorder = Recorder(world)

    def storm() -> None:
        for _ in range(chance.randrange(40)):
            recorder.change(chance, chance.choice(guild_ids))

    async with (
        Simulator(world, limits=Limits.none()) as simulator,
        running_bot(
            database, simulator, extensions=[], configure=recorder.listen, member_cache=member_cache,
            events_from_mirror=True, db_retry_seconds=0.05, flush_seconds=flush[0], flush_rows=flush[1],
        ) as bot,
    ):  # fmt: skip
        for _ in range(3):
            storm()
            simulator.faults.drop_socket_after_events(1 + chance.randrange(8))
            async with refusing(database, outage):
                storm()
                await until_received(bot, simulator, guild_ids[0])
                storm()
            await recorder.wait(bot)
        assert all(isinstance(found, discord.Member | discord.User) for told in recorder.objects for found in told)
        cached = {id(member) for guild in bot.guilds for member in guild.members}
        assert not cached.intersection(id(found) for told in recorder.objects for found in told)
        assert find_problem("member_update", bot.present()) is None


@pytest.mark.slow
async def test_what_happened_while_the_bot_was_away_fires_nothing(database: Pool) -> None:
    world = World(seed=3)
    guild_id = world.add_guild(members=12, roles=4)
    async with Simulator(world, limits=Limits.none()) as simulator:
        for _ in range(2):
            recorder, chance, away = Recorder(world), random.Random(5), Recorder(world)
            async with running_bot(
                database, simulator, extensions=[], configure=recorder.listen, events_from_mirror=True
            ) as bot:
                simulator.faults.refuse_resume()
                for _ in range(10):
                    recorder.change(chance, guild_id)
                await recorder.wait(bot)
            for _ in range(20):
                away.change(chance, guild_id)


async def test_without_the_setting_discord_py_dispatches(database: Pool, simulator: Simulator, small: int) -> None:
    world = simulator.world
    recorder = Recorder(world)
    async with running_bot(database, simulator, extensions=[], configure=recorder.listen, member_cache="all") as bot:
        user_id = world.join(small)
        world.update_member(small, user_id, nick="x")
        await until(lambda: recorder.told.get((small, user_id), [])[1:])
        guild = bot.get_guild(small)
        assert guild is not None
        assert recorder.objects[-1][1] is guild.get_member(user_id)
