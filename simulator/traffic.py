"""Traffic: events at a steady rate, or as fast as they go."""

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
#: Authors of a burst: each has one rendered payload, into which only the id is put.
_AUTHORS = 500
#: Events handed over at once in a burst.
_SLICE = 500


class Traffic:
    """Lets things happen in a world, beside whatever else is done with it."""

    def __init__(self, world: World, *, waiting: Callable[[], int]) -> None:
        self._world = world
        self._waiting = waiting
        self._task: asyncio.Task[None] | None = None
        #: Events so far.
        self.emitted = 0

    def start(self, rate: float, seed: int = 1, messages: float = 0.7) -> None:
        """Let `rate` things a second happen until `stop`; `messages` is the part of them that are messages."""
        if self._task is not None and not self._task.done():
            raise RuntimeError("the traffic runs already")
        self._task = asyncio.create_task(self._run(rate, random.Random(seed), messages))

    async def stop(self) -> int:
        """Stop, and give how many things have happened so far."""
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
        places = _places(guild) if guild is not None else []
        if guild is None or not places:
            return False
        author = rng.choice(guild.ordered_member_ids())
        self._world.message(guild.id, rng.choice(places), author, "hello")
        return True

    async def burst(self, count: int, seed: int = 1) -> float:
        """Tell of `count` messages as fast as the sessions take them, and give the seconds that took."""
        world, rng = self._world, random.Random(seed)
        guild = max(world.guilds.values(), key=lambda guild: len(guild.members))
        place = _places(guild)[0]
        halves, authors = [], rng.choices(guild.ordered_member_ids(), k=_AUTHORS)
        for author in authors:
            member = guild.members[author]
            told = member_payload(member)
            del told["user"]
            body = to_bytes(
                {"channel_id": str(place), "guild_id": str(guild.id), "type": 0, "author": user_payload(member.user)}
                | {"member": told, "content": "", "timestamp": iso(world.now_us), "edited_timestamp": None}
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
                await self._room()
        return time.monotonic() - started

    async def _room(self) -> None:
        """Wait until what was told is on its way: a client that lets too much pile up loses its session."""
        await asyncio.sleep(0)
        while self._waiting() > 10 * _SLICE:  # noqa: ASYNC110 - the sessions' queues have no event for it
            await asyncio.sleep(0.001)


def _places(guild: Guild) -> list[int]:
    kinds = (ChannelType.TEXT, ChannelType.NEWS)
    return [channel.id for channel in guild.channels.values() if channel.type in kinds and not channel.hidden]
