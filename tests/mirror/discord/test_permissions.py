"""What a guild does not grant is named and not requested; what it grants later is read then."""

from __future__ import annotations

from collections import Counter

import discord
import pytest

from simulator import Simulator
from simulator.entities import ChannelType, Permission
from tests.mirror.harness import Mirrored, differences, mirrored, removals, small_world
from tests.waiting import until
from utils.database import Pool
from utils.mirror.discord.permissions import USED, find_missing, invite_permissions, invite_url, missing_in

VIEW, HISTORY = Permission.VIEW_CHANNEL, Permission.READ_MESSAGE_HISTORY
EVERYTHING = VIEW | HISTORY | Permission.MANAGE_THREADS | Permission.VIEW_AUDIT_LOG


def archive(simulator: Simulator, guild_id: int, channel_id: int, kind: ChannelType) -> int:
    """Create an archived thread of a kind that the bot has not joined."""
    world = simulator.world
    thread_id = world.create_thread(guild_id, channel_id, f"{kind.name} archive", joined=False)
    world.thread(guild_id, thread_id).type = kind
    world.archive_thread(guild_id, thread_id)
    return thread_id


def archive_requests(simulator: Simulator) -> Counter[str]:
    """Return the requests for archived threads: `channel/kind`, and how often."""
    return Counter(
        {
            route.removeprefix("GET /channels/").replace("/threads/archived", ""): count
            for route, count in simulator.rules.requests.items()
            if "/threads/archived/" in route
        }
    )


def deny(role_id: int, permissions: int) -> dict[str, object]:
    """Return an overwrite that denies a role something."""
    return {"id": str(role_id), "type": 0, "allow": "0", "deny": str(int(permissions))}


def names(granted: int) -> list[str]:
    """Return the flags that a guild with these permissions does not grant."""
    return [used.flag for used in find_missing(discord.Permissions(int(granted)))]


async def everything_used(bot: Mirrored) -> None:
    """Use every kind of request that the mirror makes: listings over both ways, guild, channels, archives, probes."""
    await bot.settled()
    for guild_id in bot.simulator.world.guild_ids():
        await bot.mirror.sync(guild_id)
        bot.mirror.archived.add(guild_id)
    await bot.settled()


def test_names_what_is_missing() -> None:
    assert names(EVERYTHING) == []
    assert names(Permission.ADMINISTRATOR) == []
    assert names(EVERYTHING & ~Permission.VIEW_AUDIT_LOG | Permission.BAN_MEMBERS) == []
    assert names(EVERYTHING & ~Permission.VIEW_AUDIT_LOG) == ["view_audit_log"]
    assert names(0) == ["view_channel", "read_message_history", "manage_threads", "view_audit_log"]
    assert all(used.brings and used.missed for used in USED)


def test_the_invitation_asks_for_all_of_it_and_nothing_else() -> None:
    assert invite_permissions().value == int(EVERYTHING)
    assert find_missing(invite_permissions()) == []
    assert invite_url(17).endswith(f"client_id=17&scope=bot+applications.commands&permissions={int(EVERYTHING)}")


@pytest.mark.parametrize(
    ("granted", "kinds"),
    [(EVERYTHING, {"public", "private"}), (VIEW | HISTORY, {"public"}), (VIEW | Permission.MANAGE_THREADS, set()),
     (VIEW, set())],
    ids=["everything", "no Manage Threads", "no Read Message History", "neither"],
)  # fmt: skip
async def test_a_guild_without_a_permission_causes_no_403(
    database: Pool, monkeypatch: pytest.MonkeyPatch, granted: int, kinds: set[str]
) -> None:
    simulator, ids = small_world(monkeypatch, 6, 45)
    world = simulator.world
    for guild_id in ids:
        channel_id = world.create_channel(guild_id, "talk", ChannelType.TEXT, permission_overwrites=[])
        archive(simulator, guild_id, channel_id, ChannelType.PUBLIC_THREAD)
        archive(simulator, guild_id, channel_id, ChannelType.PRIVATE_THREAD)
        for channel in world.guild(guild_id).channels.values():
            channel.permission_overwrites = []
    async with simulator:
        async with mirrored(database, simulator, monkeypatch) as bot:  # so that there are threads to probe
            await bot.settled()
        for guild_id in ids:
            world.grant(guild_id, granted)
        simulator.rules.requests.clear()
        async with mirrored(database, simulator, monkeypatch) as bot:
            await everything_used(bot)
            assert [missing_in(guild) for guild in bot.client.guilds] == [
                find_missing(discord.Permissions(int(granted)))
            ] * len(ids)
        assert {route.rpartition("/")[2] for route in archive_requests(simulator)} == kinds
        assert sum(simulator.rules.requests.values()) > 3 * len(ids)
    assert simulator.rules.refused == {}
    assert await differences(database, simulator) == []
    assert await removals(database) == set(), "what cannot be read is not gone"


async def test_overwrites_of_one_channel_decide_for_that_channel(
    database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 6)
    world = simulator.world
    for channel in world.guild(guild_id).channels.values():
        channel.permission_overwrites = []
    world.grant(guild_id, EVERYTHING)
    own_role = world.member(guild_id, world.bot.id).roles[0]
    unread, public_only, allowed = (world.create_channel(guild_id, "c", ChannelType.TEXT) for _ in range(3))
    everyone_denied = deny(guild_id, HISTORY)
    world.update_channel(guild_id, unread, permission_overwrites=[everyone_denied])
    world.update_channel(guild_id, public_only, permission_overwrites=[deny(own_role, Permission.MANAGE_THREADS)])
    world.update_channel(
        guild_id,
        allowed,
        permission_overwrites=[
            everyone_denied,
            {"id": str(world.bot.id), "type": 1, "allow": str(int(HISTORY)), "deny": "0"},
        ],
    )
    for channel_id in (unread, public_only, allowed):
        archive(simulator, guild_id, channel_id, ChannelType.PUBLIC_THREAD)
        archive(simulator, guild_id, channel_id, ChannelType.PRIVATE_THREAD)
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await everything_used(bot)
        state = bot.mirror.reconciler.guilds[guild_id]
        assert state.skipped_archives == {(unread, "public"), (unread, "private"), (public_only, "private")}
    asked = set(archive_requests(simulator))
    assert {f"{public_only}/public", f"{allowed}/public", f"{allowed}/private"} <= asked
    assert not asked & {f"{unread}/public", f"{unread}/private", f"{public_only}/private"}
    assert simulator.rules.refused == {}
    assert await differences(database, simulator) == []


@pytest.mark.parametrize("how", ["the role", "the overwrite", "the bot's roles"])
async def test_archives_are_read_once_they_are_allowed(
    database: Pool, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 6)
    world = simulator.world
    channel_id = world.create_channel(guild_id, "talk", ChannelType.TEXT, permission_overwrites=[])
    thread_id = archive(simulator, guild_id, channel_id, ChannelType.PRIVATE_THREAD)
    helper = world.create_role(guild_id, "helper", permissions=int(EVERYTHING))
    world.grant(guild_id, EVERYTHING if how == "the overwrite" else VIEW)
    if how == "the overwrite":
        world.update_channel(guild_id, channel_id, permission_overwrites=[deny(guild_id, HISTORY)])
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        assert await database.fetchval("SELECT count(*) FROM threads WHERE id = $1", thread_id) == 0
        if how == "the role":
            world.update_role(guild_id, guild_id, permissions=int(EVERYTHING))
        elif how == "the overwrite":
            world.update_channel(guild_id, channel_id, permission_overwrites=[])
        else:
            world.update_member(guild_id, world.bot.id, roles=[helper])
        finished = bot.mirror.archived.finished
        await until(lambda: bot.mirror.archived.finished > finished)
        await bot.settled()
        assert await database.fetchval("SELECT count(*) FROM threads WHERE id = $1", thread_id) == 1
    assert simulator.rules.refused == {}
    assert await differences(database, simulator) == []


@pytest.mark.parametrize("granted", [Permission.BAN_MEMBERS, Permission.VIEW_AUDIT_LOG, VIEW])
async def test_bans_come_with_either_permission(
    database: Pool, monkeypatch: pytest.MonkeyPatch, granted: Permission
) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 9)
    world = simulator.world
    world.grant(guild_id, granted)
    guild = world.guild(guild_id)
    banned = next(id for id in guild.members if id not in (world.bot.id, guild.owner_id))
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        world.ban(guild_id, banned)
        await bot.settled()
        kinds = await database.fetch("SELECT kind FROM member_events WHERE user_id = $1 ORDER BY id", banned)
    expected = ["leave"] if granted == VIEW else ["ban", "leave"]
    assert [row["kind"] for row in kinds] == expected
    assert await differences(database, simulator) == []
