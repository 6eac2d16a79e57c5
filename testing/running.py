"""The bot in the test's own process, connected to a simulated Discord."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import asyncpg
from discord import gateway, http
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from simulator import Simulator, World
from testing.clock import Clock
from testing.people import Person, wait_for
from utils.bot.client import Guildbook
from utils.database import Pool
from utils.service.lease import Lease, holder
from utils.settings import Settings

#: Seconds for the start, and for what the mirror has to write.
START_SECONDS = 40.0
#: Members of the guild that a test gets, the bot included.
MEMBERS = 8


class _GivenSettings(Settings):
    """Settings that are read from their arguments alone."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def settings_for(simulator: Simulator, **overrides: Any) -> Settings:
    """Return settings for a bot on the simulator, without any from the environment."""
    defaults: dict[str, Any] = {
        "discord_token": simulator.token,
        "discord_api_base": simulator.api_base,
        "flush_seconds": 0.05,
        "chunk_cooldown_seconds": 0,
    }
    return _GivenSettings(**{**defaults, **overrides})


@contextmanager
def restored_endpoints() -> Iterator[None]:
    """Restore discord.py's addresses of Discord after the block: the bot sets them on discord.py's classes."""
    api_base, default_gateway = http.Route.BASE, gateway.DiscordWebSocket.DEFAULT_GATEWAY
    try:
        yield
    finally:
        http.Route.BASE, gateway.DiscordWebSocket.DEFAULT_GATEWAY = api_base, default_gateway


@asynccontextmanager
async def running_bot(
    pool: Pool,
    simulator: Simulator,
    *,
    extensions: Iterable[str] | None = None,
    configure: Callable[[Guildbook], None] = lambda bot: None,
    **settings: Any,
) -> AsyncIterator[Guildbook]:
    """Run the bot in this process: wait until it is ready, and stop it after the block.

    `configure` is called before the start, for example to shorten timeouts.
    """
    with restored_endpoints():
        lease = Lease(pool.target, holder())
        await lease.wait()
        bot = Guildbook(settings_for(simulator, **{"spool": "off", **settings}), pool, lease, extensions=extensions)
        configure(bot)
        async with bot:
            task = asyncio.create_task(bot.start(simulator.token))
            try:
                await wait_for(lambda: bot.readiness()[0] or task.done(), START_SECONDS, "the bot is not ready")
                if task.done():
                    task.result()
                yield bot
            finally:
                await bot.close()
                task.cancel()
                await asyncio.wait([task], timeout=5)
                async with asyncio.timeout(START_SECONDS):
                    await bot.stop_services(5)
                    await lease.release(5)


class RunningBot:
    """The running bot, with a guild of its own for each test. The fixture `bot` returns it."""

    def __init__(self, bot: Guildbook, simulator: Simulator, pool: Pool) -> None:
        #: The bot itself.
        self.bot: Guildbook = bot
        #: Discord, for what this class has no method for; `simulator.faults` lets requests fail.
        self.simulator: Simulator = simulator
        self.pool: Pool = pool
        #: Moves the time that cooldowns and loops go by.
        self.clock: Clock = Clock(self)
        #: The test's guild.
        self.guild_id: int = 0
        #: Its members, without bots: the owner is the first.
        self.people: list[Person] = []

    def __repr__(self) -> str:
        return f"<RunningBot guild {self.guild_id}, {len(self.people)} people>"

    @property
    def world(self) -> World:
        """The simulated world: `world.join(bot.guild_id)` and everything else that happens in Discord."""
        return self.simulator.world

    @property
    def operator(self) -> Person:
        """The owner of the application, in direct messages with the bot, where operators' commands are."""
        return Person(self.world.operator_id, "operator", None, self)

    @property
    def channel_id(self) -> int:
        """The first text channel of the guild."""
        return self._channel(0)

    @property
    def voice_channel_id(self) -> int:
        """The first voice channel of the guild."""
        return self._channel(2)

    def _channel(self, kind: int) -> int:
        channels = self.world.guild(self.guild_id).channels.values()
        found = next((channel.id for channel in channels if channel.type == kind and not channel.hidden), None)
        return found if found is not None else self.world.create_channel(self.guild_id, type=kind)

    async def new_guild(self, members: int = MEMBERS) -> int:
        """Let the bot join a new guild, which becomes the test's, and wait until it is mirrored; return its id."""
        self.guild_id = guild_id = self.world.add_guild(members=members)
        guild = self.world.guild(guild_id)
        ids = [guild.owner_id, *(id for id in guild.members if id != guild.owner_id)]
        users = [user for user in map(self.world.user, ids) if not user.bot]
        self.people = [Person(user.id, user.username, guild_id, self) for user in users]
        await self.settled()
        return guild_id

    async def join(self) -> Person:
        """Let somebody new join the guild, and wait until they are mirrored."""
        user = self.world.user(self.world.join(self.guild_id))
        await self.settled()
        person = Person(user.id, user.username, self.guild_id, self)
        self.people.append(person)
        return person

    async def settled(self) -> None:
        """Wait until the members table has the members of the guild."""
        members = sorted(self.world.guild(self.guild_id).members)
        query = "SELECT user_id FROM members WHERE guild_id = $1 AND left_at IS NULL ORDER BY user_id"
        try:
            async with asyncio.timeout(START_SECONDS):
                while [row[0] for row in await self.pool.fetch(query, self.guild_id)] != members:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"guild {self.guild_id} is not mirrored after {START_SECONDS:g} s") from None

    async def fetch(self, sql: str, *args: Any) -> list[asyncpg.Record]:
        """Return the rows of a query, past the bot's cache."""
        return list(await self.pool.fetch(sql, *args))

    async def fetchval(self, sql: str, *args: Any) -> Any:
        """Return the first value of a query, past the bot's cache."""
        return await self.pool.fetchval(sql, *args)

    async def until(self, sql: str, *args: Any, timeout: float = START_SECONDS) -> Any:
        """Wait until the first value of a query is true, and return it: for what no answer tells."""
        value: Any = None
        try:
            async with asyncio.timeout(timeout):
                while not (value := await self.pool.fetchval(sql, *args)):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"{sql} is still {value!r} after {timeout:g} s") from None
        return value

    def sent_ids(self) -> frozenset[int]:
        """Return the ids of the messages that the bot has sent so far, without answers to interactions."""
        return frozenset(self.simulator.channels.sent)

    def texts_since(self, before: frozenset[int], channel_id: int | None = None) -> list[str]:
        """Return the texts of the messages that the bot sent since, oldest first; of one channel, or of all."""
        return [
            str(message["content"])
            for id, message in self.simulator.channels.sent.items()
            if id not in before and channel_id in (None, int(message["channel_id"]))
        ]

    async def clear(self, tables: Sequence[str]) -> None:
        """Empty tables, given in SQL."""
        if tables:
            await self.pool.execute(" ".join(("TRUNCATE", ", ".join(tables))))
