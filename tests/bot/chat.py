"""A member who writes to the bot, over the wire."""

from __future__ import annotations

import asyncio

from simulator import Simulator, World
from tests.bot.activity import until_received
from tests.waiting import until
from utils.bot.client import Guildbook


class Chat:
    """A member who writes in a channel, and what the bot answers."""

    def __init__(self, bot: Guildbook, simulator: Simulator) -> None:
        self.bot = bot
        self.world: World = simulator.world
        (self.guild_id,) = self.world.guilds
        self.user_id = self.world.guild(self.guild_id).owner_id
        self.channel_id = self.world.create_channel(self.guild_id, "talk")
        self.mention = f"<@{self.world.bot.id}>"
        self._simulator = simulator
        self._sent = simulator.channels.sent
        #: The id of the member's last message.
        self.last_message_id: int = 0

    async def say(self, text: str, *, is_direct: bool = False) -> str | None:
        """Write a text and return the bot's answer; None if it does not answer."""
        before = set(self._sent)
        if is_direct:
            self.last_message_id = self.world.direct_message(self.user_id, text)
        else:
            self.last_message_id = self.world.message(self.guild_id, self.channel_id, self.user_id, text)
        await until_received(self.bot, self._simulator, self.guild_id)
        await self._wait_for_commands()
        answers = [message for id, message in self._sent.items() if id not in before]
        return answers[-1]["content"] or answers[-1]["embeds"][0]["description"] if answers else None

    async def _wait_for_commands(self) -> None:
        """Wait until no message is being processed: discord.py runs each in a task of its own."""
        await until(lambda: not any(task.get_name() == "discord.py: on_message" for task in asyncio.all_tasks()))
