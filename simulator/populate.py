"""Generates users, members, roles, channels and threads from a seed, with the variety of real guilds."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Final

from .entities import THREADED_TYPES, Channel, ChannelType, Guild, Json, Member, Permission, Role, Thread, User

WORDS: Final = [
    "river",
    "ember",
    "quill",
    "marble",
    "sparrow",
    "cinder",
    "willow",
    "cobalt",
    "lantern",
    "thistle",
    "onyx",
    "juniper",
    "falcon",
    "saffron",
    "glacier",
    "pepper",
    "orchid",
    "tundra",
    "velvet",
    "walnut",
    "zephyr",
    "harbor",
    "indigo",
    "kestrel",
    "lotus",
    "meadow",
    "nimbus",
    "pollen",
    "raven",
    "sable",
    "timber",
    "umber",
]
DISPLAY_NAMES: Final = (
    "Zoë",
    "Łukasz",
    "Ana María",
    "李小龍",
    "さくら",
    "Дмитрий",
    "محمد",
    "עידו",
    "김민수",
    "Ωmega",
    "naïve café",
    "🦊 fox",
    "👩‍👩‍👧‍👦",
    "Z͑ͫ̓a̴l̷g̸o",
    "ﷺ",
    "a'; DROP TABLE users;--",
    "<b>bold</b>",
    "back\\slash",
    'quo"te',
    "tab\there",
    "{0}",
    "%s",
    "ＦＵＬＬ",
    "é",
    "e\u0301",
    "\u202egnirts",
    "ｱｲｳ",
    "Ünïcödé",
    "𝕬𝖑𝖎𝖈𝖊",
    "x" * 32,
    " padded ",
    "Null",
    "Iñtërnâtiônàl",
    "ไทย",
    "ß",
    "İi",
)
NICKS: Final = ("", "boss", "🎉", "Кот", "nick with spaces", "猫", "O'Brien", "a\u200bb")
TOPICS: Final = (None, "", "Say hello", "規則を読んでください", "line one\nline two", "https://example.org?a=1&b=2")
LOCALES: Final = ("en-US", "de", "ja", "pt-BR", "fr", "pl")
FEATURES: Final = (
    "COMMUNITY",
    "NEWS",
    "INVITE_SPLASH",
    "BANNER",
    "ANIMATED_ICON",
    "ROLE_ICONS",
    "VANITY_URL",
    "SOUNDBOARD",
)
_YEAR_US: Final = 365 * 86_400 * 1_000_000
_MASK128: Final = (1 << 128) - 1


def draw_user(rng: random.Random, user_id: int) -> User:
    """Generate a user."""
    bits = rng.getrandbits(192)
    bot = bits & 63 == 0
    pick = bits >> 6
    name = f"{WORDS[pick & 31]}{(pick >> 5) & 0xFFFFFF:x}"
    avatar = None
    if (bits >> 35) & 3:
        avatar = f"{bits >> 64 & _MASK128:032x}" if (bits >> 37) & 7 else f"a_{bits >> 64 & _MASK128:032x}"
    return User(
        user_id,
        name,
        f"{1 + ((bits >> 40) & 0x1FFF) % 9998:04d}" if bot else "0",
        None if bot or not (bits >> 54) & 3 else DISPLAY_NAMES[((bits >> 56) & 0xFF) % len(DISPLAY_NAMES)],
        avatar,
        bot,
        False,
        1 << ((bits >> 42) & 7) if (bits >> 50) & 7 == 0 else 0,
        [],
    )


def draw_member(
    rng: random.Random, user: User, guild_id: int, role_sets: list[tuple[int, ...]], now: int, created_at: int
) -> Member:
    """Generate a member; some are guests, timed out, boosting or without a join date."""
    bits = rng.getrandbits(128)
    rare = (bits >> 40) & 0xFF
    return Member(
        user,
        guild_id,
        NICKS[(bits >> 3) & 7] if bits & 7 == 0 else None,
        f"{bits:032x}" if (bits >> 10) & 31 == 0 else None,
        role_sets[(bits >> 16) % len(role_sets)],
        None if rare == 0 else created_at + (bits >> 48) % max(1, now - created_at),
        now - (bits >> 60) % _YEAR_US if rare in (1, 2, 3, 4) else None,
        now + ((bits >> 64) % (28 * 86_400_000_000)) - 86_400_000_000 if rare in (5, 6, 7) else None,
        rare in (8, 9, 10),
        0 if rare > 60 else (bits >> 50) & 0b1011,
    )


#: Discord's default, with what a bot needs to be shown everything.
_EVERYONE = int(
    0x637DA257
    | Permission.VIEW_CHANNEL
    | Permission.READ_MESSAGE_HISTORY
    | Permission.MANAGE_THREADS
    | Permission.VIEW_AUDIT_LOG
)


def draw_roles(rng: random.Random, guild: Guild, ids: Iterable[int], bot_id: int) -> None:
    """Generate @everyone and the given roles: the first is the bot's, the second the boosters'."""
    guild.roles[guild.id] = Role(guild.id, "@everyone", position=0, permissions=_EVERYONE)
    for number, role_id in enumerate(ids):
        role = Role(role_id, f"{rng.choice(WORDS)} {number}", position=number + 1)
        role.color = rng.choice((0, rng.getrandbits(24)))
        role.hoist, role.mentionable = bool(rng.getrandbits(1)), bool(rng.getrandbits(1))
        role.permissions = rng.getrandbits(50)
        if number == 0:
            role.managed, role.tags, role.name = True, {"bot_id": str(bot_id)}, "Guildbook"
        elif number == 1:
            role.managed, role.tags = True, {"premium_subscriber": None}
        elif number % 5 == 2:
            role.unicode_emoji = "🔥"
        elif number % 5 == 3:
            role.icon, role.flags = f"{rng.getrandbits(128):032x}", 1
        guild.roles[role_id] = role


def draw_overwrites(rng: random.Random, guild: Guild) -> list[Json]:
    """Generate the permission overwrites of a channel: for roles and sometimes a member."""
    roles = rng.sample(sorted(guild.roles), k=min(len(guild.roles), rng.randrange(3)))
    overwrites: list[Json] = [
        {"id": str(role_id), "type": 0, "allow": str(rng.getrandbits(40)), "deny": str(rng.getrandbits(12) & ~0x400)}
        for role_id in roles
    ]
    if rng.randrange(4) == 0:
        overwrites.append({"id": str(guild.owner_id), "type": 1, "allow": str(1 << 11), "deny": "0"})
    return overwrites


_LAYOUT: Final = (
    ChannelType.CATEGORY, ChannelType.TEXT, ChannelType.TEXT, ChannelType.VOICE, ChannelType.FORUM, ChannelType.TEXT,
    ChannelType.NEWS, ChannelType.CATEGORY, ChannelType.TEXT, ChannelType.VOICE, ChannelType.STAGE, ChannelType.TEXT,
)  # fmt: skip


def draw_channel(rng: random.Random, guild: Guild, channel_id: int, kind: int, position: int) -> Channel:
    """Generate a channel with the fields of its type."""
    categories = [c.id for c in guild.channels.values() if c.type == ChannelType.CATEGORY]
    channel = Channel(channel_id, guild.id, int(kind), f"{rng.choice(WORDS)}-{position}", position)
    channel.permission_overwrites = draw_overwrites(rng, guild)
    if kind == ChannelType.CATEGORY:
        return channel
    channel.parent_id = rng.choice([None, *categories])
    channel.nsfw = rng.randrange(10) == 0
    channel.slowmode = rng.choice((0, 0, 5, 60))
    if kind in (ChannelType.VOICE, ChannelType.STAGE):
        channel.bitrate, channel.user_limit = rng.choice((64_000, 96_000)), rng.choice((0, 10))
        channel.rtc_region = rng.choice((None, "rotterdam", "brazil"))
        return channel
    channel.topic = rng.choice(TOPICS)
    channel.default_auto_archive_duration = rng.choice((None, 60, 1440, 10_080))
    if kind == ChannelType.FORUM:
        channel.flags = rng.choice((0, 1 << 4))
        channel.available_tags = [
            {"id": str(channel_id + n), "name": word, "moderated": False, "emoji_id": None, "emoji_name": None}
            for n, word in enumerate(("bug", "idea", "done"), start=1)
        ]
    return channel


def draw_channels(rng: random.Random, guild: Guild, ids: list[int], hidden: int) -> None:
    """Generate a guild's channels, hide the last `hidden` ones, and set the guild settings that refer to channels."""
    for number, channel_id in enumerate(ids):
        guild.channels[channel_id] = draw_channel(rng, guild, channel_id, _LAYOUT[number % len(_LAYOUT)], number)
    plain = [c for c in guild.channels.values() if c.type != ChannelType.CATEGORY]
    for channel in plain[max(0, len(plain) - hidden) :]:
        channel.hidden = True
    texts = [c.id for c in plain if c.type == ChannelType.TEXT and not c.hidden]
    voices = [c.id for c in plain if c.type == ChannelType.VOICE and not c.hidden]
    if texts:
        guild.system_channel_id = texts[0]
        guild.rules_channel_id = rng.choice((None, texts[-1]))
        guild.public_updates_channel_id = rng.choice((None, texts[-1]))
    if voices:
        guild.afk_channel_id = rng.choice((None, voices[0]))


def draw_thread(rng: random.Random, parent: Channel, thread_id: int, owner_id: int, now: int) -> Thread:
    """Generate a thread of a type that its parent channel allows."""
    kind = ChannelType.PUBLIC_THREAD
    if parent.type == ChannelType.NEWS:
        kind = ChannelType.NEWS_THREAD
    elif parent.type == ChannelType.TEXT and rng.randrange(3) == 0:
        kind = ChannelType.PRIVATE_THREAD
    thread = Thread(thread_id, parent.guild_id, parent.id, int(kind), f"{rng.choice(WORDS)} talk", owner_id, now, now)
    thread.auto_archive_duration = rng.choice((60, 1440, 4320, 10_080))
    thread.slowmode = rng.choice((0, 0, 10))
    thread.joined = rng.randrange(3) == 0
    if kind == ChannelType.PRIVATE_THREAD:
        thread.invitable = bool(rng.getrandbits(1))
    if parent.type == ChannelType.FORUM:
        thread.applied_tags = [int(t["id"]) for t in parent.available_tags if rng.getrandbits(1)]
        thread.flags = rng.choice((0, 0, 1 << 1))
    return thread


def thread_parents(guild: Guild) -> list[Channel]:
    """Return the visible channels that can have threads."""
    return [c for c in guild.channels.values() if c.type in THREADED_TYPES and not c.hidden]
