"""discord.py's member cache, filled from listings: its content, and the events that discord.py dispatches from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import discord
import pytest

from tests.mirror.harness import cache_differences, differences, mirrored, small_world
from tests.waiting import until
from utils.database import Pool
from utils.mirror.discord import member_cache
from utils.mirror.discord.member_cache import CacheFill, MemberCache
from utils.mirror.records.rows import Row
from utils.mirror.translate import objects
from utils.mirror.write.overlay import LiveOverlay

GUILD, USER, OWN = 1 << 40, 7 << 40, 9 << 40
JOINED = "2026-01-02T03:04:05+00:00"


def payload(**fields: Any) -> dict[str, Any]:
    """Return a member as Discord lists them."""
    user = {"id": str(USER), "username": "ada", "discriminator": "0", "avatar": None, "global_name": None}
    plain: dict[str, Any] = {"nick": None, "avatar": None, "roles": [], "joined_at": JOINED, "premium_since": None}
    plain |= {"pending": False, "flags": 0, "communication_disabled_until": None}
    return {"user": user, **plain, **fields}


def _fail(*args: Any, **options: Any) -> None:
    raise RuntimeError("a mistake of ours")


class Rig:
    """A client that knows one guild of two, the cache under test, and what discord.py dispatches."""

    def __init__(self) -> None:
        intents = discord.Intents(guilds=True, members=True)
        client = discord.Client(intents=intents, member_cache_flags=discord.MemberCacheFlags.from_intents(intents))
        self.state: Any = client._connection
        self.state.user = discord.ClientUser(state=self.state, data=payload()["user"] | {"id": str(OWN)})
        guild: Any = {"id": str(GUILD), "name": "g", "member_count": 2}
        self.guild: Any = self.state._add_guild_from_data(guild)
        self.overlay = LiveOverlay()
        self.cache = MemberCache(client, self.overlay)
        self.dispatched: list[tuple[Any, ...]] = []
        self.state.dispatch = lambda *event: self.dispatched.append(event)
        self.stamp = 100

    @property
    def member(self) -> discord.Member | None:
        found: discord.Member | None = self.guild.get_member(USER)
        return found

    def request(self) -> member_cache.CacheFill:
        """Request a listing."""
        fill = self.cache.open(GUILD, self.stamp)
        assert fill is not None
        self.overlay.open(fill)
        return fill

    def receive(self, name: str, **fields: Any) -> None:
        """Receive a dispatch about the member as the mirror does: the overlay, the cache, then discord.py."""
        self.stamp += 1
        data = {"guild_id": str(GUILD), "user": payload()["user"], **fields}
        rows: list[Row] = (
            objects.member_left(GUILD, data, discord.utils.utcnow())
            if name == "GUILD_MEMBER_REMOVE"
            else objects.member(GUILD, data, is_join=name == "GUILD_MEMBER_ADD")
        )
        for row in rows:
            self.overlay.add(row, self.stamp)
        self.cache.prepare(name, data)
        self.state.parsers[name](data)


@pytest.fixture
async def rig() -> Rig:
    return Rig()


async def test_a_listing_fills_the_cache_without_events(rig: Rig) -> None:
    fill = rig.request()
    fill.add([payload(nick="Ada", roles=["5"]), {"user": {}}, payload(user=payload()["user"] | {"id": str(OWN)})])
    fill.finish([])
    assert rig.member is not None
    assert (rig.member.nick, rig.member._roles.has(5), rig.guild.chunked) == ("Ada", True, True)
    assert rig.dispatched == []


async def test_a_listing_keeps_objects_and_updates_them(rig: Rig) -> None:
    rig.request().add([payload(nick="before")])
    kept = rig.member
    assert kept is not None
    rig.request().add([payload(nick="after", user=payload()["user"] | {"username": "lovelace"})])
    assert rig.member is kept
    assert (kept.nick, kept.name) == ("after", "lovelace")


async def test_a_dispatch_is_newer_than_a_page_requested_before_it(rig: Rig) -> None:
    fill = rig.request()
    rig.receive("GUILD_MEMBER_UPDATE", roles=["6"])
    fill.add([payload(nick="Ada", roles=["5"], joined_at=JOINED)])
    assert rig.member is not None
    assert (list(rig.member._roles), rig.member.nick) == ([6], "Ada")  # the update did not mention the nick
    rig.receive("GUILD_MEMBER_REMOVE")
    fill.add([payload()])
    fill.finish([])
    assert rig.member is None


async def test_a_member_who_is_not_listed_is_removed(rig: Rig) -> None:
    rig.request().add([payload()])
    unreadable = rig.request()
    unreadable.finish([USER])
    assert rig.member is not None
    unreadable.finish([None])
    assert rig.member is not None
    rig.request().finish([])
    assert rig.member is None


async def test_a_member_who_joined_since_the_request_stays(rig: Rig) -> None:
    rig.request().add([payload()])
    fill = rig.request()
    rig.receive("GUILD_MEMBER_REMOVE")
    rig.receive("GUILD_MEMBER_ADD", **{name: value for name, value in payload().items() if name != "user"})
    fill.finish([])
    assert rig.member is not None


async def test_a_join_and_a_leave_that_a_listing_showed_first_are_dispatched_once(rig: Rig) -> None:
    fields = {name: value for name, value in payload().items() if name != "user"}
    rig.request().add([payload()])
    rig.receive("GUILD_MEMBER_ADD", **fields)
    rig.receive("GUILD_MEMBER_ADD", **fields)  # Discord repeats it
    assert [name for name, _ in rig.dispatched] == ["member_join"]
    rig.request().finish([])
    listed_as_gone = rig.member is None
    rig.receive("GUILD_MEMBER_REMOVE")
    assert listed_as_gone
    assert [name for name, _ in rig.dispatched[1:]] == ["member_remove", "raw_member_remove"]
    assert (rig.member, rig.guild.member_count) == (None, 0)


async def test_a_field_that_an_update_omits_is_unchanged(rig: Rig) -> None:
    rig.request().add([payload(avatar="a" * 32, communication_disabled_until="2027-01-01T00:00:00+00:00", flags=2)])
    rig.receive("GUILD_MEMBER_UPDATE", nick="new", roles=[])
    assert rig.member is not None
    assert (rig.member.nick, rig.member._avatar, rig.member.flags.value) == ("new", "a" * 32, 2)
    assert rig.member.timed_out_until is not None
    assert [name for name, *_ in rig.dispatched] == ["member_update"]


async def test_the_cache_equals_the_world_after_a_sync_a_resume_and_a_new_session(
    database: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    simulator, (large, small) = small_world(monkeypatch, 45, 6)
    world = simulator.world
    async with simulator, mirrored(database, simulator, monkeypatch, member_cache=True) as bot:
        await bot.settled()
        assert cache_differences(bot.client, simulator) == []
        for break_connection in (simulator.faults.drop_socket, simulator.faults.invalidate_session):
            session = bot.client.shards[0]._parent.ws.session_id
            break_connection()
            members = [id for id in world.guild(large).ordered_member_ids() if id != world.bot.id]
            world.update_member(large, members[3], nick="changed meanwhile")
            world.rename_user(members[5], username="renamed")
            world.leave(large, members[-1])
            world.join(small)
            await until(lambda: bot.has_received_all() and not cache_differences(bot.client, simulator))
            has_resumed = bot.client.shards[0]._parent.ws.session_id == session
            assert has_resumed == (break_connection == simulator.faults.drop_socket)


@pytest.mark.parametrize(
    ("owner", "method"),
    [(CacheFill, "__init__"), (CacheFill, "_add_page"), (CacheFill, "_remove_unseen"), (MemberCache, "_prepare")],
)
async def test_an_error_in_the_cache_keeps_nothing_from_the_mirror(
    database: Pool, monkeypatch: pytest.MonkeyPatch, owner: type, method: str
) -> None:
    monkeypatch.setattr(owner, method, _fail)
    simulator, (large, small) = small_world(monkeypatch, 45, 6)
    world = simulator.world
    async with simulator, mirrored(database, simulator, monkeypatch, member_cache=True) as bot:
        await bot.settled()
        session = bot.client.shards[0]._parent.ws.session_id
        members = [id for id in world.guild(large).ordered_member_ids() if id != world.bot.id]
        world.update_member(large, members[3], nick="changed")
        world.leave(large, members[-1])
        world.join(small)
        await bot.settled()
        assert await differences(database, simulator) == []
        await bot.mirror.sync(large)
        assert await database.fetchval("SELECT count(*) FROM sync_runs WHERE error IS NOT NULL") == 0
        assert bot.client.shards[0]._parent.ws.session_id == session
        assert not bot.mirror.writer.overlay.is_tracking


async def test_a_page_that_the_cache_missed_removes_nobody(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.request().add([payload()])
    fill = rig.request()
    monkeypatch.setattr(discord, "Member", _fail)
    fill.add([payload(user=payload()["user"] | {"id": str(OWN)}), payload()])
    monkeypatch.undo()
    fill.finish([])
    assert rig.member is not None


async def test_chunk_waits_for_the_listing_of_the_mirror(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 45, pages_per_second=50)
    async with simulator, mirrored(database, simulator, monkeypatch, member_cache=True) as bot:
        await bot.listing(guild_id)
        guild = bot.client.get_guild(guild_id)
        assert guild is not None
        assert not guild.chunked
        assert len(await guild.chunk()) == 45
        assert guild.chunked
        assert len(await guild.chunk()) == 45
        simulator.world.guild_outage(guild_id)
        await bot.settled()
        guild._member_count = 46
        with pytest.raises(discord.ClientException, match="Discord has an outage"):
            await guild.chunk()


def test_members_and_users_have_the_attributes_that_the_cache_sets() -> None:
    assert set(member_cache._ATTRIBUTES.values()) | set(member_cache._UNMIRRORED) <= set(discord.Member.__slots__)
    user = {attribute for _, attribute in member_cache._OMITTED_USER}
    assert user <= set(discord.user.BaseUser.__slots__)
