"""Guilds, users, members, roles and channels for the tests of cogs.

    guild = make_guild(name="Tea house")
    ann = make_user()
    await write(database, guild, ann, make_member(guild, ann, nick="Ann"))

or, when their values do not matter:

    people = await populate(database, guilds=2, members=50)
    assert await cog.count(people.guilds[0].id) == 50

The `make_…` functions return detached model instances with a value for every column that Discord sends; keyword
arguments override the defaults. Compare them with what repositories return column by column. `write` uses the mirror's
merge, so rows have stamps, and writing a changed row again records the change in the history.

As fixtures:

    @pytest.fixture
    async def people(database: Pool) -> Population:
        return await populate(database, guilds=1, members=10)
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from models import DISCORD_EPOCH_MS, Base, Channel, Guild, Member, Role, User
from tests.leases import seize
from utils.database import Pool
from utils.mirror.records.rows import COUNTER_BITS, Entry, Key, key_columns, value_columns
from utils.mirror.write.batch import Batch, write_batch
from utils.service.lease import Fence

#: Creation time of the first object.
BEGINNING = datetime(2024, 1, 1, tzinfo=UTC)
#: View channels, send messages and read the message history.
EVERYONE_MAY = 1 << 10 | 1 << 11 | 1 << 16
_NAMES = (
    "amber", "basil", "cedar", "dahlia", "elm", "fern", "ginger", "hazel", "iris", "jasmine", "kale", "lilac", "maple",
    "nettle", "olive", "poppy", "quince", "rowan", "sage", "thyme", "ursinia", "violet", "willow", "yarrow", "zinnia",
)  # fmt: skip

Model = Guild | User | Member | Role | Channel


class Snowflakes:
    """Generates ids, one second apart, starting at `BEGINNING`."""

    def __init__(self, worker: int = 0) -> None:
        """`worker`: 0 to 1023. Generators with different workers never return the same id."""
        if not 0 <= worker < 1024:
            raise ValueError(f"worker {worker}: must be 0 to 1023, because a snowflake has ten bits for it")
        self._worker = worker
        self._seconds = itertools.count()

    def next(self) -> int:
        """Return the next id."""
        milliseconds = round(BEGINNING.timestamp() * 1000) - DISCORD_EPOCH_MS + 1000 * next(self._seconds)
        return milliseconds << 22 | self._worker << 12


_ids = Snowflakes()


def made_at(snowflake: int) -> datetime:
    """Return the creation time that a snowflake encodes."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=(snowflake >> 22) + DISCORD_EPOCH_MS)


def _made(model: type[Any], defaults: dict[str, Any], values: dict[str, Any]) -> Any:
    unknown = values.keys() - model.__table__.columns.keys()
    if unknown:
        raise TypeError(f"{model.__name__} has no column {', '.join(sorted(unknown))}")
    return model(**(defaults | values))


def make_guild(**values: Any) -> Guild:
    """Return a guild that the bot is in. `owner_id` defaults to an unused id."""
    id = values.setdefault("id", _ids.next())
    defaults = {
        "name": f"Guild {id % 9973}", "owner_id": _ids.next(), "preferred_locale": "en-US", "afk_timeout": 300,
        "verification_level": 1, "default_message_notifications": 0, "explicit_content_filter": 0, "mfa_level": 0,
        "nsfw_level": 0, "system_channel_flags": 0, "joined_at": made_at(id) + timedelta(days=1), "large": False,
        "unavailable": False, "member_count": 1, "max_members": 500_000, "premium_tier": 0,
        "premium_subscription_count": 0, "features": [], "left_at": None,
    }  # fmt: skip
    guild: Guild = _made(Guild, defaults, values)
    return guild


def make_user(**values: Any) -> User:
    """Return a user; with `bot=True` a bot, which has a four-digit discriminator."""
    id = values.setdefault("id", _ids.next())
    name = _NAMES[(id >> 22) // 1000 % len(_NAMES)]
    defaults = {
        "username": f"{name}_{(id >> 22) // 1000 % 1_000_000}", "global_name": name.title(), "avatar": None,
        "discriminator": f"{id % 9998 + 1:04d}" if values.get("bot") else "0", "bot": False, "system": False,
        "public_flags": 0,
    }  # fmt: skip
    user: User = _made(User, defaults, values)
    return user


def make_member(guild: Guild | int, user: User | int, **values: Any) -> Member:
    """Return a current member; with `left_at` a former one."""
    guild_id = guild if isinstance(guild, int) else guild.id
    user_id = user if isinstance(user, int) else user.id
    defaults: dict[str, Any] = {
        "nick": None, "avatar": None, "roles": [], "joined_at": made_at(max(guild_id, user_id)) + timedelta(days=2),
        "premium_since": None, "timed_out_until": None, "pending": False, "flags": 0, "left_at": None,
    }  # fmt: skip
    if "roles" in values:
        values["roles"] = sorted(role if isinstance(role, int) else role.id for role in values["roles"])
    member: Member = _made(Member, {"guild_id": guild_id, "user_id": user_id, **defaults}, values)
    return member


def make_role(guild: Guild | int, **values: Any) -> Role:
    """Return a role without permissions; with the guild's id, the @everyone role."""
    guild_id = guild if isinstance(guild, int) else guild.id
    id = values.setdefault("id", _ids.next())
    is_everyone = id == guild_id
    defaults = {
        "name": "@everyone" if is_everyone else f"Role {id >> 22 & 0xFFFF}", "color": 0, "hoist": False,
        "position": 0 if is_everyone else 1, "permissions": EVERYONE_MAY if is_everyone else 0, "managed": False,
        "mentionable": False, "tags": None, "flags": 0, "deleted_at": None,
    }  # fmt: skip
    role: Role = _made(Role, {"guild_id": guild_id, **defaults}, values)
    return role


def make_channel(guild: Guild | int, **values: Any) -> Channel:
    """Return a text channel without overwrites. `type` is Discord's number (2: voice, 4: category, 15: forum)."""
    guild_id = guild if isinstance(guild, int) else guild.id
    id = values.setdefault("id", _ids.next())
    defaults = {
        "name": f"channel-{id >> 22 & 0xFFFF}", "type": 0, "parent_id": None, "position": 0, "topic": None,
        "nsfw": False, "slowmode": 0, "permission_overwrites": [], "flags": 0, "hidden": False, "deleted_at": None,
    }  # fmt: skip
    channel: Channel = _made(Channel, {"guild_id": guild_id, **defaults}, values)
    return channel


@dataclass(slots=True)
class Population:
    """The rows that `populate` wrote, each list ordered by id."""

    guilds: list[Guild] = field(default_factory=list)
    users: list[User] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)
    roles: list[Role] = field(default_factory=list)
    channels: list[Channel] = field(default_factory=list)

    @property
    def rows(self) -> Sequence[Model]:
        """All rows, parents first."""
        return [*self.guilds, *self.users, *self.members, *self.roles, *self.channels]


def imagine(*, guilds: int = 1, members: int = 10, seed: int = 0) -> Population:
    """Return guilds with `members` members each, five roles (with @everyone) and four channels; writes nothing.

    The same arguments give the same rows, ids included. Seeds less than 1023 apart give different ids. A third of the
    users are in every guild. The first member of a guild owns it.
    """
    rng, ids = random.Random(seed), Snowflakes(1 + seed % 1023)
    made = Population()
    shared: list[User] = []
    for number in range(guilds):
        guild = make_guild(id=ids.next(), name=f"{rng.choice(_NAMES).title()} {number + 1}", member_count=members)
        mine = shared[:members]
        people = mine + [_person(rng, ids) for _ in range(members - len(mine))]
        made.users += people[len(mine) :]
        if not number:
            shared = people[: members // 3]
        guild.owner_id = people[0].id if people else ids.next()
        roles = [make_role(guild, id=guild.id)]
        roles += [make_role(guild, id=ids.next(), name=name, position=place, color=rng.getrandbits(24))
                  for place, name in enumerate(("Guests", "Regulars", "Helpers", "Moderators"), start=1)]  # fmt: skip
        category = make_channel(guild, id=ids.next(), name="Talk", type=4)
        channels = [
            category,
            make_channel(guild, id=ids.next(), name="general", parent_id=category.id),
            make_channel(guild, id=ids.next(), name="off-topic", parent_id=category.id, position=1),
            make_channel(guild, id=ids.next(), name="Lounge", type=2, bitrate=64_000, user_limit=0),
        ]
        made.members += sorted(
            (
                make_member(
                    guild, person,
                    nick=rng.choice(_NAMES) if rng.random() < 0.2 else None,
                    roles=rng.sample(roles[1:], rng.randrange(3)),
                    joined_at=max(made_at(guild.id), made_at(person.id)) + timedelta(seconds=rng.randrange(10_000_000)),
                )
                for person in people
            ),
            key=lambda member: member.user_id,
        )  # fmt: skip
        made.guilds.append(guild)
        made.roles += roles
        made.channels += channels
    return made


def _person(rng: random.Random, ids: Snowflakes) -> User:
    name = rng.choice(_NAMES)
    avatar = f"{rng.getrandbits(128):032x}" if rng.random() < 0.7 else None
    return make_user(
        id=ids.next(), username=f"{name}{rng.getrandbits(32):08x}", global_name=name.title(), avatar=avatar
    )


async def populate(database: Pool, guilds: int = 1, members: int = 10, *, seed: int = 0) -> Population:
    """Write the rows of `imagine` with the mirror's merge, and return them."""
    made = imagine(guilds=guilds, members=members, seed=seed)
    await write(database, *made.rows)
    return made


async def write(database: Pool, *rows: Model) -> None:
    """Insert or update rows with the mirror's merge. Raises `ValueError` if a row is given twice."""
    fence = await _fence(database)
    stamp = await _last_stamp(database, fence) + 1
    entries = dict(_entries(rows, stamp))
    if len(entries) != len(rows):
        raise ValueError("a row is given twice; pass each row once, with its final values")
    await write_batch(database, Batch(entries=entries), fence)


def _entries(rows: Iterable[Model], stamp: int) -> Iterable[tuple[tuple[str, Key], Entry]]:
    for row in rows:
        table = row.__tablename__
        given = {name: value for name, value in vars(row).items() if name in value_columns(table)}
        yield (table, tuple(getattr(row, name) for name in key_columns(table))), Entry(given, True, stamp)


async def _fence(database: Pool) -> Fence:
    """Return the fence of the active process; take the lease if there is none."""
    acting = await database.fetchrow("SELECT holder, epoch FROM ops.leases WHERE epoch > 0")
    return await seize(database, "factories") if acting is None else Fence(acting["holder"], acting["epoch"])


async def _last_stamp(database: Pool, fence: Fence) -> int:
    tables = (Guild, User, Member, Role, Channel)
    newest = [await database.fetchval(f"SELECT max(stamp) FROM {model.__tablename__}") for model in tables]  # noqa: S608
    return max(fence.epoch << COUNTER_BITS, *(stamp or 0 for stamp in newest))


def values_of(row: Base) -> dict[str, Any]:
    """Return the columns that are set on a model, to compare with a database record."""
    return {name: getattr(row, name) for name in row.__table__.columns.keys() & vars(row).keys()}
