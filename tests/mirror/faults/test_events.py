"""Joins, leaves and messages under faults: each is in the tables exactly once."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from simulator import Simulator
from tests.mirror.faults.test_database import administrator, failures, refusing
from tests.mirror.faults.test_live import people
from tests.mirror.harness import Mirrored, differences, mirrored, small_world
from tests.mirror.tables import dead_letters
from tests.waiting import until
from utils.database import Pool
from utils.exceptions import DatabaseUnavailable
from utils.mirror.spool.queue import SpoolMode
from utils.mirror.write.batch import WriteCounts, write_batch


def channel(simulator: Simulator, guild_id: int) -> int:
    channels = simulator.world.guild(guild_id).channels.values()
    return next(it.id for it in channels if it.type == 0 and not it.hidden)


def chatter(simulator: Simulator, guild_id: int, count: int) -> None:
    """Send messages from members."""
    crowd = people(simulator, guild_id)
    for number in range(count):
        simulator.world.message(guild_id, channel(simulator, guild_id), crowd[number % len(crowd)], "hello")


async def counted_messages(database: Pool) -> Counter[tuple[int, int]]:
    rows = await database.fetch("SELECT guild_id, user_id, message_count FROM member_stats")
    return Counter({(row["guild_id"], row["user_id"]): row["message_count"] for row in rows})


def sent_messages(simulator: Simulator) -> Counter[tuple[int, int]]:
    return Counter((it.guild_id, it.user_id) for it in simulator.world.ledger.messages)


async def membership_events(database: Pool, *, inferred: bool | None = None) -> list[tuple[int, str]]:
    rows = await database.fetch("SELECT user_id, kind, inferred FROM member_events ORDER BY stamp, id")
    return [(row["user_id"], row["kind"]) for row in rows if inferred in (None, row["inferred"])]


async def test_live_events_are_recorded_in_order(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 6)
    world, crowd = simulator.world, people(simulator, guild_id)
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        joined = world.join(guild_id)
        world.ban(guild_id, crowd[0])
        world.unban(guild_id, crowd[0])
        world.leave(guild_id, joined)
        chatter(simulator, guild_id, 7)
        await bot.settled()
    wanted = [(joined, "join"), (crowd[0], "ban"), (crowd[0], "leave"), (crowd[0], "unban"), (joined, "leave")]
    assert await membership_events(database, inferred=False) == wanted
    assert await membership_events(database, inferred=True) == []
    assert await counted_messages(database) == sent_messages(simulator)


async def test_offline_joins_and_leaves_are_inferred(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (large, small) = small_world(monkeypatch, 45, 6)
    world = simulator.world
    wanted: set[tuple[int, str]] = set()
    async with simulator:
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        assert await membership_events(database) == []
        for guild_id in (large, small):
            gone, back = people(simulator, guild_id)[:2]
            world.leave(guild_id, gone)
            world.leave(guild_id, back)
            world.join(guild_id, back)
            wanted |= {(gone, "leave"), (back, "leave"), (back, "join"), (world.join(guild_id), "join")}
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
    assert sorted(await membership_events(database, inferred=True)) == sorted(wanted)
    assert await membership_events(database, inferred=False) == []
    assert await differences(database, simulator) == []


@pytest.mark.parametrize("mode", ["outage", "always", "off"])
@pytest.mark.parametrize("how", ["read-only", "missing a table", "gone"])
async def test_an_outage_loses_and_doubles_nothing(
    database: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str, mode: SpoolMode
) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 12)
    spool = None if mode == "off" else tmp_path
    async with simulator, mirrored(database, simulator, monkeypatch, spool=spool, mode=mode) as bot:
        await bot.settled()
        before = failures()
        async with refusing(database, how):
            chatter(simulator, guild_id, 50)
            simulator.world.join(guild_id)
            await until(lambda: failures() >= before + 2)
            chatter(simulator, guild_id, 50)
            await until(bot.has_received_all)
        await bot.settled()
    assert await counted_messages(database) == sent_messages(simulator)
    assert len(await membership_events(database)) == 1
    assert await differences(database, simulator) == []
    assert not os.listdir(tmp_path)


async def test_a_commit_whose_answer_is_lost_counts_once(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 12)
    lost = [0]

    async def answered(*arguments: Any) -> WriteCounts:
        written = await write_batch(*arguments)
        if arguments[1].events is not None and lost[0] < 3:
            lost[0] += 1
            raise DatabaseUnavailable("the connection ended before the answer came")
        return written

    monkeypatch.setattr("utils.mirror.write.writer.write_batch", answered)
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        for _ in range(4):
            chatter(simulator, guild_id, 20)
            simulator.world.ban(guild_id, people(simulator, guild_id)[-1])
            await bot.settled()
    assert lost[0] == 3
    assert await counted_messages(database) == sent_messages(simulator)
    assert Counter(kind for _, kind in await membership_events(database)) == {"ban": 4, "leave": 4}


async def test_next_process_replays_events_of_a_killed_one(
    database: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 12)
    async with simulator:
        async with mirrored(database, simulator, monkeypatch, spool=tmp_path, flush_seconds=60) as bot:
            await bot.settled()
            chatter(simulator, guild_id, 50)
            gone = people(simulator, guild_id)[0]
            simulator.world.leave(guild_id, gone)
            await until(bot.has_received_all)
            await bot.kill()
        assert await counted_messages(database) == {}
        async with mirrored(database, simulator, monkeypatch, spool=tmp_path) as bot:
            assert await counted_messages(database) == sent_messages(simulator)
            await bot.settled()
    assert await membership_events(database) == [(gone, "leave")]
    assert await differences(database, simulator) == []
    assert not os.listdir(tmp_path)
    assert await database.fetchval("SELECT count(*) FROM ops.positions") <= 1


async def test_unwritten_events_are_spooled_or_reported_lost(
    database: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 12)
    async with simulator:
        for mode, spool in (("outage", tmp_path), ("off", None)):
            async with mirrored(database, simulator, monkeypatch, spool=spool, mode=mode) as bot:  # type: ignore[arg-type]
                await bot.settled()
                async with refusing(database, "read-only"):
                    chatter(simulator, guild_id, 30)
                    await until(bot.has_received_all)
                    await bot.mirror.stop(0.3)
                    bot.killed = True
            assert ("30 events were not written; they are in the spool" in caplog.text) == (mode == "outage")
            assert ("30 of 30 unwritten events are lost: SPOOL is off" in caplog.text) == (mode == "off")
            caplog.clear()
        async with administrator(database) as admin:  # the pool's connections may just have been terminated
            assert await admin.fetchval("SELECT count(*) FROM member_stats") == 0
        async with mirrored(database, simulator, monkeypatch, spool=tmp_path) as bot:
            await bot.settled()
    assert sum((await counted_messages(database)).values()) == 30


async def forbid(database: Pool, statement: str) -> None:
    async with administrator(database) as admin:
        await admin.execute(statement)


@pytest.mark.parametrize("size", [6, 45], ids=["small guild", "large guild"])
async def test_refused_row_becomes_a_dead_letter(database: Pool, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, size)
    world, crowd = simulator.world, people(simulator, guild_id)
    await forbid(database, "ALTER TABLE members ADD CONSTRAINT polite CHECK (nick <> 'rude' AND nick <> 'unheard')")
    world.update_member(guild_id, crowd[0], nick="unheard")
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        for number, user_id in enumerate(crowd[1:5]):
            world.update_member(guild_id, user_id, nick="rude" if number == 2 else f"nick {number}")
        joined = world.join(guild_id)
        await bot.settled()
        refused = await dead_letters(database)
        assert {(it["table_name"], it["user_id"]) for it in refused} == {("members", crowd[0]), ("members", crowd[3])}
        assert all("polite" in it["error"] and it["sqlstate"] == "23514" for it in refused)
        assert {it["payload"]["nick"] for it in refused} == {"unheard", "rude"}
        wrong = await differences(database, simulator)
        assert {line.split(",")[1].strip(" )ismng:") for line in wrong if "members" in line} >= {str(crowd[0])}
        await forbid(database, "ALTER TABLE members DROP CONSTRAINT polite")
        await bot.mirror.sync(guild_id)
        await bot.settled()
    assert await differences(database, simulator) == []
    assert (joined, "join") in await membership_events(database)


async def test_refused_event_becomes_a_dead_letter(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 12)
    crowd = people(simulator, guild_id)
    await forbid(database, f"ALTER TABLE member_stats ADD CONSTRAINT quiet CHECK (user_id <> {crowd[0]})")
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        chatter(simulator, guild_id, 40)
        simulator.world.leave(guild_id, crowd[1])
        await bot.settled()
        assert bot.mirror.writer.is_idle
    wanted = sent_messages(simulator)
    lost = wanted.pop((guild_id, crowd[0]))
    assert await counted_messages(database) == wanted
    assert [it["table_name"] for it in await dead_letters(database)] == ["member_stats"] * lost
    assert await membership_events(database) == [(crowd[1], "leave")]


async def test_dropped_members_are_restored_by_a_reconcile(
    database: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    simulator, (guild_id, other) = small_world(monkeypatch, 45, 45)
    world = simulator.world
    async with simulator, mirrored(database, simulator, monkeypatch, spool=tmp_path, max_rows=100) as bot:
        await bot.settled()
        before = failures()
        async with refusing(database, "read-only"):
            for id in (guild_id, other):
                for user_id in people(simulator, id):
                    world.update_member(id, user_id, nick="while it was down")
            chatter(simulator, guild_id, 150)
            await until(bot.has_received_all)
            await until(lambda: failures() >= before + 2)
            await until(lambda: bot.mirror.writer.queue.in_memory == 0)
            assert len(bot.mirror.writer.buffer) <= 110
            assert bot.mirror.writer.rows_dropped > 0
        await bot.settled()
        await until(lambda: bot.mirror.reconciler.guilds[guild_id].last_run is not None)
        await bot.mirror.reconciler.wait_until_idle()
        await bot.settled()
    assert await differences(database, simulator) == []
    assert await counted_messages(database) == sent_messages(simulator)
    assert "memory is full" in caplog.text


@pytest.mark.slow
async def test_former_holder_leaves_its_events_to_the_next_one(
    database: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 12)
    async with simulator, mirrored(database, simulator, monkeypatch, spool=tmp_path, flush_seconds=60) as former:
        await former.settled()
        chatter(simulator, guild_id, 20)
        await until(former.has_received_all)
        await _two_at_once(database, simulator, monkeypatch, tmp_path, former, guild_id)
    assert await counted_messages(database) == sent_messages(simulator)
    assert await differences(database, simulator) == []


async def _two_at_once(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, spool: Path, former: Mirrored, guild: int
) -> None:
    async with mirrored(database, simulator, monkeypatch, spool=spool, replay_seconds=0.05) as bot:
        chatter(simulator, guild, 20)  # both hear it
        await until(lambda: len(former.mirror.writer.queue) >= 40)
        former.mirror.writer.buffer.request_flush()
        task = former.mirror.writer._task
        assert task is not None
        await asyncio.wait({task}, timeout=20)
        assert task.done()
        assert task.exception() is None
        await former.client.close()
        await former.mirror.stop(1, flush=False)
        former.killed = True
        journal = former.mirror.writer.queue.journal
        assert journal is not None
        await journal.close(5)
        await until(lambda: not (spool / former.mirror.fence.holder).exists())
        await bot.settled()


async def test_join_before_and_leave_after_a_kill_is_a_leave(
    database: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only the journal has them: without a row in `members` no listing could prove the leave."""
    simulator, (guild_id,) = small_world(monkeypatch, 12)
    async with simulator:
        async with mirrored(database, simulator, monkeypatch, spool=tmp_path, flush_seconds=60) as bot:
            await bot.settled()
            joined = simulator.world.join(guild_id)
            await until(bot.has_received_all)
            await bot.kill()
        simulator.world.leave(guild_id, joined)
        async with mirrored(database, simulator, monkeypatch, spool=tmp_path) as bot:
            await bot.settled()
    assert await membership_events(database) == [(joined, "join"), (joined, "leave")]
    assert await differences(database, simulator) == []


async def test_rows_wait_for_events_that_one_transaction_does_not_take(
    database: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A row of a member who left and joined again would prove both, although both wait in the queue."""
    simulator, (guild_id,) = small_world(monkeypatch, 12)
    async with simulator, mirrored(database, simulator, monkeypatch, spool=tmp_path, transaction_events=10) as bot:
        await bot.settled()
        back = people(simulator, guild_id)[0]
        before = failures()
        async with refusing(database, "read-only"):
            chatter(simulator, guild_id, 40)
            simulator.world.leave(guild_id, back)
            simulator.world.join(guild_id, back)
            await until(bot.has_received_all)
            await until(lambda: failures() >= before + 2)
        await bot.settled()
    assert await membership_events(database) == [(back, "leave"), (back, "join")]
    assert await membership_events(database, inferred=True) == []
    assert await counted_messages(database) == sent_messages(simulator)
