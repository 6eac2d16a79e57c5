"""A mirror on a real gateway connection to a simulator, and the comparison of its tables with the simulator's world."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import discord
import pytest
import yarl
from discord import backoff, gateway, http

from simulator import Limits, Simulator, World
from tests.leases import seize
from tests.simulator.client_cache import member_rows, user_rows
from tests.waiting import until
from utils.bot.client import member_cache_flags
from utils.database import Pool
from utils.exceptions import DatabaseError
from utils.mirror import Mirror
from utils.mirror.discord.member_cache import MemberCache
from utils.mirror.discord.source import DiscordSource
from utils.mirror.discord.tap import install
from utils.mirror.reconcile.listing import Listing
from utils.mirror.reconcile.reconciler import ReconcilePolicy
from utils.mirror.records.rows import key_columns, tombstone_column
from utils.mirror.spool.journal import Journal
from utils.mirror.spool.queue import EventQueue, SpoolMode
from utils.mirror.write.writer import FlushPolicy
from utils.service import lease
from utils.tasks import cancel_and_wait

TABLES = ("guilds", "users", "members", "roles", "channels", "threads")
#: Members on a page in small worlds that still need guilds of several pages.
PAGE = 10
#: Seconds; a bound for what takes a few milliseconds, on a machine that does other things.
PATIENCE = 30.0


class _Impatient:
    """asyncio, as discord.py's REST client sees it: the waits between its retries are short."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.02))


class _Client(discord.AutoShardedClient):
    async def before_identify_hook(self, shard_id: int | None, *, initial: bool = False) -> None:
        """Identify at once; discord.py waits five seconds before it does so again."""


class Mirrored:
    """A running mirror with its client and simulator."""

    def __init__(self, mirror: Mirror, client: discord.AutoShardedClient, simulator: Simulator) -> None:
        self.mirror = mirror
        self.client = client
        self.simulator = simulator
        self.killed = False

    def has_received_all(self) -> bool:
        """Return whether the connected session has received everything that the simulator sent."""
        session = next((s for s in self.simulator.gateway.sessions.values() if s.socket is not None), None)
        if session is None or session.dead or not session.has_sent_all:
            return False
        try:
            ws = self.client._get_websocket(shard_id=0)
        except KeyError:
            return False
        return ws.session_id == session.id and ws.sequence == session.sequence

    async def ready(self, timeout: float = PATIENCE) -> None:
        """Wait until every available guild has been reconciled."""
        await until(lambda: self.mirror.is_ready()[0], timeout)

    async def settled(self, timeout: float = PATIENCE) -> None:
        """Wait until everything sent has been received, reconciled if due, and written."""
        async with asyncio.timeout(timeout):
            while True:
                await until(lambda: self.has_received_all() and self.mirror.is_ready()[0], timeout)
                await self.mirror.reconciler.wait_until_idle()
                await until(lambda: not self.mirror.archived.guilds_waiting, timeout)
                with contextlib.suppress(DatabaseError):
                    await self.mirror.writer.flush()
                if self.has_received_all() and self.mirror.is_ready()[0] and self.mirror.writer.is_idle:
                    return

    async def listing(self, guild_id: int, pages: int = 1) -> Listing:
        """Wait until a listing of the guild is under way and that many of its pages were received."""

        def under_way() -> Listing | None:
            state = self.mirror.reconciler.guilds.get(guild_id)
            found = state.listing if state is not None else None
            return found if found is not None and found.pages >= pages else None

        await until(under_way)
        listing = under_way()
        assert listing is not None
        return listing

    async def kill(self) -> None:
        """End as a killed process does: nothing more is written, and nobody is told."""
        self.killed = True
        writing = self.mirror.writer._task
        if writing is not None:
            writing.cancel()  # before a reconcile ends: nothing of it is written any more
        await self.mirror.reconciler.stop()
        if writing is not None:
            await cancel_and_wait((writing,))


def small_world(
    monkeypatch: pytest.MonkeyPatch, *sizes: int, seed: int = 1, pages_per_second: float | None = None, **limits: Any
) -> tuple[Simulator, list[int]]:
    """Return a simulator with guilds of these sizes, whose member pages are `PAGE` long, and the guilds' ids."""
    world = World(seed=seed)
    ids = [world.add_guild(members=size, roles=4, channels=7, threads=3, archived_threads=2) for size in sizes]
    paced = Limits.none(pages_per_second=pages_per_second, members_per_page=PAGE)
    return Simulator(world, limits=paced, **limits), ids


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten waits of ours and of discord.py that no test is about."""
    monkeypatch.setattr(http, "asyncio", _Impatient())
    monkeypatch.setattr(backoff.ExponentialBackoff, "delay", lambda self: 0.01)


@asynccontextmanager
async def mirrored(
    database: Pool,
    simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch,
    *,
    page_timeout: float = 2.0,
    cooldown: float = 0.0,
    flush_seconds: float = 0.02,
    spool: Path | None = None,
    mode: SpoolMode = "always",
    max_rows: int = 20_000,
    user_batch_pages: int = 2,
    transaction_events: int = 5_000,
    replay_seconds: float = 5.0,
    pause_seconds: float = 10.0,
    member_cache: bool = False,
    on_written: Callable[[frozenset[str]], None] = lambda _: None,
    held: lease.Lease | None = None,
) -> AsyncIterator[Mirrored]:
    """Run a bot that mirrors a simulator's world into a database; a further block is a restart of the bot.

    `member_cache`: whether discord.py's member cache is filled. `on_written` as in `Mirror`. `held` is the lease that
    it runs under; None seizes one. The block ends it.
    """
    impatient(monkeypatch)
    monkeypatch.setattr(http.Route, "BASE", simulator.api_base)
    monkeypatch.setattr(gateway.DiscordWebSocket, "DEFAULT_GATEWAY", yarl.URL(simulator.gateway_url))
    client = _Client(
        intents=discord.Intents(
            guilds=True, members=True, moderation=True, guild_messages=True, voice_states=member_cache
        ),
        chunk_guilds_at_startup=False,
        member_cache_flags=member_cache_flags("all" if member_cache else "none"),
        max_messages=None,
        shard_count=1,
        guild_ready_timeout=0.1,
    )
    fence = await seize(database, lease.holder()) if held is None else held.fence
    assert fence is not None, "acquired"
    journal = None if spool is None else await Journal.open(spool, fence.holder, max_bytes=2**26)
    mirror = Mirror(
        database,
        DiscordSource(client, timeout=10.0, members_page=simulator.limits.members_per_page),
        fence,
        EventQueue(journal, spool=mode, max_rows=max_rows),
        shards=1,
        arrival_seconds=0.2,
        pause_seconds=pause_seconds,
        flush_policy=FlushPolicy(
            flush_seconds=flush_seconds, transaction_events=transaction_events, replay_seconds=replay_seconds
        ),
        reconcile_policy=ReconcilePolicy(
            page_timeout=page_timeout,
            cooldown=cooldown,
            retry_seconds=0.05,
            user_batch_pages=user_batch_pages,
            thread_requests_per_second=1_000,  # the simulator has its own limits
            thread_retry_seconds=0.05,
            permissions_seconds=0.05,
        ),
        spool=spool,
        on_lost=(lambda: None) if held is None else held.give_up,
        on_written=on_written,
        member_cache=partial(MemberCache, client) if member_cache else None,
    )
    install(client, mirror)
    await mirror.replay()
    mirror.start()
    running = asyncio.create_task(client.start(simulator.token))
    bot = Mirrored(mirror, client, simulator)
    try:
        yield bot
        if running.done():
            running.result()
    finally:
        await client.close()
        running.cancel()
        await asyncio.wait([running], timeout=5)
        if not bot.killed:
            await mirror.stop(5, flush=held is None or not held.lost.is_set())
        if journal is not None:
            await journal.close(5)


async def differences(
    database: Pool, simulator: Simulator, tables: Iterable[str] = TABLES, *, has_lost_events: bool = False
) -> list[str]:
    """Return the differences between the tables and the simulator's world, as lines.

    Of guilds that the bot is no longer in nothing is known, and so nothing is compared but that it left. With
    `has_lost_events` the database was set back: nothing shows again which threads of a hidden channel were deleted.
    """
    wrong: list[str] = []
    world = simulator.world
    present = set(world.guild_ids())
    unknowable = {thread_id for guild_id in present for thread_id in world.hidden_thread_ids(guild_id)}
    hidden = {id for guild_id in present for id, channel in world.guild(guild_id).channels.items() if channel.hidden}
    for table in tables:
        keys = key_columns(table)
        tombstone = tombstone_column(table)
        expected = {tuple(row[key] for key in keys): row for row in world.expected_rows(table)}
        records = await database.fetch(f"SELECT * FROM {table}" + (f" WHERE {tombstone} IS NULL" if tombstone else ""))  # noqa: S608
        found: dict[tuple[Any, ...], dict[str, Any]] = {
            tuple(record[key] for key in keys): dict(record) for record in records
        }
        if table == "users":  # who left every guild stays known
            found = {key: row for key, row in found.items() if key in expected}
        elif table != "guilds":
            found = {key: row for key, row in found.items() if key[0] in present}
        if table == "threads":
            found = {
                key: row
                for key, row in found.items()
                if key[-1] not in unknowable and not (has_lost_events and row["parent_id"] in hidden)
            }
        wrong += [f"{table} {key} is missing" for key in expected.keys() - found.keys()]
        wrong += [f"{table} {key} should not be there" for key in found.keys() - expected.keys()]
        for key in expected.keys() & found.keys():
            for column, value in expected[key].items():
                if found[key][column] != value:
                    wrong.append(f"{table} {key}: {column} is {found[key][column]!r}, should be {value!r}")
    return wrong


def cache_differences(client: discord.Client, simulator: Simulator) -> list[str]:
    """Return the differences between discord.py's cached members and the members of the simulator's world, as lines."""
    wrong = []
    for guild_id in simulator.world.guild_ids():
        guild = client.get_guild(guild_id)
        if guild is None:
            wrong.append(f"cached guild {guild_id} is missing")
            continue
        for table, key, cached in (("members", "user_id", member_rows(guild)), ("users", "id", user_rows(guild))):
            expected: dict[Any, Any] = {row[key]: row for row in simulator.world.expected_rows(table, guild_id)}
            if table == "users":  # the bot's own user has more fields
                cached.pop(simulator.world.bot.id, None)
                expected.pop(simulator.world.bot.id, None)
            wrong += [f"cached {table} {guild_id} {id} is missing" for id in expected.keys() - cached.keys()]
            wrong += [f"cached {table} {guild_id} {id} should not be there" for id in cached.keys() - expected.keys()]
            for id in expected.keys() & cached.keys():
                pairs = {name: (value, expected[id].get(name, value)) for name, value in cached[id].items()}
                wrong += [
                    f"cached {table} {id}: {name} {a!r}, should be {b!r}" for name, (a, b) in pairs.items() if a != b
                ]
        if not guild.chunked:
            wrong.append(f"cached guild {guild_id} counts {guild.member_count} members")
    return wrong


async def changes(database: Pool, **where: Any) -> list[tuple[Any, ...]]:
    """Return the history in order: table, key without guild id, action, before, after."""
    records = await database.fetch("SELECT * FROM changes ORDER BY id")
    told = []
    for record in records:
        if all(record[name] == value for name, value in where.items()):
            key = tuple(v for k, v in record["key"].items() if k != "guild_id")
            told.append((record["table_name"], *key, record["action"], record["before"], record["after"]))
    return told


async def removals(database: Pool) -> set[tuple[str, int]]:
    """Return every (table, id) that was ever tombstoned."""
    records = await database.fetch("SELECT table_name, key FROM changes WHERE action = 'remove'")
    return {(record["table_name"], record["key"].get("user_id", record["key"].get("id"))) for record in records}


async def versions(database: Pool) -> dict[str, set[tuple[Any, ...]]]:
    """Return the physical position (ctid) of each row of the mirrored tables and their history: a write moves it."""
    found = {}
    for table in (*TABLES, "changes", "user_changes"):
        records = await database.fetch(f"SELECT tableoid, ctid, xmin::text FROM {table}")  # noqa: S608
        found[table] = {tuple(record) for record in records}
    return found


async def runs(database: Pool, guild_id: int) -> list[tuple[str, str]]:
    """Return the state and source of the guild's reconciles, in order."""
    records = await database.fetch("SELECT state, source FROM sync_runs WHERE guild_id = $1 ORDER BY id", guild_id)
    return [(record["state"], record["source"]) for record in records]
