"""A malformed payload costs itself only: one log line, one count, and the bot keeps running."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from simulator import World
from simulator.malformed import TOO_LARGE, malformed_events
from simulator.payloads import member_json
from tests.mirror.faults.test_live import people
from tests.mirror.harness import differences, mirrored, removals, small_world
from tests.waiting import until
from utils import logs
from utils.database import Pool
from utils.service import metrics

_some_world = World()
_some_guild = _some_world.guild(_some_world.add_guild(members=2))
#: What Discord may well add one day is not malformed: no line, no count.
INNOCENT = {"unknown_event"}
KINDS = sorted(malformed_events(_some_guild))


@pytest.fixture(autouse=True)
def _first_times() -> Iterator[None]:
    """Let each test see what is logged only once."""
    logs.reset_repeats()
    yield
    logs.reset_repeats()


def malformed_count(event: str | None = None) -> float:
    """Return the number of malformed payloads, of one event or of all."""
    return sum(
        sample.value
        for metric in metrics.malformed_payloads.collect()
        for sample in metric.samples
        if sample.name.endswith("_total") and event in (None, sample.labels["event"])
    )


def logged_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return our own log lines from WARNING up."""
    lines = [r for r in caplog.records if r.name.startswith("utils.") and r.levelno > logging.INFO]
    return [record.getMessage() for record in lines]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_malformed_dispatch_costs_itself_only(
    database: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 15)
    world, before = simulator.world, malformed_count()
    expected = 0 if kind in INNOCENT else 3
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        caplog.clear()
        for _ in range(3):
            simulator.faults.send_malformed(kind, guild_id)
            world.join(guild_id)
        await bot.settled()
        await until(lambda: malformed_count() - before == expected)
        assert len(logged_warnings(caplog)) == min(expected, 1)
        world.update_guild(guild_id, name="still listening")
        await bot.settled()
        assert await differences(database, simulator) == []
        assert simulator.gateway.identifies == 1
    assert simulator.gateway.resumes == 0
    assert simulator.faults.injected[f"malformed {kind}"] == 3
    assert await removals(database) == set()
    assert await database.fetchval("SELECT count(*) FROM users WHERE username = 'broken'") == 0


@pytest.mark.parametrize("kind", ["nul", "lone_surrogate"])
async def test_unstorable_characters_are_replaced(database: Pool, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 45)
    world, before = simulator.world, malformed_count()
    hard = "n\0l half \ud800 pair \udfff"
    async with simulator:
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
            simulator.faults.send_malformed(kind, guild_id)
            world.update_guild(guild_id, name=hard, description=hard)
            role, channel = world.create_role(guild_id, hard), world.create_channel(guild_id, hard, topic=hard)
            world.create_thread(guild_id, channel, hard)
            world.update_member(guild_id, world.join(guild_id), nick=hard)
            await bot.settled()
            assert await differences(database, simulator) == []
        await database.execute("TRUNCATE guilds, users, members, roles, channels, threads, sync_runs")
        async with mirrored(database, simulator, monkeypatch) as bot:  # and by GUILD_CREATE, COPY and REST
            await bot.settled()
            await bot.mirror.sync(guild_id)
            await bot.settled()
    assert await differences(database, simulator) == []
    assert "\ufffd" in await database.fetchval("SELECT name FROM roles WHERE id = $1", role)
    assert malformed_count() == before


@pytest.mark.parametrize("source", ["gateway", "rest"])
async def test_unreadable_member_is_neither_changed_nor_tombstoned(
    database: Pool, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 45)
    world, crowd = simulator.world, people(simulator, guild_id)
    strange = crowd[3:6]
    async with simulator:
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        world.leave(guild_id, gone := crowd[8])
        spoilt = ('"joined_at":"yesterday"', '"flags":"many"', f'"roles":["{TOO_LARGE}"]')
        for id, broken in zip(strange, spoilt, strict=True):
            field = broken.partition(":")[0]
            member = world.guild(guild_id).members[id]
            assert member.rendered is not None
            kept = json.loads(member.rendered)
            kept.pop(json.loads(field))
            member.rendered = json.dumps(kept).encode()[:-1] + b"," + broken.encode() + b"}"
        if source == "rest":
            simulator.faults.rate_limit_next(guild_id)
        before = malformed_count()
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        assert malformed_count() - before == 3
    assert await differences(database, simulator) == []
    assert await removals(database) == {("members", gone)}


@pytest.mark.parametrize("source", ["gateway", "rest"])
async def test_195_unreadable_members_are_one_line_and_a_counter(
    database: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, source: str
) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 205)
    strange = people(simulator, guild_id)[:195]
    async with simulator:
        for id in strange:
            member = simulator.world.guild(guild_id).members[id]
            member.rendered = json.dumps(json.loads(member_json(member)) | {"joined_at": "yesterday"}).encode()
        if source == "rest":
            simulator.faults.rate_limit_next(guild_id)
        before = malformed_count("member listing")
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
    lines = [line for line in logged_warnings(caplog) if "could not be read" in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("195 of 205 members of a listing could not be read and were left out; the first: ")
    assert malformed_count("member listing") - before == 195
    assert await database.fetchval("SELECT count(*) FROM members") == 10


async def test_what_only_discord_py_refuses_is_mirrored_and_not_called_left_out(
    database: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 6)
    role_id = simulator.world.create_role(guild_id, "kept", color=1)
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        caplog.clear()
        nameless = {"guild_id": str(guild_id), "role": {"id": str(role_id), "color": 5}}
        for _ in range(3):
            simulator.faults.inject_raw({"t": "GUILD_ROLE_UPDATE", "d": nameless})
        await bot.settled()
        assert tuple(await database.fetchrow("SELECT name, color FROM roles WHERE id = $1", role_id) or ()) == (
            "kept", 5,
        )  # fmt: skip
    (line,) = logged_warnings(caplog)
    assert line.startswith("discord.py could not parse GUILD_ROLE_UPDATE (KeyError: 'name'), so that cogs miss it")
    assert "left out" not in line
    assert "skipped" not in line


async def test_a_malformed_part_of_a_guild_is_called_a_part(
    database: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 6)
    role_id = simulator.world.create_role(guild_id)
    simulator.world.guild(guild_id).roles[role_id].position = "first"  # type: ignore[assignment]
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
    lines = [line for line in logged_warnings(caplog) if "malformed" in line]
    assert [line.partition(" (")[0] for line in lines] == ["malformed part of GUILD_CREATE skipped"]
    assert await database.fetchval("SELECT count(*) FROM guilds") == 1


async def test_a_page_with_a_member_of_unknown_id_tombstones_nobody(
    database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 45)
    world, crowd = simulator.world, people(simulator, guild_id)
    async with simulator:
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        world.leave(guild_id, crowd[8])
        world.guild(guild_id).members[crowd[3]].rendered = b'{"user":{"id":"nobody"},"roles":[]}'
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        assert await removals(database) == set()
        world.guild(guild_id).members[crowd[3]].rendered = None
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
    assert await differences(database, simulator) == []
    assert await removals(database) == {("members", crowd[8])}


async def test_malformed_part_of_a_guild_tombstones_nothing(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 6)
    world = simulator.world
    async with simulator:
        role = world.create_role(guild_id)
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        guild = world.guild(guild_id)
        guild.roles[role].position = "first"  # type: ignore[assignment]
        guild.name = "renamed meanwhile"
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
            guild.roles[role].position = 1
    assert await removals(database) == set()
    assert await differences(database, simulator) == []


async def test_malformed_pages_end_the_listing_only(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 45)
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        simulator.faults.ignore_member_request(guild_id)
        sync = bot.mirror.sync(guild_id)
        nonces: list[str] = []

        async def broken() -> None:
            await until(lambda: bot.mirror.reconciler.listings)
            nonces.extend(bot.mirror.reconciler.listings)
            chunk: dict[str, Any] = {"guild_id": str(guild_id), "nonce": nonces[0], "chunk_index": 0}
            for members in (None, 5, [None], [{"user": None}]):
                simulator.faults.inject_raw({"t": "GUILD_MEMBERS_CHUNK", "d": chunk | {"members": members}})
            simulator.faults.inject_raw({"t": "GUILD_MEMBERS_CHUNK", "d": None})
            simulator.faults.inject_raw({"t": "RATE_LIMITED", "d": None})

        run, _ = await asyncio.gather(sync, broken())
        assert run.source == "rest"
        await bot.settled()
        assert simulator.gateway.identifies == 1
    assert simulator.faults.injected["ignore_member_request"] == 1
    assert await differences(database, simulator) == []
    assert await removals(database) == set()
