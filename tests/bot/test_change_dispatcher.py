"""Listeners of `on_mirror_change`: in order for each guild, a few at once, again if they may be, never for ever."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from discord.ext import commands
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator import Simulator
from tests.bot.running import running_bot
from tests.bot.temporary_cogs import TemporaryCogs
from tests.mirror.tables import dead_letters
from tests.waiting import until
from utils.bot.change_dispatcher import ChangeDispatcher, DispatchPolicy, idempotent
from utils.database import Pool
from utils.mirror.change_feed import JOURNAL, ChangeFeed, MirrorChange, read_listener_positions

POLICY = DispatchPolicy(
    concurrency=2, timeout=0.1, attempts=3, retry_seconds=0.001, retry_max_seconds=0.01, reload_seconds=0.2,
    cancel_seconds=0.05,
)  # fmt: skip
PATIENT = POLICY._replace(timeout=60.0)
AT = datetime(2026, 1, 2, tzinfo=UTC)


def change(id: int, guild_id: int | None = 1) -> MirrorChange:
    return MirrorChange(id, "roles", {"guild_id": guild_id, "id": 5}, "update", guild_id, None, {}, {}, False, AT)


class Shop(commands.Cog):
    """Records what it is told, and does with a change what the test says."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.told: list[int] = []
        self.behaviour: Callable[[MirrorChange], Any] = lambda _: None

    async def once(self, change: MirrorChange) -> None:
        self.calls.append(change.id)
        result = self.behaviour(change)
        if result is not None:
            await result
        self.told.append(change.id)

    @idempotent
    async def again(self, change: MirrorChange) -> None:
        await self.once(change)


async def raises() -> None:
    raise RuntimeError("sold out")


async def hangs() -> None:
    await asyncio.Event().wait()


async def idle(dispatcher: ChangeDispatcher) -> None:
    await until(lambda: not dispatcher.waiting and not dispatcher._tasks)


@pytest.mark.parametrize("failure", [raises, hangs])
async def test_idempotent_listener_is_called_again_and_then_goes_on(
    database: Pool, caplog: pytest.LogCaptureFixture, failure: Callable[[], Any]
) -> None:
    shop = Shop()
    dispatcher = ChangeDispatcher(database, lambda: [shop.again], POLICY)
    shop.behaviour = lambda change: failure() if change.id == 2 else None
    for id in (1, 2, 3):
        dispatcher.dispatch(change(id))
    await idle(dispatcher)
    assert (shop.calls, shop.told) == ([1, 2, 2, 2, 3], [1, 3])
    (letter,) = await dead_letters(database)
    assert (letter["cog"], letter["table_name"], letter["key"], letter["stamp"]) == (
        "Shop", "roles", {"guild_id": 1, "id": 5}, 2,
    )  # fmt: skip
    assert letter["payload"]["listener"].endswith("Shop.again")
    assert letter["payload"]["change"]["action"] == "update"
    assert ("sold out" in letter["error"]) == (failure is raises)
    assert ("did not end within 0.1 s" in letter["error"]) == (failure is hangs)
    assert "it was called 3 times, and the change is in ops.dead_letters" in caplog.text


async def test_idempotent_listener_that_recovers_leaves_no_dead_letter(database: Pool) -> None:
    shop = Shop()
    dispatcher = ChangeDispatcher(database, lambda: [shop.again], POLICY)
    shop.behaviour = lambda change: raises() if len(shop.calls) < 3 else None
    dispatcher.dispatch(change(1))
    await idle(dispatcher)
    assert (shop.calls, shop.told, await dead_letters(database)) == ([1, 1, 1], [1], [])


@pytest.mark.parametrize("failure", [raises, hangs])
async def test_other_listeners_are_told_once(
    database: Pool, caplog: pytest.LogCaptureFixture, failure: Callable[[], Any]
) -> None:
    shop = Shop()
    dispatcher = ChangeDispatcher(database, lambda: [shop.once], POLICY)
    shop.behaviour = lambda change: failure() if change.id == 1 else None
    dispatcher.dispatch(change(1))
    dispatcher.dispatch(change(2))
    await idle(dispatcher)
    assert (shop.calls, shop.told, await dead_letters(database)) == ([1, 2], [2], [])
    assert "on_mirror_change failed" in caplog.text


async def test_a_hanging_listener_delays_neither_others_nor_other_guilds(database: Pool) -> None:
    slow, other = Shop(), Shop()
    listeners = {"slow": slow.again, "other": other.once}
    dispatcher = ChangeDispatcher(database, lambda: list(listeners.values()), PATIENT)
    over = asyncio.Event()
    slow.behaviour = lambda change: over.wait() if change.guild_id == 1 else None
    for id in range(1, 11):
        dispatcher.dispatch(change(id, guild_id=1 + id % 2))
    await until(lambda: len(other.told) == 10 and len(slow.told) == 5)
    await until(lambda: dispatcher.positions(10) == (1, {f"{__name__}.Shop.once": 10}))  # the calls have returned too
    over.set()
    await idle(dispatcher)
    assert dispatcher.positions(10) == (10, {})


async def test_runs_a_bounded_number_of_calls_at_once(database: Pool) -> None:
    shop, running, most = Shop(), 0, 0

    async def count() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.002)
        running -= 1

    shop.behaviour = lambda _: count()
    dispatcher = ChangeDispatcher(database, lambda: [shop.once], POLICY)
    for id in range(1, 21):
        dispatcher.dispatch(change(id, guild_id=id))
    await idle(dispatcher)
    assert (most, len(shop.told)) == (2, 20)


async def test_reads_no_more_while_too_many_wait(database: Pool) -> None:
    shop, over = Shop(), asyncio.Event()
    shop.behaviour = lambda _: over.wait()
    dispatcher = ChangeDispatcher(database, lambda: [shop.once], PATIENT._replace(max_waiting=2))
    for id in (1, 2, 3):
        dispatcher.dispatch(change(id))
    waiting = asyncio.create_task(dispatcher.wait_for_room())
    await asyncio.sleep(0.1)
    assert not waiting.done()
    over.set()
    await waiting


@pytest.mark.parametrize(("listener", "told_up_to"), [("once", 1), ("again", 0)])
async def test_stop_leaves_what_was_not_told_to_the_next_process(
    database: Pool, listener: str, told_up_to: int
) -> None:
    shop = Shop()
    listeners = [getattr(shop, listener)]
    dispatcher = ChangeDispatcher(database, lambda: listeners, PATIENT)
    shop.behaviour = lambda _: hangs()
    dispatcher.dispatch(change(1))
    dispatcher.dispatch(change(2))
    await until(lambda: shop.calls)
    await dispatcher.stop(0.05)
    dispatcher.dispatch(change(3))
    assert (shop.calls, dispatcher.positions(3)) == ([1], (told_up_to, {}))


async def test_resumes_where_each_listener_was(database: Pool) -> None:
    ahead, behind = Shop(), Shop()
    dispatcher = ChangeDispatcher(database, lambda: [ahead.once, behind.again], POLICY)
    feed = ChangeFeed(
        database, dispatcher.dispatch, has_listeners=lambda: True, positions=lambda _: (5, {f"{__name__}.Shop.once": 7})
    )
    await feed.step()
    dispatcher.resume_from(await read_listener_positions(database))
    for id in (6, 7, 8):
        dispatcher.dispatch(change(id))
    await idle(dispatcher)
    assert (ahead.told, behind.told) == ([8], [6, 7, 8])


async def test_reloaded_listener_gets_what_waits_and_one_that_is_gone_does_not(database: Pool) -> None:
    before, after = Shop(), Shop()
    listeners = [before.once]
    dispatcher = ChangeDispatcher(database, lambda: listeners, POLICY)
    over = asyncio.Event()
    before.behaviour = lambda _: over.wait()
    dispatcher.dispatch(change(1))
    dispatcher.dispatch(change(2))
    await until(lambda: before.calls)
    listeners.clear()
    over.set()
    await until(lambda: before.told)
    listeners.append(after.once)
    await idle(dispatcher)
    assert (before.calls, after.told) == ([1], [2])
    dispatcher.dispatch(change(3))
    listeners.clear()
    await idle(dispatcher)
    assert (after.told, dispatcher.positions(3)) == ([2], (3, {}))


@settings(max_examples=30)
@given(
    changes=st.lists(st.tuples(st.integers(1, 3), st.sampled_from(("ok", "slow", "raises", "flaky"))), max_size=25),
    pauses=st.sets(st.integers(1, 25)),
)
async def test_each_guild_is_told_in_order(changes: list[tuple[int, str]], pauses: set[int], database: Pool) -> None:
    await database.execute("TRUNCATE ops.dead_letters")
    shop = Shop()
    dispatcher = ChangeDispatcher(database, lambda: [shop.again], PATIENT)
    kinds = {id: kind for id, (_, kind) in enumerate(changes, start=1)}

    def behave(change: MirrorChange) -> Any:
        kind = kinds[change.id]
        if kind == "slow":
            return asyncio.sleep(0.001)
        is_first = shop.calls.count(change.id) == 1
        return raises() if kind == "raises" or (kind == "flaky" and is_first) else None

    shop.behaviour = behave
    for id, (guild_id, _) in enumerate(changes, start=1):
        dispatcher.dispatch(change(id, guild_id))
        if id in pauses:
            await asyncio.sleep(0)
    await idle(dispatcher)
    by_guild: dict[int, list[int]] = defaultdict(list)
    for id in shop.told:
        by_guild[changes[id - 1][0]].append(id)
    for guild_id in (1, 2, 3):
        expected = [id for id, (guild, kind) in enumerate(changes, start=1) if guild == guild_id and kind != "raises"]
        assert by_guild[guild_id] == expected
    refused = [id for id, kind in kinds.items() if kind == "raises"]
    assert sorted(letter["stamp"] for letter in await dead_letters(database)) == refused
    assert dispatcher.positions(len(changes)) == (len(changes), {})


LISTENING = """
from utils.base_cog import idempotent

class Archive(BaseCog):
    async def start(self) -> None:
        self.told = []

    @commands.Cog.listener()
    @idempotent
    async def on_mirror_change(self, change) -> None:
        if change.after and change.after.get("name") == "stubborn":
            await asyncio.Event().wait()
        self.told.append((change.action, change.table, (change.after or {}).get("name")))

async def setup(bot: Guildbook) -> None:
    await bot.add_cog(Archive(bot))
"""


@pytest.mark.guilds(10)
async def test_next_process_tells_what_was_being_told_at_the_end(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cogs = TemporaryCogs(tmp_path, monkeypatch)
    cogs.write("archive", LISTENING)
    world = simulator.world
    guild_id = next(iter(world.guilds))
    async with running_bot(database, simulator, extensions=cogs.extensions) as bot:
        begun = "SELECT position FROM ops.positions WHERE journal = $1"
        await until(lambda: database.fetchval(begun, JOURNAL))  # the feed has begun, at the present
        created = world.create_channel(guild_id, "first")
        told: list[Any] = bot.cogs["Archive"].told  # type: ignore[attr-defined]
        await until(lambda: ("create", "channels", "first") in told)
        await until(lambda: not bot._changes.waiting)  # that call has returned, so the next one is another
        world.update_channel(guild_id, created, name="stubborn")
        await until(lambda: bot._changes._calls)
        world.update_channel(guild_id, created, name="later")
        await until(lambda: bot._changes.waiting == 2)
    cogs.write("archive", LISTENING.replace("await asyncio.Event().wait()", "pass"))
    async with running_bot(database, simulator, extensions=cogs.extensions) as bot:
        told = bot.cogs["Archive"].told  # type: ignore[attr-defined]
        await until(lambda: len(told) >= 2)
        assert told == [("update", "channels", "stubborn"), ("update", "channels", "later")]
