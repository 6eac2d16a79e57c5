"""Random mutations of a world, weighted by how often they occur on Discord."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from .entities import ChannelType, Guild
from .ids import to_datetime
from .populate import DISPLAY_NAMES, NICKS, TOPICS, WORDS, thread_parents

if TYPE_CHECKING:
    from .world import World

_Mutation = Callable[["World", random.Random, Guild], str | None]


def random_event(world: World, rng: random.Random) -> str:
    """Apply one random mutation and describe it; draws again if it is impossible in the guild (no user to unban)."""
    guilds = [guild for guild in world.guilds.values() if guild.present]
    if not guilds:
        raise ValueError("the world has no guild that the bot is in")
    for _ in range(100):
        mutation = rng.choices(_MUTATIONS, _WEIGHTS)[0]
        description = mutation(world, rng, rng.choice(guilds))
        if description is not None:
            return description
    raise RuntimeError("no mutation was possible in 100 draws")


def _random_member(world: World, rng: random.Random, guild: Guild) -> int | None:
    member_ids = guild.ordered_member_ids()
    for _ in range(8):
        user_id = rng.choice(member_ids)
        if user_id not in (world.bot.id, guild.owner_id):
            return user_id
    return None


def _random_name(rng: random.Random) -> str:
    return rng.choice((rng.choice(DISPLAY_NAMES), f"{rng.choice(WORDS)} {rng.randrange(1000)}"))


def _join(world: World, rng: random.Random, guild: Guild) -> str | None:
    known = rng.choice(world.user_ids) if rng.randrange(3) == 0 else None
    if known is not None and (known in guild.members or known in guild.bans):
        return None
    return f"{world.join(guild.id, known)} joined {guild.id}"


def _leave(world: World, rng: random.Random, guild: Guild) -> str | None:
    user_id = _random_member(world, rng, guild)
    if user_id is None or len(guild.members) < 4:
        return None
    world.leave(guild.id, user_id)
    return f"{user_id} left {guild.id}"


def _ban(world: World, rng: random.Random, guild: Guild) -> str | None:
    user_id = _random_member(world, rng, guild)
    if user_id is None or len(guild.members) < 4:
        return None
    world.ban(guild.id, user_id)
    return f"{user_id} was banned from {guild.id}"


def _unban(world: World, rng: random.Random, guild: Guild) -> str | None:
    if not guild.bans:
        return None
    user_id = rng.choice(sorted(guild.bans))
    world.unban(guild.id, user_id)
    return f"{user_id} was unbanned from {guild.id}"


def _rename(world: World, rng: random.Random, guild: Guild) -> str | None:
    user_id = _random_member(world, rng, guild)
    if user_id is None:
        return None
    if rng.randrange(2):
        world.rename_user(user_id, global_name=rng.choice((None, _random_name(rng))))
    else:
        world.rename_user(user_id, username=f"{rng.choice(WORDS)}{rng.getrandbits(24):x}")
    return f"{user_id} changed its name"


def _member(world: World, rng: random.Random, guild: Guild) -> str | None:
    user_id = _random_member(world, rng, guild)
    if user_id is None:
        return None
    kind = rng.randrange(6)
    if kind == 0:
        world.update_member(guild.id, user_id, nick=rng.choice((None, *NICKS, _random_name(rng))))
    elif kind == 1:
        until = to_datetime(world.now_us) + timedelta(minutes=rng.randrange(1, 10_000))
        world.update_member(guild.id, user_id, timed_out_until=rng.choice((None, until)))
    elif kind == 2:
        world.update_member(guild.id, user_id, premium_since=rng.choice((None, to_datetime(world.now_us))))
    elif kind == 3:
        world.update_member(guild.id, user_id, pending=bool(rng.getrandbits(1)), flags=rng.randrange(16))
    else:
        roles = sorted(guild.roles.keys() - {guild.id})
        world.update_member(guild.id, user_id, roles=rng.sample(roles, k=rng.randrange(min(5, len(roles) + 1))))
    return f"{user_id} changed in {guild.id}"


def _role(world: World, rng: random.Random, guild: Guild) -> str | None:
    editable = sorted(r.id for r in guild.roles.values() if r.id != guild.id and not r.managed)
    kind = rng.randrange(4)
    if kind == 0 and len(editable) < 50:
        role_id = world.create_role(guild.id, _random_name(rng), color=rng.getrandbits(24))
        return f"role {role_id} created in {guild.id}"
    if not editable:
        return None
    role_id = rng.choice(editable)
    if kind == 1:
        world.delete_role(guild.id, role_id)
        return f"role {role_id} was deleted in {guild.id}"
    world.update_role(guild.id, role_id, name=_random_name(rng), permissions=rng.getrandbits(50), hoist=kind == 2)
    return f"role {role_id} changed in {guild.id}"


def _channel(world: World, rng: random.Random, guild: Guild) -> str | None:
    kind = rng.randrange(8)
    if kind == 0 and len(guild.channels) < 60:
        kinds = (ChannelType.TEXT, ChannelType.VOICE, ChannelType.CATEGORY, ChannelType.NEWS, ChannelType.FORUM)
        return f"channel {world.create_channel(guild.id, _random_name(rng), rng.choice(kinds))} created in {guild.id}"
    if len(guild.channels) < 2:
        return None
    channel = rng.choice(list(guild.channels.values()))
    if kind == 1:
        world.delete_channel(guild.id, channel.id)
        return f"channel {channel.id} was deleted in {guild.id}"
    if kind in (2, 3) and channel.type != ChannelType.CATEGORY:
        (world.reveal_channel if channel.hidden else world.hide_channel)(guild.id, channel.id)
        return f"channel {channel.id} was {'hidden' if channel.hidden else 'revealed'} in {guild.id}"
    if channel.type in (ChannelType.TEXT, ChannelType.NEWS, ChannelType.FORUM):
        world.update_channel(guild.id, channel.id, topic=rng.choice(TOPICS), slowmode=rng.choice((0, 5, 30)))
    else:
        world.update_channel(guild.id, channel.id, name=_random_name(rng), position=rng.randrange(60))
    return f"channel {channel.id} changed in {guild.id}"


def _thread(world: World, rng: random.Random, guild: Guild) -> str | None:
    kind = rng.randrange(6)
    parents = thread_parents(guild)
    if kind <= 1 and parents and len(guild.threads) < 100:
        thread_id = world.create_thread(guild.id, rng.choice(parents).id, _random_name(rng))
        return f"thread {thread_id} created in {guild.id}"
    if not guild.threads:
        return None
    thread = rng.choice(list(guild.threads.values()))
    if kind == 2:
        world.delete_thread(guild.id, thread.id)
        return f"thread {thread.id} was deleted in {guild.id}"
    if kind == 3 and not thread.archived:
        world.update_thread(guild.id, thread.id, name=_random_name(rng), slowmode=rng.choice((0, 5, 30)))
    else:
        world.archive_thread(guild.id, thread.id, archived=not thread.archived)
    return f"thread {thread.id} changed in {guild.id}"


def _settings(world: World, rng: random.Random, guild: Guild) -> str:
    kind = rng.randrange(3)
    if kind == 0:
        world.update_guild(guild.id, name=_random_name(rng))
    elif kind == 1:
        world.update_guild(
            guild.id, description=rng.choice((None, "changed", "説明")), afk_timeout=rng.choice((60, 300))
        )
    else:
        world.update_guild(guild.id, features=rng.sample(("COMMUNITY", "NEWS", "BANNER"), k=rng.randrange(4)))
    return f"guild {guild.id} changed"


def _message(world: World, rng: random.Random, guild: Guild) -> str | None:
    user_id = _random_member(world, rng, guild)
    texts = [c.id for c in guild.channels.values() if c.type in (ChannelType.TEXT, ChannelType.NEWS)]
    if user_id is None or not texts:
        return None
    return f"message {world.message(guild.id, rng.choice(texts), user_id, _random_name(rng))} in {guild.id}"


_TABLE: tuple[tuple[_Mutation, int], ...] = (
    (_member, 30), (_join, 14), (_leave, 12), (_rename, 14), (_ban, 3), (_unban, 2), (_role, 6), (_channel, 9),
    (_thread, 10), (_settings, 3), (_message, 5),
)  # fmt: skip
_MUTATIONS = [mutation for mutation, _ in _TABLE]
_WEIGHTS = [weight for _, weight in _TABLE]
