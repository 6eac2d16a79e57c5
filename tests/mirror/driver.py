"""Drives a mirror through random events and faults, and returns the differences: the body of the property test."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import pytest

from simulator import Simulator, World
from simulator.malformed import malformed_events
from tests.mirror.harness import TABLES, Mirrored, cache_differences, differences, mirrored, removals, small_world
from utils.database import Pool
from utils.exceptions import DatabaseError, GuildbookError

Step = tuple[str, int, int]
SIZES = (45, 32, 14, 6)
PAGES = ("first", "middle", "last")
REST = ("/members", "GET /guilds", "/channels", "/threads/archived")


class Driver:
    """One world, a bot that is started and stopped, and every row that Discord really removed."""

    def __init__(self, database: Pool, monkeypatch: pytest.MonkeyPatch, seed: int, guilds: int) -> None:
        self.database = database
        self.monkeypatch = monkeypatch
        self.simulator: Simulator
        self.simulator, _ = small_world(monkeypatch, *SIZES[:guilds], seed=seed, pages_per_second=200)
        self.world: World = self.simulator.world
        self.bot: Mirrored | None = None
        self.wants_restart = False
        #: Whether the database was set back, so that events are lost that it had recorded.
        self.has_lost_events = False
        self.gone: set[tuple[str, int]] = set()
        self._stack = contextlib.AsyncExitStack()
        self._present = self._there()
        self._syncs: set[asyncio.Task[None]] = set()

    # --- what may happen; `n` is any number, from which each makes what it needs

    def event(self, n: int) -> None:
        if self.world.guild_ids():
            self.world.random_event(random.Random(n))

    def events(self, n: int) -> None:
        for number in range(5):
            self.event(n + number)

    def outage(self, n: int) -> None:
        if (id := self._guild(n)) is not None:
            self.world.guild_outage(id)

    def restore(self, n: int) -> None:
        for guild in self.world.guilds.values():
            if not guild.available and guild.present:
                self.world.guild_restore(guild.id)
                return

    def remove_bot(self, n: int) -> None:
        if (id := self._guild(n)) is not None:
            self.world.remove_bot(id)

    def add_back(self, n: int) -> None:
        for guild in self.world.guilds.values():
            if not guild.present:
                self.world.add_bot_back(guild.id)
                return

    def add_guild(self, n: int) -> None:
        if len(self.world.guilds) < 6:
            self.world.add_guild(members=3 + n % 30, roles=3, channels=5, threads=2, archived_threads=1)

    def rename(self, n: int) -> None:
        if (member := self._member(n)) is not None:
            self.world.rename_user(member[1], global_name=f"name {n % 3}")

    def renick(self, n: int) -> None:
        if (member := self._member(n)) is not None:
            self.world.update_member(*member, nick=f"nick {n % 3}")

    def grant(self, n: int) -> None:
        """Give a member other roles; nick and pending may be absent from the dispatch."""
        if (member := self._member(n)) is not None:
            roles = sorted(self.world.guild(member[0]).roles.keys() - {member[0]})
            self.world.update_member(*member, roles=roles[: n % 4])

    def leave(self, n: int) -> None:
        if (member := self._member(n)) is not None and len(self.world.guild(member[0]).members) > 3:
            self.world.leave(*member)

    def rejoin(self, n: int) -> None:
        if (id := self._guild(n)) is not None:
            guild = self.world.guild(id)
            known = self.world.user_ids[n % len(self.world.user_ids)]
            if known not in guild.members and known not in guild.bans:
                self.world.join(id, known)

    def delete_role(self, n: int) -> None:
        if (id := self._guild(n)) is not None:
            roles = sorted(role.id for role in self.world.guild(id).roles.values() if role.id != id)
            if roles:
                self.world.delete_role(id, roles[n % len(roles)])

    def delete_channel(self, n: int) -> None:
        if (id := self._guild(n)) is not None and len(self.world.guild(id).channels) > 2:
            channels = sorted(self.world.guild(id).channels)
            self.world.delete_channel(id, channels[n % len(channels)])

    def toggle_hidden_channel(self, n: int) -> None:
        """Hide a channel, or show it again."""
        if (id := self._guild(n)) is not None:
            plain = [channel for channel in self.world.guild(id).channels.values() if channel.type != 4]
            if plain:
                channel = plain[n % len(plain)]
                (self.world.reveal_channel if channel.hidden else self.world.hide_channel)(id, channel.id)

    def lose_page(self, n: int) -> None:
        if (id := self._guild(n)) is not None:
            self.simulator.faults.drop_page(id, PAGES[n % 3])  # type: ignore[arg-type]

    def shuffle_pages(self, n: int) -> None:
        if (id := self._guild(n)) is not None:
            self.simulator.faults.reorder_pages(id)
            self.simulator.faults.duplicate_page(id, PAGES[n % 3])  # type: ignore[arg-type]

    def ignore_member_request(self, n: int) -> None:
        if (id := self._guild(n)) is not None:
            self.simulator.faults.ignore_member_request(id)

    def rate_limit(self, n: int) -> None:
        if (id := self._guild(n)) is not None:
            self.simulator.faults.rate_limit_next(id)

    def drop_after_pages(self, n: int) -> None:
        if (id := self._guild(n)) is not None:
            self.simulator.faults.drop_socket_after_pages(id, 1 + n % 4)

    def drop_after_events(self, n: int) -> None:
        self.simulator.faults.drop_socket_after_events(1 + n % 6)

    def drop_socket(self, n: int) -> None:
        self.simulator.faults.drop_socket()

    def refuse_resume(self, n: int) -> None:
        self.simulator.faults.refuse_resume()
        self.simulator.faults.drop_socket()

    def invalidate(self, n: int) -> None:
        self.simulator.faults.invalidate_session(resumable=bool(n % 2))

    def reconnect(self, n: int) -> None:
        self.simulator.request_reconnect()

    def duplicate_events(self, n: int) -> None:
        self.simulator.faults.duplicate_events((0.0, 0.5)[n % 2])

    def malformed(self, n: int) -> None:
        guild = next(iter(self.world.guilds.values()))
        kinds = [*malformed_events(guild), "nul", "lone_surrogate"]
        self.simulator.faults.send_malformed(kinds[n % len(kinds)], guild.id)

    def rest_fault(self, n: int) -> None:
        status = (500, 429, 502)[n % 3]
        self.simulator.faults.rest_fail(REST[n % len(REST)], status, times=1 + n % 7, retry_after=0.01)

    def forbid(self, n: int) -> None:
        self.simulator.faults.rest_fail("/threads/archived", 403, times=1 + n % 9)
        self.wants_restart = True  # what Discord does not show is not asked for again in this session

    def rest_late(self, n: int) -> None:
        self.simulator.faults.rest_delay(REST[n % len(REST)], (0.02, 0.1)[n % 2], times=1 + n % 5)

    def sync(self, n: int) -> None:
        if self.bot is not None and (id := self._guild(n)) is not None:
            task = asyncio.create_task(self._sync(self.bot, id))
            self._syncs.add(task)
            task.add_done_callback(self._syncs.discard)

    async def kill_connections(self, n: int) -> None:
        """End every connection to the database."""
        with contextlib.suppress(DatabaseError):
            await self.database.fetch(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )

    async def stop(self, n: int) -> None:
        await self._down(kill=False)

    async def kill(self, n: int) -> None:
        await self._down(kill=True)

    async def start(self, n: int) -> None:
        if self.bot is None:
            self.bot = await self._stack.enter_async_context(self._mirrored())

    # --- the run

    async def run(self, steps: list[Step]) -> list[str]:
        """Take the steps, wait until everything is idle, and return the differences."""
        async with asyncio.timeout(90), self.simulator:
            try:
                await self.start(0)
                for name, n, pause in steps:
                    done = getattr(self, name)(n)
                    if asyncio.iscoroutine(done):
                        await done
                    self._note()
                    await self._pause(pause)
                return await self._verdict()
            finally:
                await self._stack.aclose()

    async def _verdict(self) -> list[str]:
        self.simulator.faults.clear()
        while any(guild.present and not guild.available for guild in self.world.guilds.values()):
            self.restore(0)
        if self.wants_restart:
            await self._down(kill=False)
        await self.start(0)
        assert self.bot is not None
        await self.bot.settled()
        await asyncio.gather(*self._syncs)
        wrong = cache_differences(self.bot.client, self.simulator)
        for id in self.world.guild_ids():
            await self.bot.mirror.sync(id)
        await self.bot.settled()
        self._note()
        wrong += await differences(self.database, self.simulator, has_lost_events=self.has_lost_events)
        wrong += [f"{table} {id} was wrongly tombstoned" for table, id in await removals(self.database) - self.gone]
        mirror = self.bot.mirror
        left = {
            "watched for": mirror.writer.overlay.is_tracking,
            "listed": mirror.reconciler.listings,
            "held": mirror.writer.buffer.held_guilds,
            "running": mirror.reconciler.queue._running,
            "waiting": list(mirror.reconciler.queue),
        }
        return wrong + [f"still {what}: {things}" for what, things in left.items() if things]

    async def _pause(self, kind: int) -> None:
        bot = self.bot
        if kind == 1:
            for _ in range(5):
                await asyncio.sleep(0)
        elif kind == 2:
            await asyncio.sleep(0.01)
        elif kind == 3 and bot is not None:  # a moment for what is under way, however it ends
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    while not (bot.has_received_all() and bot.mirror.is_ready()[0]):  # noqa: ASYNC110
                        await asyncio.sleep(0.005)

    def _mirrored(self) -> contextlib.AbstractAsyncContextManager[Mirrored]:
        return mirrored(self.database, self.simulator, self.monkeypatch, page_timeout=0.4, member_cache=True)

    async def _down(self, *, kill: bool) -> None:
        if self.bot is None:
            return
        if kill:
            await self.bot.kill()
        self.bot = None
        await self._stack.aclose()
        self._stack = contextlib.AsyncExitStack()
        for task in self._syncs:
            task.cancel()
        await asyncio.gather(*self._syncs, return_exceptions=True)

    async def _sync(self, bot: Mirrored, id: int) -> None:
        with contextlib.suppress(GuildbookError):
            await bot.mirror.sync(id)

    def _guild(self, n: int) -> int | None:
        ids = self.world.guild_ids()
        return ids[n % len(ids)] if ids else None

    def _member(self, n: int) -> tuple[int, int] | None:
        id = self._guild(n)
        if id is None:
            return None
        guild = self.world.guild(id)
        others = [user for user in guild.ordered_member_ids() if user not in (self.world.bot.id, guild.owner_id)]
        return (id, others[n % len(others)]) if others else None

    def _there(self) -> set[tuple[str, int, int]]:
        there = set()
        for guild in self.world.guilds.values():
            if guild.present:
                there.add(("guilds", 0, guild.id))
            for table in TABLES[2:]:
                there |= {(table, guild.id, id) for id in getattr(guild, table)}
        return there

    def _note(self) -> None:
        now = self._there()
        self.gone |= {(table, id) for table, _, id in self._present - now}
        self._present = now


#: Everything that a step may be.
STEPS: list[str] = [name for name, it in vars(Driver).items() if callable(it) and name[0] != "_" and name != "run"]


async def empty(database: Pool) -> None:
    """Empty every table between two runs."""
    tables: Any = await database.fetch(
        "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname IN ('public', 'ops') "
        "AND tablename <> 'guildbook_version'"
    )
    await database.execute("TRUNCATE " + ", ".join(table for (table,) in tables))
