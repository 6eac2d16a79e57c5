"""The live path, one way in a process: `python -m benchmarks.live_client WAY API GATEWAY TOKEN [DATABASE MODE]`.

`bare` is discord.py with a listener that does nothing; `default` the same with Python's own settings of the garbage
collector; `mirror` the mirror beside that listener, events spooled as MODE says. It prints "ready", reads lines from
standard input, and answers each with a line of JSON:

    expect N     once N messages have been handled (by the mirror: are committed): seconds, CPU seconds and memory
    sample       memory now and its peak since the last time, and what waits
    time         how long events took since the last time from being heard to the commit; one that is not committed yet
                 counts with the time it has waited. It costs memory for each event from the first time on
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import discord
import stamina
import yarl
from discord.gateway import DiscordWebSocket
from discord.http import Route

from benchmarks.data import seize
from utils.database import Pool
from utils.database.address import parse_url
from utils.mirror import Mirror
from utils.mirror.discord.source import DiscordSource
from utils.mirror.discord.tap import install
from utils.mirror.reconcile.reconciler import ReconcilePolicy
from utils.mirror.records.events import Event
from utils.mirror.spool.journal import Journal
from utils.mirror.spool.queue import EventQueue
from utils.mirror.write.writer import FlushPolicy
from utils.service import lease
from utils.service.heap import freeze_heap

#: How long the client may run, in seconds.
CLIENT_SECONDS = 1_800.0


def memory(what: str) -> float:
    """Return a figure of /proc/self/status in MB: VmRSS now, VmHWM at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the kernel does not tell a process's memory: this measurement needs Linux")


def peak() -> float:
    """Return the highest resident size in MB since the last call."""
    highest = memory("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # "reset the peak resident set size", proc_pid_clear_refs(5)
    return highest


class TimedQueue(EventQueue):
    """A queue that notes how long events take."""

    def __init__(self, journal: Journal, *, spool: Any, max_rows: int) -> None:
        super().__init__(journal, spool=spool, max_rows=max_rows)
        self.heard: dict[int, float] = {}
        self.took: list[float] = []
        self.is_timed = False

    def add(self, event: Event) -> None:
        """Accept an event, and note when."""
        if self.is_timed:
            self.heard[event.stamp] = time.monotonic()
        super().add(event)

    async def discard(self, position: int) -> None:
        """Let go of what is committed, and note how long it took."""
        now = time.monotonic()
        for stamp in [stamp for stamp in self.heard if stamp <= position]:
            self.took.append(now - self.heard.pop(stamp))
        await super().discard(position)

    def taken(self) -> list[float]:
        """Return how long events took since the last call, shortest first, and time those to come."""
        now = time.monotonic()
        took = sorted([*self.took, *(now - since for since in self.heard.values())])
        self.took, self.is_timed = [], True
        return took


class Client(discord.AutoShardedClient):
    """Counts messages, and does nothing else with them."""

    def __init__(self) -> None:
        super().__init__(
            intents=discord.Intents(guilds=True, members=True, moderation=True, guild_messages=True),
            chunk_guilds_at_startup=False,
            member_cache_flags=discord.MemberCacheFlags.none(),
            max_messages=None,
            shard_count=1,
        )
        self.seen = 0
        self.first = 0.0

    async def on_message(self, message: discord.Message) -> None:
        """Count it."""
        if self.first == 0.0:
            self.first = time.perf_counter()
        self.seen += 1


async def _lines() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def answer(client: Client, reader: asyncio.StreamReader, mirror: Mirror | None, queue: TimedQueue | None) -> None:
    """Answer what standard input asks, until it ends."""
    counted = client.seen
    while line := (await reader.readline()).decode().split():
        if line[0] == "expect":
            counted += int(line[1])
            client.first, cpu = 0.0, time.process_time()
            written = None if mirror is None else mirror.writer
            wanted = counted
            while client.seen < wanted or (written is not None and written.events_written < wanted):  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            figures: dict[str, Any] = {
                "seconds": time.perf_counter() - client.first,
                "cpu": time.process_time() - cpu,
                "memory": memory("VmRSS"),
            }
        elif line[0] == "time" and queue is not None:
            figures = {"took": queue.taken()}
        else:
            figures = {"memory": memory("VmRSS"), "peak": peak(), "seen": client.seen}
            if queue is not None and mirror is not None:
                figures |= {"waiting": len(queue), "rows": len(mirror.writer.buffer)}
                figures |= {"written": mirror.writer.events_written, "dropped": mirror.writer.rows_dropped}
        print(json.dumps(figures), flush=True)


async def run(way: str, gateway: str, token: str, dsn: str | None, mode: Any, directory: Path) -> None:
    """Connect, say so, and answer."""
    DiscordWebSocket.DEFAULT_GATEWAY = yarl.URL(gateway)
    client = Client()
    reader = await _lines()
    mirror = queue = None
    if way == "mirror":
        assert dsn is not None
        database = Pool(parse_url(dsn, source="benchmark"))
        await database.connect()
        fence = await seize(database, lease.holder())
        queue = TimedQueue(await Journal.open(directory, fence.holder, max_bytes=2**30), spool=mode, max_rows=15_000)
        mirror = Mirror(
            database,
            DiscordSource(client),
            fence,
            queue,
            shards=1,
            flush_policy=FlushPolicy(),
            reconcile_policy=ReconcilePolicy(page_timeout=30, cooldown=0),
        )
        install(client, mirror)
    async with client, asyncio.timeout(CLIENT_SECONDS):
        if mirror is not None:
            mirror.start()
        await client.login(token)
        running = asyncio.create_task(client.connect(reconnect=True))
        await client.wait_until_ready()
        while mirror is not None and not (mirror.is_ready()[0] and mirror.writer.is_idle):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        if way != "default":
            freeze_heap()
        print("ready", flush=True)
        await answer(client, reader, mirror, queue)
        await client.close()
        running.cancel()
        if mirror is not None:
            await mirror.stop(10)


def main() -> None:
    """Run the way that the arguments name."""
    way, api, gateway, token, *rest = sys.argv[1:]
    stamina.instrumentation.set_on_retry_hooks([])  # it would write to standard output
    Route.BASE = api
    dsn, mode = rest or (None, None)
    with tempfile.TemporaryDirectory(prefix="guildbook-live-") as directory:
        asyncio.run(run(way, gateway, token, dsn, mode, Path(directory)))


if __name__ == "__main__":
    main()
