"""The state of a world, its clock and its events: the base class of the mutations."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntFlag
from typing import Final

from .entities import Channel, Guild, Json, Member, Thread, User
from .ids import WORLD_START_US, snowflake_at
from .ledger import Ledger
from .oracle import Row, expected_rows, is_shown
from .payloads import to_bytes


class Intent(IntFlag):
    """Gateway intents, https://docs.discord.com/developers/events/gateway#gateway-intents."""

    GUILDS = 1 << 0
    GUILD_MEMBERS = 1 << 1
    GUILD_MODERATION = 1 << 2
    GUILD_EXPRESSIONS = 1 << 3
    GUILD_INTEGRATIONS = 1 << 4
    GUILD_WEBHOOKS = 1 << 5
    GUILD_INVITES = 1 << 6
    GUILD_VOICE_STATES = 1 << 7
    GUILD_PRESENCES = 1 << 8
    GUILD_MESSAGES = 1 << 9
    GUILD_MESSAGE_REACTIONS = 1 << 10
    GUILD_MESSAGE_TYPING = 1 << 11
    DIRECT_MESSAGES = 1 << 12
    DIRECT_MESSAGE_REACTIONS = 1 << 13
    DIRECT_MESSAGE_TYPING = 1 << 14
    MESSAGE_CONTENT = 1 << 15
    GUILD_SCHEDULED_EVENTS = 1 << 16
    AUTO_MODERATION_CONFIGURATION = 1 << 20
    AUTO_MODERATION_EXECUTION = 1 << 21
    GUILD_MESSAGE_POLLS = 1 << 24
    DIRECT_MESSAGE_POLLS = 1 << 25


PRIVILEGED: Final = Intent.GUILD_MEMBERS | Intent.GUILD_PRESENCES | Intent.MESSAGE_CONTENT


@dataclass(slots=True, frozen=True)
class Emission:
    """One gateway event of the world; `intent` 0 reaches every session.

    `redacted` is the body for sessions without the message content intent, if it differs. GUILD_CREATE has no body:
    each session renders its own, because the intents determine which members it contains. `is_direct` events, of direct
    messages, go to shard 0 alone.
    """

    name: str
    guild_id: int | None
    body: bytes
    intent: int
    redacted: bytes | None = None
    newly_joined: bool = False
    is_direct: bool = False


class UnknownEntity(LookupError):
    """The world has no such entity."""


class WorldState:
    """Guilds, users, the clock and the listeners of one world.

    `clock` returns the time in microseconds since 1970. Without one, every mutation takes about a second, so that
    worlds are reproducible.
    """

    def __init__(self, seed: int = 1, *, clock: Callable[[], int] | None = None) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self._clock = clock
        self.now_us = WORLD_START_US if clock is None else clock()
        self.guilds: dict[int, Guild] = {}
        self.users: dict[int, User] = {}
        self.user_ids: list[int] = []
        self.listeners: list[Callable[[Emission], None]] = []
        self.ledger = Ledger()
        self.mutations = 0
        #: Users by their opened channel of direct messages.
        self.direct_channels: dict[int, int] = {}
        self._increment = 0
        # Far in the past, so that every user is older than every guild.
        self._next_user_id = 80_000_000_000_000_000 + self.rng.getrandbits(40)
        bot_id = self.new_user_id()
        self.bot = User(bot_id, "guildbook", f"{self.rng.randrange(1, 9999):04d}", None, None, True, False, 0, [])
        self.users[bot_id] = self.bot
        self.operator_id = self.new_user_id()
        self.users[self.operator_id] = User(self.operator_id, "operator", "0", "Operator", None, False, False, 0, [])
        self.application_id = bot_id

    def __repr__(self) -> str:
        return f"<World seed={self.seed} guilds={len(self.guilds)} users={len(self.users)} mutations={self.mutations}>"

    def new_user_id(self) -> int:
        """Return the next user id; ids increase, with uneven gaps."""
        self._next_user_id += 1 + self.rng.getrandbits(38)
        return self._next_user_id

    def new_id(self) -> int:
        """Return a new snowflake of the world's current time."""
        self._increment = (self._increment + 1) & 0xFFF
        if self._increment == 0:
            self.now_us += 1000
        return snowflake_at(self.now_us, self._increment)

    def tick(self) -> int:
        """Advance the time, by about a second or to that of the clock, and count a mutation; return the time."""
        self.mutations += 1
        step = 1_000_000 + self.rng.getrandbits(19)
        self.now_us = self.now_us + step if self._clock is None else max(self.now_us + 1, self._clock())
        return self.now_us

    def guild_ids(self) -> list[int]:
        """Return the ids of the guilds the bot is in, in order of creation."""
        return [guild.id for guild in self.guilds.values() if guild.present]

    def guild(self, guild_id: int) -> Guild:
        """Find a guild."""
        try:
            return self.guilds[guild_id]
        except KeyError:
            raise UnknownEntity(f"the world has no guild {guild_id}") from None

    def user(self, user_id: int) -> User:
        """Find a user."""
        try:
            return self.users[user_id]
        except KeyError:
            raise UnknownEntity(f"the world has no user {user_id}") from None

    def member(self, guild_id: int, user_id: int) -> Member:
        """Find a member of a guild."""
        try:
            return self.guild(guild_id).members[user_id]
        except KeyError:
            raise UnknownEntity(f"user {user_id} is not a member of guild {guild_id}") from None

    def channel(self, guild_id: int, channel_id: int) -> Channel:
        """Find a channel of a guild."""
        try:
            return self.guild(guild_id).channels[channel_id]
        except KeyError:
            raise UnknownEntity(f"guild {guild_id} has no channel {channel_id}") from None

    def thread(self, guild_id: int, thread_id: int) -> Thread:
        """Find a thread of a guild."""
        try:
            return self.guild(guild_id).threads[thread_id]
        except KeyError:
            raise UnknownEntity(f"guild {guild_id} has no thread {thread_id}") from None

    def find_channel(self, channel_id: int) -> tuple[Guild, Channel | Thread] | None:
        """Find the guild that holds a channel or thread id."""
        for guild in self.guilds.values():
            found = guild.channels.get(channel_id) or guild.threads.get(channel_id)
            if found is not None:
                return guild, found
        return None

    def emit(
        self,
        name: str,
        guild: Guild | None,
        payload: Json,
        intent: int = Intent.GUILDS,
        *,
        redacted: Json | None = None,
    ) -> bool:
        """Publish an event unless its guild is unavailable or the bot is not in it; return whether it was published."""
        if not self.listeners or (guild is not None and not (guild.available and guild.present)):
            return False
        self.publish(
            Emission(
                name,
                None if guild is None else guild.id,
                to_bytes(payload),
                int(intent),
                None if redacted is None else to_bytes(redacted),
            )
        )
        return True

    def emit_direct(self, name: str, payload: Json, intent: int) -> None:
        """Publish an event of direct messages, which shard 0 receives."""
        self.publish(Emission(name, None, to_bytes(payload), int(intent), is_direct=True))

    def publish(self, emission: Emission) -> None:
        """Pass an emission to every listener."""
        for listener in tuple(self.listeners):
            listener(emission)

    def expected_rows(self, table: str, guild_id: int | None = None) -> Iterator[Row]:
        """Yield the rows that a correct mirror's table contains for what exists now."""
        return expected_rows(self, table, guild_id)

    def hidden_thread_ids(self, guild_id: int) -> set[int]:
        """Return the ids of threads that the bot cannot observe, or could not list once they are archived."""
        guild = self.guild(guild_id)
        return {thread.id for thread in guild.threads.values() if not is_shown(guild, thread)}
