"""`python -m simulator.throughput`: measures how fast the simulator sends member pages with zlib and zstd.

The reader is another process that discards the frames.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time

import aiohttp

from .limits import Limits
from .server import Simulator
from .state import Intent
from .world import World

_TIMEOUT_S = 120.0
# HELLO, READY, and GUILD_CREATE of the one guild come before the pages.
_FRAMES_BEFORE = 3


async def read(url: str, token: str, guild_id: int, pages: int) -> float:
    """Connect, request a guild's members, and return the seconds until the last page."""
    async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as ws:
        intents = int(Intent.GUILDS | Intent.GUILD_MEMBERS)
        await ws.send_json({"op": 2, "d": {"token": token, "intents": intents, "properties": {}}})
        for _ in range(_FRAMES_BEFORE):
            await ws.receive()
        started = time.perf_counter()
        await ws.send_json({"op": 8, "d": {"guild_id": str(guild_id), "query": "", "limit": 0}})
        for _ in range(pages):
            frame = await ws.receive()
            if frame.type not in (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.TEXT):
                raise RuntimeError(f"the gateway closed with {ws.close_code}")
        return time.perf_counter() - started


async def measure(members: int, rounds: int) -> dict[str, list[float]]:
    """Measure members per second for each transport, alternating between them."""
    world = World(seed=1)
    guild_id = world.add_guild(members=members)
    pages = -(-members // Limits().members_per_page)
    rates: dict[str, list[float]] = {"zlib-stream": [], "zstd-stream": []}
    async with Simulator(world, limits=Limits.none()) as simulator:
        for _ in range(rounds):
            for compress, found in rates.items():
                url = f"{simulator.gateway_url}?v=10&encoding=json&compress={compress}"
                command = [sys.executable, "-m", "simulator.throughput", "--read"]
                arguments = json.dumps([url, simulator.token, guild_id, pages])
                reader = await asyncio.create_subprocess_exec(*command, arguments, stdout=asyncio.subprocess.PIPE)
                output, _ = await asyncio.wait_for(reader.communicate(), _TIMEOUT_S)
                found.append(members / float(output))
    return rates


def main() -> None:
    """Run the measurement, or the reader with --read."""
    parser = argparse.ArgumentParser(prog="python -m simulator.throughput", description=__doc__)
    parser.add_argument("--members", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(asyncio.run(read(*json.loads(options.read))))
        return
    for compress, found in asyncio.run(measure(options.members, options.rounds)).items():
        each = ", ".join(f"{rate:,.0f}" for rate in found)
        print(f"{compress}: {statistics.median(found):,.0f} members/s (median of {each})")


if __name__ == "__main__":
    main()
