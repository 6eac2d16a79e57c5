"""Generates events at a steady rate or as a burst."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from .entities import ChannelType, Guild
from .ids import iso
from .payloads import member_payload, to_bytes, user_payload
from .state import Emission, Intent

if TYPE_CHECKING:
    from .world import World

#: Seconds between two batches of events.
_BATCH_S = 0.02
#: Number of authors of a burst; each has one rendered payload, into which only the id is inserted.
_AUTHORS = 500
#: Number of events sent at once in a burst.
_SLICE = 500


class Traffic:
    """Generates events in a world in the background."""

    def __init__(self, world: World, *, pending: Callable[[], int]) -> None:
        self._world = world
        self._pending = pending
        self._task: asyncio.Task[None] | None = None
        #: Number of events generated so far.
        self.emitted = 0

    def start(self, rate: float, seed: int = 1, messages: float = 0.7) -> None:
        """Generate `rate` events per second until `stop`; `messages` is the share of messages."""
        if self._task is not None and not self._task.done():
            raise RuntimeError("traffic is already running")
        self._task = asyncio.create_task(self._run(rate, random.Random(seed), messages))

    async def stop(self) -> int:
        """Stop and return the number of events so far."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return self.emitted

    async def _run(self, rate: float, rng: random.Random, messages: float) -> None:
        started, done = time.monotonic(), 0
        while True:
            due = int((time.monotonic() - started) * rate)
            for _ in range(due - done):
                if rng.random() >= messages or not self._message(rng):
                    self._world.random_event(rng)
                self.emitted += 1
            done = due
            await asyncio.sleep(_BATCH_S)

    def _message(self, rng: random.Random) -> bool:
        guild_ids = self._world.guild_ids()
        guild = self._world.guilds[rng.choice(guild_ids)] if guild_ids else None
        channel_ids = _text_channel_ids(guild) if guild is not None else []
        if guild is None or not channel_ids:
            return False
        author = rng.choice(guild.ordered_member_ids())
        self._world.message(guild.id, rng.choice(channel_ids), author, "hello")
        return True

    async def burst(self, count: int, seed: int = 1) -> float:
        """Send `count` messages as fast as the sessions accept them and return the seconds it took."""
        world, rng = self._world, random.Random(seed)
        guild = max(world.guilds.values(), key=lambda guild: len(guild.members))
        channel_id = _text_channel_ids(guild)[0]
        halves, authors = [], rng.choices(guild.ordered_member_ids(), k=_AUTHORS)
        for author in authors:
            member = guild.members[author]
            author_member = member_payload(member)
            del author_member["user"]
            body = to_bytes(
                {
                    "channel_id": str(channel_id),
                    "guild_id": str(guild.id),
                    "type": 0,
                    "author": user_payload(member.user),
                }
                | {"member": author_member, "content": "", "timestamp": iso(world.now_us), "edited_timestamp": None}
                | {"tts": False, "mention_everyone": False, "mentions": [], "mention_roles": [], "attachments": []}
                | {"embeds": [], "pinned": False, "flags": 0, "components": [], "nonce": None}
            )
            halves.append((author, b"," + body[1:]))
        started = time.monotonic()
        for number in range(count):
            author, rest = halves[number % _AUTHORS]
            id = world.new_id()
            world.ledger.record_message(id, guild.id, author)
            world.publish(Emission("MESSAGE_CREATE", guild.id, b'{"id":"%d"' % id + rest, int(Intent.GUILD_MESSAGES)))
            if number % _SLICE == _SLICE - 1:
                await self._wait_for_room()
        return time.monotonic() - started

    async def _wait_for_room(self) -> None:
        """Wait until most events are sent: a client that falls too far behind loses its session."""
        await asyncio.sleep(0)
        while self._pending() > 10 * _SLICE:  # noqa: ASYNC110 - the queues have no event to wait for
            await asyncio.sleep(0.001)


def _text_channel_ids(guild: Guild) -> list[int]:
    kinds = (ChannelType.TEXT, ChannelType.NEWS)
    return [channel.id for channel in guild.channels.values() if channel.type in kinds and not channel.hidden]
