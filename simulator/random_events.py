"""Chance: one random thing that happens in a world, weighted towards what happens often."""

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

_Happening = Callable[["World", random.Random, Guild], str | None]


def random_event(world: World, rng: random.Random) -> str:
    """Let one random thing happen; a draw that does not fit the guild (nobody to ban) is drawn again."""
    guilds = [guild for guild in world.guilds.values() if guild.present]
    if not guilds:
        raise ValueError("nothing can happen in a world without a guild that the bot is in")
    for _ in range(100):
        happening = rng.choices(_HAPPENINGS, _WEIGHTS)[0]
        told = happening(world, rng, rng.choice(guilds))
        if told is not None:
            return told
    raise RuntimeError("100 draws found nothing that can happen in this world")


def _someone(world: World, rng: random.Random, guild: Guild) -> int | None:
    others = guild.ordered_member_ids()
    for _ in range(8):
        user_id = rng.choice(others)
        if user_id not in (world.bot.id, guild.owner_id):
            return user_id
    return None


def _name(rng: random.Random) -> str:
    return rng.choice((rng.choice(DISPLAY_NAMES), f"{rng.choice(WORDS)} {rng.randrange(1000)}"))


def _join(world: World, rng: random.Random, guild: Guild) -> str | None:
    known = rng.choice(world.user_ids) if rng.randrange(3) == 0 else None
    if known is not None and (known in guild.members or known in guild.bans):
        return None
    return f"{world.join(guild.id, known)} joined {guild.id}"


def _leave(world: World, rng: random.Random, guild: Guild) -> str | None:
    user_id = _someone(world, rng, guild)
    if user_id is None or len(guild.members) < 4:
        return None
    world.leave(guild.id, user_id)
    return f"{user_id} left {guild.id}"


def _ban(world: World, rng: random.Random, guild: Guild) -> str | None:
    user_id = _someone(world, rng, guild)
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
    user_id = _someone(world, rng, guild)
    if user_id is None:
        return None
    if rng.randrange(2):
        world.rename_user(user_id, global_name=rng.choice((None, _name(rng))))
    else:
        world.rename_user(user_id, username=f"{rng.choice(WORDS)}{rng.getrandbits(24):x}")
    return f"{user_id} changed its name"


def _member(world: World, rng: random.Random, guild: Guild) -> str | None:
    user_id = _someone(world, rng, guild)
    if user_id is None:
        return None
    kind = rng.randrange(6)
    if kind == 0:
        world.update_member(guild.id, user_id, nick=rng.choice((None, *NICKS, _name(rng))))
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
    free = sorted(r.id for r in guild.roles.values() if r.id != guild.id and not r.managed)
    kind = rng.randrange(4)
    if kind == 0 and len(free) < 50:
        return f"role {world.create_role(guild.id, _name(rng), color=rng.getrandbits(24))} came up in {guild.id}"
    if not free:
        return None
    role_id = rng.choice(free)
    if kind == 1:
        world.delete_role(guild.id, role_id)
        return f"role {role_id} was deleted in {guild.id}"
    world.update_role(guild.id, role_id, name=_name(rng), permissions=rng.getrandbits(50), hoist=kind == 2)
    return f"role {role_id} changed in {guild.id}"


def _channel(world: World, rng: random.Random, guild: Guild) -> str | None:
    kind = rng.randrange(8)
    if kind == 0 and len(guild.channels) < 60:
        kinds = (ChannelType.TEXT, ChannelType.VOICE, ChannelType.CATEGORY, ChannelType.NEWS, ChannelType.FORUM)
        return f"channel {world.create_channel(guild.id, _name(rng), rng.choice(kinds))} came up in {guild.id}"
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
        world.update_channel(guild.id, channel.id, name=_name(rng), position=rng.randrange(60))
    return f"channel {channel.id} changed in {guild.id}"


def _thread(world: World, rng: random.Random, guild: Guild) -> str | None:
    kind = rng.randrange(6)
    places = thread_parents(guild)
    if kind <= 1 and places and len(guild.threads) < 100:
        return f"thread {world.create_thread(guild.id, rng.choice(places).id, _name(rng))} came up in {guild.id}"
    if not guild.threads:
        return None
    thread = rng.choice(list(guild.threads.values()))
    if kind == 2:
        world.delete_thread(guild.id, thread.id)
        return f"thread {thread.id} was deleted in {guild.id}"
    if kind == 3 and not thread.archived:
        world.update_thread(guild.id, thread.id, name=_name(rng), slowmode=rng.choice((0, 5, 30)))
    else:
        world.archive_thread(guild.id, thread.id, archived=not thread.archived)
    return f"thread {thread.id} changed in {guild.id}"


def _settings(world: World, rng: random.Random, guild: Guild) -> str:
    kind = rng.randrange(3)
    if kind == 0:
        world.update_guild(guild.id, name=_name(rng))
    elif kind == 1:
        world.update_guild(
            guild.id, description=rng.choice((None, "changed", "説明")), afk_timeout=rng.choice((60, 300))
        )
    else:
        world.update_guild(guild.id, features=rng.sample(("COMMUNITY", "NEWS", "BANNER"), k=rng.randrange(4)))
    return f"guild {guild.id} changed"


def _message(world: World, rng: random.Random, guild: Guild) -> str | None:
    user_id = _someone(world, rng, guild)
    texts = [c.id for c in guild.channels.values() if c.type in (ChannelType.TEXT, ChannelType.NEWS)]
    if user_id is None or not texts:
        return None
    return f"message {world.message(guild.id, rng.choice(texts), user_id, _name(rng))} in {guild.id}"


_TABLE: tuple[tuple[_Happening, int], ...] = (
    (_member, 30), (_join, 14), (_leave, 12), (_rename, 14), (_ban, 3), (_unban, 2), (_role, 6), (_channel, 9),
    (_thread, 10), (_settings, 3), (_message, 5),
)  # fmt: skip
_HAPPENINGS = [happening for happening, _ in _TABLE]
_WEIGHTS = [weight for _, weight in _TABLE]
