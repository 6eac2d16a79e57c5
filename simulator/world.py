"""The world: guilds generated from a seed, whose mutations emit gateway events."""

from __future__ import annotations

import random

from . import random_events
from .activity import ActivityMutations
from .channel_mutations import ChannelMutations
from .entities import Guild, Member, User
from .guild_mutations import LARGE_THRESHOLD, GuildMutations
from .ids import WORLD_START_US
from .member_mutations import MemberMutations
from .messages import MessageMutations
from .payloads import member_json
from .populate import (
    DISPLAY_NAMES,
    FEATURES,
    LOCALES,
    WORDS,
    draw_channels,
    draw_member,
    draw_roles,
    draw_thread,
    draw_user,
    thread_parents,
)

_YEAR_US = 365 * 86_400 * 1_000_000


class World(MemberMutations, GuildMutations, ChannelMutations, MessageMutations, ActivityMutations):
    """A deterministic Discord: the same seed and calls give the same world, ids and times included."""

    def add_guild(
        self,
        members: int = 200,
        roles: int = 8,
        channels: int = 12,
        threads: int = 6,
        archived_threads: int = 3,
        hidden_channels: int = 2,
        name: str | None = None,
        *,
        shared_users: float = 0.1,
    ) -> int:
        """Create a guild with the bot in it and return its id; a connected bot receives it as a newly joined guild.

        `members` counts the bot; `roles` does not count @everyone; `hidden_channels` are among `channels`;
        `shared_users` is the share of members that are also in earlier guilds.
        """
        if members < 2:
            raise ValueError(f"a guild has an owner and the bot, so at least 2 members, not {members}")
        rng, now = self.rng, self.tick()
        created_at = WORLD_START_US - _YEAR_US - rng.getrandbits(46)
        title = name if name is not None else f"{rng.choice(DISPLAY_NAMES)} {rng.choice(WORDS)}"
        guild = Guild(self.new_id(), title, 0, created_at + rng.getrandbits(44))
        self._draw_settings(guild)
        draw_roles(rng, guild, [self.new_id() for _ in range(roles)], self.bot.id)
        self._draw_members(guild, members - 1, shared_users, created_at)
        self.add_bot_member(guild)
        draw_channels(rng, guild, [self.new_id() for _ in range(channels)], hidden_channels)
        parents = thread_parents(guild)
        for number in range((threads + archived_threads) if parents else 0):
            self.now_us += 1000
            thread = draw_thread(rng, parents[number % len(parents)], self.new_id(), guild.owner_id, self.now_us)
            thread.archived = number >= threads
            thread.locked = thread.archived and rng.randrange(3) == 0
            guild.threads[thread.id] = thread
        voices = [c.id for c in guild.channels.values() if c.type == 2 and not c.hidden]
        if voices:
            guild.voice = dict.fromkeys(list(guild.members)[: min(3, members - 1)], voices[0])
        guild.large = len(guild.members) > LARGE_THRESHOLD
        self.guilds[guild.id] = guild
        guild.present = False
        self._add_bot(guild, now)
        return guild.id

    def random_event(self, rng: random.Random) -> str:
        """Apply one random mutation and describe it in a few words."""
        return random_events.random_event(self, rng)

    def prerender(self) -> None:
        """Render and cache every member, so that the first member request is as fast as later ones."""
        for guild in self.guilds.values():
            for member in guild.members.values():
                member_json(member)

    def _add_bot(self, guild: Guild, now: int) -> None:
        if not self.listeners:
            guild.present = True
            return
        # A guild created while the bot is connected is one it just joined.
        self.bot.guild_ids.remove(guild.id)
        guild.pop_member(self.bot.id)
        guild.joined_at = now
        self.add_bot_back(guild.id)

    def _draw_settings(self, guild: Guild) -> None:
        rng = self.rng
        guild.icon = rng.choice((None, f"{rng.getrandbits(128):032x}"))
        guild.banner = rng.choice((None, None, f"a_{rng.getrandbits(128):032x}"))
        guild.description = rng.choice((None, "A place to talk", "場所"))
        guild.preferred_locale = rng.choice(LOCALES)
        guild.verification_level, guild.explicit_content_filter = rng.randrange(5), rng.randrange(3)
        guild.default_message_notifications, guild.mfa_level = rng.randrange(2), rng.randrange(2)
        guild.system_channel_flags, guild.afk_timeout = rng.randrange(64), rng.choice((60, 300, 3600))
        guild.premium_tier, guild.premium_subscription_count = rng.randrange(4), rng.randrange(40)
        guild.features = rng.sample(FEATURES, k=rng.randrange(len(FEATURES)))
        if "VANITY_URL" in guild.features:
            guild.vanity_url_code = f"{rng.choice(WORDS)}{rng.randrange(1000)}"

    def _draw_members(self, guild: Guild, count: int, shared: float, created_at: int) -> None:
        rng = self.rng
        known = self.user_ids
        shared_ids = rng.sample(known, k=min(len(known), int(count * shared)))
        users: list[User] = [self.users[user_id] for user_id in shared_ids]
        for _ in range(count - len(users)):
            user = draw_user(rng, self.new_user_id())
            self.users[user.id] = user
            known.append(user.id)
            users.append(user)
        plain = [role.id for role in guild.roles.values() if not role.managed and role.id != guild.id]
        sets: list[tuple[int, ...]] = [(), ()]
        sets += [tuple(rng.sample(plain, k=rng.randrange(1, min(5, len(plain) + 1)))) for _ in range(14) if plain]
        now = self.now_us
        members: dict[int, Member] = guild.members
        guild_id = guild.id
        for user in users:
            user.guild_ids.append(guild_id)
            members[user.id] = draw_member(rng, user, guild_id, sets, now, created_at)
        guild.owner_id = users[-1].id if not users[-1].bot else users[0].id
