"""End to end, one way in a process of its own: `python -m benchmarks.client WAY API GATEWAY TOKEN [DATABASE]`.

`bare` chunks the largest guild into discord.py's cache; `settled` does so with the mirror's settings of the garbage
collector. `mirror` mirrors every guild, then the largest one again. The figures are printed as JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import discord
import psutil
import yarl
from discord.gateway import DiscordWebSocket
from discord.http import Route

from benchmarks.data import memory_queue, seize
from utils.database import Pool
from utils.database.address import parse_url
from utils.mirror import Mirror
from utils.mirror.discord.source import DiscordSource
from utils.mirror.discord.tap import install
from utils.mirror.reconcile.reconciler import ReconcilePolicy
from utils.mirror.write.writer import FlushPolicy
from utils.service import lease
from utils.service.heap import freeze_heap

#: Nothing may take longer than this, in seconds.
PATIENCE = 120.0


class _Stall:
    """Measures the longest time that the event loop was held."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def watch(self) -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            self.longest = max(self.longest, now - last - 0.001)
            last = now


def _resident() -> float:
    return float(psutil.Process().memory_info().rss) / 2**20


def _peak() -> float:
    """Return the highest resident size in MB; not `ru_maxrss`, which a child process inherits from its parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the kernel does not tell the highest resident size: this measurement needs Linux")


async def _login(client: discord.Client, token: str, gateway: str) -> asyncio.Task[None]:
    DiscordWebSocket.DEFAULT_GATEWAY = yarl.URL(gateway)
    await client.login(token)
    return asyncio.create_task(client.connect(reconnect=True))


async def bare(token: str, gateway: str, *, settled: bool = False) -> dict[str, Any]:
    """Chunk the largest guild into discord.py's cache, as bots without a mirror do."""
    intents = discord.Intents(guilds=True, members=True)
    client = discord.Client(intents=intents, chunk_guilds_at_startup=False)
    async with client:
        running = await _login(client, token, gateway)
        async with asyncio.timeout(PATIENCE):
            await client.wait_until_ready()
            guild = max(client.guilds, key=lambda guild: guild.member_count or 0)
            if settled:
                freeze_heap()
            gc.collect()
            before, stall = _resident(), _Stall()
            watch = asyncio.create_task(stall.watch())
            cpu, started = time.process_time(), time.perf_counter()
            members = await guild.chunk(cache=True)
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            watch.cancel()
        grown = _peak() - before
        await client.close()
        running.cancel()
    return {"members": len(members), "seconds": seconds, "cpu": cpu, "megabytes": grown, "stall": stall.longest}


async def mirror(token: str, gateway: str, dsn: str) -> dict[str, Any]:
    """Mirror all guilds, then the largest one again with nothing changed."""
    database = Pool(parse_url(dsn, source="benchmark"))
    await database.connect()
    client = discord.AutoShardedClient(
        intents=discord.Intents(guilds=True, members=True),
        chunk_guilds_at_startup=False,
        member_cache_flags=discord.MemberCacheFlags.none(),
        shard_count=1,
    )
    source = DiscordSource(client)
    fence = await seize(database, lease.holder())
    mirrored = Mirror(
        database,
        source,
        fence,
        memory_queue(),
        shards=1,
        flush_policy=FlushPolicy(),
        reconcile_policy=ReconcilePolicy(page_timeout=30, cooldown=0),
    )
    install(client, mirrored)
    stall = _Stall()
    figures: dict[str, Any] = {}
    async with client:
        mirrored.start()
        freeze_heap()  # as the bot does
        before = _resident()
        watch = asyncio.create_task(stall.watch())
        started = time.perf_counter()
        running = await _login(client, token, gateway)
        async with asyncio.timeout(PATIENCE):
            while not mirrored.reconciler.listings:  # noqa: ASYNC110 - measured from outside, on purpose
                await asyncio.sleep(0.001)
            stall.longest, cpu = 0.0, time.process_time()
            while not mirrored.is_ready()[0]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            figures["first_cpu"] = time.process_time() - cpu
            figures["ready_seconds"] = time.perf_counter() - started
            figures["first_megabytes"], figures["first_stall"] = _peak() - before, stall.longest
            state = max(mirrored.reconciler.guilds.values(), key=lambda state: state.size or 0)
            figures["first_seconds"] = await _seconds_of_last_run(database, state.id)
            stall.longest = 0.0
            times = []
            for _ in range(2):
                await asyncio.sleep(0.3)
                run = await mirrored.reconciler.sync(state.id)
                times.append(await _seconds_of_last_run(database, state.id))
            figures["again_seconds"], figures["again_stall"] = min(times), stall.longest
            figures["megabytes"], figures["members"] = _peak() - before, run.rows_seen
            figures["written_again"] = run.rows_inserted + run.rows_updated + run.rows_left
        watch.cancel()
        await client.close()
        running.cancel()
        await mirrored.stop(10)
    await database.close()
    return figures


async def _seconds_of_last_run(database: Pool, guild_id: int) -> float:
    return float(
        await database.fetchval(
            "SELECT extract(epoch FROM finished_at - started_at) FROM sync_runs WHERE guild_id = $1 "
            "AND state = 'complete' ORDER BY id DESC LIMIT 1",
            guild_id,
        )
    )


def main() -> None:
    """Measure what the arguments ask for."""
    way, api, gateway, token, *rest = sys.argv[1:]
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    Route.BASE = api
    work = mirror(token, gateway, rest[0]) if way == "mirror" else bare(token, gateway, settled=way == "settled")
    print(json.dumps(asyncio.run(work)))


if __name__ == "__main__":
    main()
