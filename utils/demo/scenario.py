"""Generates the events of the demo: a minute of activity in a few guilds."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta

from simulator import World
from simulator.entities import Channel, ChannelType, Guild, Thread
from simulator.ids import to_datetime

Event = Callable[[Guild], bool]

_NICKS = ("boss", "sleepy", "Кот", "猫", "O'Brien", "on holiday", "🎉 birthday", "new here", None)
_ROLES = ("regular", "artist", "night owl", "event crew", "quiz winner", "translator")
_TOPICS = ("Say hello", "規則を読んでください", "Patch notes, weekly", "No spoilers, please", "Be kind")
_CHANNELS = ("off-topic", "showcase", "patch-notes", "music", "help-desk", "photos")
_THREADS = ("weekend plans", "bug hunt", "movie night", "release party", "lost and found")
_GUILDS = ("Night Shift", "The Observatory", "Paper Boats", "Long Table", "Corner Shop")


class Scenario:
    """Applies random events to a world, the same ones for the same seed; `counts` has their number by kind.

    Hidden channels and their threads are not changed, because the bot cannot observe them.
    """

    def __init__(self, world: World, seed: int = 1) -> None:
        self.world: World = world
        self.counts: Counter[str] = Counter()
        self._rng = random.Random(seed)
        self._left: list[tuple[int, int]] = []
        self._common: dict[str, tuple[Event, int]] = {
            "joins": (self._join, 22),
            "leaves": (self._leave, 14),
            "returns": (self._return, 4),
            "renames": (self._rename, 14),
            "nicknames": (self._nick, 14),
            "roles given or taken": (self._give_roles, 14),
            "timeouts": (self._time_out, 3),
            "roles changed": (self._change_role, 4),
            "channels changed": (self._change_channel, 5),
            "threads changed": (self._change_thread, 6),
        }

    def events(self, events: int = 240) -> Iterator[str]:
        """Apply `events` events, one per iteration, and yield their kinds; each rare kind occurs once."""
        rare: list[tuple[str, Event]] = [
            ("guilds renamed", self._rename_guild),
            ("roles created", self._create_role),
            ("roles deleted", self._delete_role),
            ("channels created", self._create_channel),
            ("channels deleted", self._delete_channel),
            ("channels hidden from the bot", self._hide_channel),
            ("threads created", self._create_thread),
            ("bans", self._ban),
        ]
        guilds = self._guilds()
        for number in range(events):
            every = max(1, events // len(rare))
            if number % every == every // 2 and number // every < len(rare):
                kind, event = rare[number // every]
                if any(event(guild) for guild in self._shuffled(guilds)):
                    self.counts[kind] += 1
                    yield kind
                    continue
            yield self.next_event()

    def next_event(self) -> str:
        """Apply one common event and return its kind."""
        kinds = list(self._common)
        weights = [weight for _, weight in self._common.values()]
        guilds = self._guilds()
        while True:
            kind = self._rng.choices(kinds, weights)[0]
            if any(self._common[kind][0](guild) for guild in self._shuffled(guilds)):
                self.counts[kind] += 1
                return kind

    def _guilds(self) -> list[Guild]:
        return [self.world.guild(id) for id in self.world.guild_ids()]

    def _shuffled(self, guilds: list[Guild]) -> list[Guild]:
        return self._rng.sample(guilds, len(guilds))

    def _random_member(self, guild: Guild) -> int | None:
        for _ in range(20):
            id = self._rng.choice(guild.ordered_member_ids())
            if id not in (self.world.bot.id, guild.owner_id):
                return id
        return None

    # Members.

    def _join(self, guild: Guild) -> bool:
        self.world.join(guild.id)
        return True

    def _leave(self, guild: Guild) -> bool:
        id = self._random_member(guild)
        if id is None or len(guild.members) < 20:
            return False
        self.world.leave(guild.id, id)
        self._left.append((guild.id, id))
        return True

    def _return(self, guild: Guild) -> bool:
        for membership in self._left:
            if membership[0] == guild.id:
                self._left.remove(membership)
                self.world.join(*membership)
                return True
        return False

    def _ban(self, guild: Guild) -> bool:
        id = self._random_member(guild)
        if id is not None:
            self.world.ban(guild.id, id)
        return id is not None

    def _rename(self, guild: Guild) -> bool:
        id = self._random_member(guild)
        if id is not None:
            user = self.world.user(id)
            name = f"{(user.global_name or user.username)[:20]} {self._rng.choice('✨★♪')}"
            self.world.rename_user(id, global_name=name)
        return id is not None

    def _nick(self, guild: Guild) -> bool:
        id = self._random_member(guild)
        if id is not None:
            self.world.update_member(guild.id, id, nick=self._rng.choice(_NICKS))
        return id is not None

    def _give_roles(self, guild: Guild) -> bool:
        id = self._random_member(guild)
        roles = self._plain_roles(guild)
        if id is None or not roles:
            return False
        given = self._rng.sample(roles, k=self._rng.randint(0, min(3, len(roles))))
        self.world.update_member(guild.id, id, roles=given)
        return True

    def _time_out(self, guild: Guild) -> bool:
        id = self._random_member(guild)
        if id is not None:
            until = to_datetime(self.world.now_us) + timedelta(minutes=self._rng.choice((5, 60, 1440)))
            self.world.update_member(guild.id, id, timed_out_until=until)
        return id is not None

    # Guilds, roles, channels and threads.

    def _rename_guild(self, guild: Guild) -> bool:
        self.world.update_guild(guild.id, name=self._rng.choice(_GUILDS))
        return True

    def _plain_roles(self, guild: Guild) -> list[int]:
        return [role.id for role in guild.roles.values() if not role.managed and role.id != guild.id]

    def _create_role(self, guild: Guild) -> bool:
        self.world.create_role(guild.id, self._rng.choice(_ROLES), color=self._rng.getrandbits(24))
        return True

    def _change_role(self, guild: Guild) -> bool:
        roles = self._plain_roles(guild)
        if roles:
            name = self._rng.choice(_ROLES)
            self.world.update_role(guild.id, self._rng.choice(roles), name=name, color=self._rng.getrandbits(24))
        return bool(roles)

    def _delete_role(self, guild: Guild) -> bool:
        roles = self._plain_roles(guild)
        if len(roles) < 3:
            return False
        self.world.delete_role(guild.id, self._rng.choice(roles))
        return True

    def _visible_channels(self, guild: Guild, *kinds: ChannelType) -> list[Channel]:
        return [channel for channel in guild.channels.values() if not channel.hidden and channel.type in kinds]

    def _create_channel(self, guild: Guild) -> bool:
        self.world.create_channel(guild.id, self._rng.choice(_CHANNELS), ChannelType.TEXT)
        return True

    def _change_channel(self, guild: Guild) -> bool:
        channels = self._visible_channels(guild, ChannelType.TEXT, ChannelType.NEWS)
        if channels:
            channel = self._rng.choice(channels)
            self.world.update_channel(
                guild.id, channel.id, topic=self._rng.choice(_TOPICS), slowmode=self._rng.choice((0, 5, 30))
            )
        return bool(channels)

    def _delete_channel(self, guild: Guild) -> bool:
        channels = self._visible_channels(guild, ChannelType.TEXT)
        if len(channels) < 3:
            return False
        self.world.delete_channel(guild.id, self._rng.choice(channels).id)
        return True

    def _hide_channel(self, guild: Guild) -> bool:
        channels = self._visible_channels(guild, ChannelType.TEXT)
        if len(channels) < 3:
            return False
        self.world.hide_channel(guild.id, self._rng.choice(channels).id)
        return True

    def _create_thread(self, guild: Guild) -> bool:
        channels = self._visible_channels(guild, ChannelType.TEXT, ChannelType.FORUM)
        if channels:
            self.world.create_thread(guild.id, self._rng.choice(channels).id, self._rng.choice(_THREADS))
        return bool(channels)

    def _change_thread(self, guild: Guild) -> bool:
        threads: list[Thread] = [thread for thread in guild.threads.values() if guild.sees(thread.id)]
        if not threads:
            return False
        thread = self._rng.choice(threads)
        if thread.archived or self._rng.random() < 0.4:
            self.world.archive_thread(guild.id, thread.id, archived=not thread.archived)
        else:
            self.world.update_thread(guild.id, thread.id, name=self._rng.choice(_THREADS))
        return True
