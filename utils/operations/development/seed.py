"""Seeding and resetting a development database (`python bot.py db seed` and `db reset`)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from models import DISCORD_EPOCH_MS
from utils.database import Connection, Pool
from utils.database.ownership import FORMER_VERSION_TABLE, VERSION_TABLE
from utils.database.partitions import id_at
from utils.database.sessions import connect
from utils.exceptions import GuildbookError, ValidationError, translate_errors
from utils.operations import migrations
from utils.operations.action import BEGIN_ANEW, record_action
from utils.operations.backup.archive.objects import find_tables, owned_names
from utils.operations.migrations.dependents import refuse_dependents
from utils.operations.migrations.runner import Backup
from utils.service.lease import hold_as_operator
from utils.text import format_count

#: The low bits of every seeded id: worker 31, process 31, increment 0. They distinguish seeded ids from Discord's.
SEEDED_BITS = 0x3FF000
#: Creation time of the first seeded id, and the maximum number of milliseconds between two ids.
FIRST = datetime(2019, 3, 1, tzinfo=UTC)
STEP_MS = 60_000
#: Timeout of a statement in seconds; a guild of a million members takes less.
STATEMENT_SECONDS = 600.0

_ADJECTIVES = (
    "amber", "brave", "calm", "dusty", "early", "faint", "gentle", "hollow", "icy", "jolly", "keen", "lucky", "mellow",
    "noble", "odd", "proud", "quiet", "rusty", "silent", "tiny", "upper", "vivid", "wild", "young", "zesty",
)  # fmt: skip
_NOUNS = (
    "anchor", "badger", "comet", "drummer", "engine", "falcon", "garden", "harbour", "island", "jester", "kettle",
    "lantern", "meadow", "needle", "otter", "pilot", "quarry", "raven", "sailor", "teapot", "urchin", "valley",
    "walrus", "yeti", "zephyr",
)  # fmt: skip
_CLUBS = ("Book Club", "Chess", "Gardeners", "Kitchen", "Makers", "Night Shift", "Photography", "Radio", "Runners")
_TOPICS = (None, "Say hello", "Off topic, within reason", "Questions and answers", "What are you working on?")
_CHANNELS = (
    ("Information", 4), ("announcements", 5), ("rules", 0), ("Talk", 4), ("general", 0), ("introductions", 0),
    ("help", 15), ("off-topic", 0), ("Voices", 4), ("Lounge", 2), ("Stage", 13),
)  # fmt: skip
_ROLES = ("Newcomer", "Regular", "Artist", "Helper", "Event crew", "Moderator", "Admin")
#: Permission bits: view channels, send messages, read message history; and administrator for the last role.
_EVERYONE_PERMISSIONS, _ADMIN_PERMISSIONS = 1 << 10 | 1 << 11 | 1 << 16, 1 << 3

_COLUMNS: dict[str, tuple[str, ...]] = {
    "guilds": (
        "id", "name", "owner_id", "preferred_locale", "afk_timeout", "verification_level",
        "default_message_notifications", "explicit_content_filter", "mfa_level", "nsfw_level", "joined_at", "large",
        "member_count", "max_members", "premium_tier", "premium_subscription_count", "features",
    ),
    "users": ("id", "username", "discriminator", "global_name", "avatar", "bot", "system", "public_flags"),
    "members": ("guild_id", "user_id", "nick", "roles", "joined_at", "premium_since", "pending", "flags", "left_at"),
    "roles": ("guild_id", "id", "name", "color", "hoist", "position", "permissions", "managed", "mentionable", "flags"),
    "channels": (
        "guild_id", "id", "name", "type", "parent_id", "position", "topic", "nsfw", "slowmode",
        "permission_overwrites", "flags",
    ),
    "threads": (
        "guild_id", "id", "name", "type", "parent_id", "owner_id", "archived", "locked", "auto_archive_duration",
        "archived_at", "slowmode", "flags", "applied_tags",
    ),
    "member_stats": ("guild_id", "user_id", "message_count", "last_active_at"),
}  # fmt: skip


async def seed(pool: Pool, *, guilds: int = 3, members: int = 200, seed: int = 0, more: bool = False) -> dict[str, int]:
    """Insert generated guilds with `members` members each and return the number of rows by table.

    The same `seed` gives the same users, ids included; times range up to now. Everything is written in one transaction,
    without history. The stamps are 0, so any event of Discord supersedes the rows; a bot that starts on this database
    marks the guilds as left. Raises `GuildbookError` if the database contains guilds, unless `more` is set.
    """
    if guilds < 1 or members < 1:
        raise ValidationError(f"cannot seed with {guilds} as guilds and {members} as members: both must be at least 1")
    written: Counter[str] = Counter()
    async with pool.transaction() as connection:
        await connection.execute("LOCK TABLE guilds IN SHARE ROW EXCLUSIVE MODE")  # no concurrent seeding
        existing = await connection.fetchval("SELECT count(*) FROM guilds")
        if existing and not more:
            raise GuildbookError(
                f"the database already contains {format_count(existing, 'guild')}: empty it with python bot.py db"
                " reset, or add more with --more"
            )
        generator = _Generator(random.Random(seed), await _last_seeded(connection), pool.now())
        for _ in range(guilds):
            for table, records in generator.guild(members).items():
                await connection.copy_records_to_table(
                    table, records=records, columns=_COLUMNS[table], timeout=STATEMENT_SECONDS
                )
                written[table] += len(records)
    for table in written:  # without statistics, the planner would use sequential scans
        await pool.execute("ANALYZE " + table, timeout=STATEMENT_SECONDS)
    return dict(written)


async def _last_seeded(connection: Connection) -> int:
    """Return the greatest seeded id, or the one before the first."""
    last = await connection.fetchval(
        "SELECT max(id) FROM (SELECT id FROM guilds UNION ALL SELECT id FROM users UNION ALL SELECT id FROM roles"
        " UNION ALL SELECT id FROM channels UNION ALL SELECT id FROM threads) AS ids WHERE id & 4194303 = $1",
        SEEDED_BITS,
        timeout=STATEMENT_SECONDS,
    )
    return last if last is not None else id_at(FIRST) + SEEDED_BITS


class _Generator:
    """Generates guilds with roles, channels, threads, members (some shared between guilds) and statistics."""

    def __init__(self, rng: random.Random, last: int, now: datetime) -> None:
        self._rng = rng
        self._last = last
        self._now = now
        self._known: list[int] = []

    def guild(self, size: int) -> dict[str, list[tuple[Any, ...]]]:
        """Return the rows of another guild by table, with the columns of `_COLUMNS`."""
        rng, guild_id = self._rng, self._id()
        users = list(self._users(size - min(size // 4, len(self._known))))
        shared = rng.sample(self._known, size - len(users))
        people = sorted([*shared, *(user[0] for user in users)])
        self._known += [user[0] for user in users][: max(1, size // 2)]
        owner_id = rng.choice(people)
        founded = _created_at(guild_id)
        joined = founded + (self._now - founded) * 0.1
        roles = [(guild_id, guild_id, "@everyone", 0, False, 0, _EVERYONE_PERMISSIONS, False, False, 0)]
        for position, name in enumerate(_ROLES, start=1):
            permissions = _ADMIN_PERMISSIONS if name == _ROLES[-1] else 0
            colour, is_shown = rng.getrandbits(24), position > 3
            roles.append((guild_id, self._id(), name, colour, is_shown, position, permissions, False, not is_shown, 0))
        channels = list(self._channels(guild_id))
        members = [self._member(guild_id, id, roles[1:], joined, is_owner=id == owner_id) for id in people]
        stats = [self._stats(member) for member in members if rng.random() < 0.6]
        present = sum(member[-1] is None for member in members)
        name = f"{rng.choice(_ADJECTIVES).title()} {rng.choice(_NOUNS).title()} {rng.choice(_CLUBS)}"
        row = (guild_id, name, owner_id, "en-US", 300, rng.randrange(4), 1, 0, 0, 0, joined, present > 250, present,
               500_000, rng.randrange(4), rng.randrange(20), ["COMMUNITY", "NEWS"])  # fmt: skip
        threads = list(self._threads(guild_id, [channel[1] for channel in channels if channel[3] == 0], people))
        return {"guilds": [row], "users": users, "members": members, "roles": roles, "channels": channels,
                "threads": threads, "member_stats": stats}  # fmt: skip

    def _id(self) -> int:
        self._last += self._rng.randrange(1, STEP_MS) << 22
        return self._last

    def _users(self, count: int) -> Iterator[tuple[Any, ...]]:
        rng = self._rng
        for _ in range(count):
            first, second, is_bot = rng.choice(_ADJECTIVES), rng.choice(_NOUNS), rng.random() < 0.02
            shown = None if is_bot or rng.random() < 0.3 else f"{first.title()} {second.title()}"
            avatar = f"{rng.getrandbits(128):032x}" if rng.random() < 0.8 else None
            discriminator = f"{rng.randrange(1, 9999):04d}" if is_bot else "0"
            name = f"{first}_{second}{rng.randrange(10_000)}"
            yield self._id(), name, discriminator, shown, avatar, is_bot, False, 64 if rng.random() < 0.1 else 0

    def _channels(self, guild_id: int) -> Iterator[tuple[Any, ...]]:
        category: int | None = None
        for position, (name, kind) in enumerate(_CHANNELS):
            id = self._id()
            if kind == 4:
                category = id
            parent, topic = None if kind == 4 else category, self._rng.choice(_TOPICS) if kind == 0 else None
            yield guild_id, id, name, kind, parent, position, topic, False, 0, [], 0

    def _threads(self, guild_id: int, channels: Sequence[int], people: Sequence[int]) -> Iterator[tuple[Any, ...]]:
        rng = self._rng
        for _ in range(6):
            archived_at = self._now - timedelta(days=rng.randrange(1, 90)) if rng.random() < 0.5 else None
            name = f"the {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}"
            yield (guild_id, self._id(), name, 11, rng.choice(channels), rng.choice(people), archived_at is not None,
                   False, 1_440, archived_at, 0, 0, [])  # fmt: skip

    def _member(
        self, guild_id: int, user_id: int, roles: Sequence[tuple[Any, ...]], opened: datetime, *, is_owner: bool
    ) -> tuple[Any, ...]:
        rng = self._rng
        earliest = max(opened, _created_at(user_id))
        joined = earliest + (self._now - earliest) * rng.random()
        left = joined + (self._now - joined) * rng.random() if not is_owner and rng.random() < 0.05 else None
        boosts = joined + (self._now - joined) * rng.random() if rng.random() < 0.03 else None
        held = sorted(role[1] for role in rng.sample(roles, rng.choice((0, 1, 1, 2, 3))))
        nick = rng.choice(_NOUNS).title() if rng.random() < 0.15 else None
        return guild_id, user_id, nick, held, joined, boosts, rng.random() < 0.02, 0, left

    def _stats(self, member: tuple[Any, ...]) -> tuple[Any, ...]:
        joined, until = member[4], member[-1] or self._now
        return *member[:2], int(self._rng.paretovariate(0.8)) % 50_000, joined + (until - joined) * self._rng.random()


def _created_at(snowflake: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=(snowflake >> 22) + DISCORD_EPOCH_MS)


@dataclass(frozen=True, slots=True)
class Reset:
    """What a reset did."""

    database: str
    #: Id of the backup made before; None: there was nothing to back up, or none was asked for.
    backup: str | None

    @property
    def line(self) -> str:
        """One line for people."""
        made = "" if self.backup is None else f"; backup made before: {self.backup}"
        return f"{self.database} is empty{made}"


async def reset(pool: Pool, *, name: str | None, environment: str, backup: Backup | None) -> Reset:
    """Drop and recreate all of Guildbook's tables, with all data.

    Unless `environment` is 'development', `name` must be the database's name. Tables of cogs and of other programs are
    kept; a view of one of them on our tables, or a foreign key to them, refuses the reset.

    `backup` makes a backup first, unless the database is empty or has only what `seed` wrote; None for no backup.

    Raises `GuildbookError` if the reset is not allowed, always while a bot is running on the database, and if the
    backup fails; and `MigrationError` if it fails itself: run `db upgrade` to create what is missing.
    """
    found: str = await pool.fetchval("SELECT current_database()")
    if name is not None and name != found:
        raise ValidationError(f"the database at {pool.target} is named {found}, not {name}: nothing was dropped")
    if environment != "development" and name is None:
        raise ValidationError(
            f"ENVIRONMENT is {environment}: to drop everything in {found} at {pool.target}, pass --yes-destroy {found}"
        )
    await refuse_dependents(pool, [revision.id for revision in migrations.known_revisions()])
    async with hold_as_operator(pool):
        saved = None
        if backup is not None and await has_rows_of_its_own(pool):
            saved = await migrations.back_up_first(backup)
        await migrations.downgrade(pool, "base")
        await migrations.upgrade(pool)
        await record_action(pool, BEGIN_ANEW, {}, "db reset")
    return Reset(found, saved)


async def has_rows_of_its_own(pool: Pool) -> bool:
    """Return whether our tables have rows that `seed` did not write; what only says what Guildbook did, does not count.

    Raises `DatabaseError`.
    """
    placement = pool.placement
    revision = await migrations.current(pool)
    async with connect(pool.direct) as connection:
        with translate_errors("looking for rows"):
            for table in await find_tables(connection, owned_names(placement, revision)):
                if table.schema == placement.ops or table.name in (VERSION_TABLE, FORMER_VERSION_TABLE):
                    continue
                columns = _COLUMNS.get(table.name) if table.schema == placement.main else None
                id = "NULL::bigint" if columns is None else columns[0]
                others = ("WHERE", id, "& 4194303 IS DISTINCT FROM $1)")
                query = " ".join(("SELECT EXISTS (SELECT FROM", table.quoted, *others))
                if await connection.fetchval(query, SEEDED_BITS, timeout=STATEMENT_SECONDS):
                    return True
    return False
