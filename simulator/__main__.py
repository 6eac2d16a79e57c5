"""`python -m simulator`: serves a seeded world until SIGTERM and prints its addresses as one line of JSON."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import signal
import threading
import time

from .control import Control
from .limits import Limits
from .server import Simulator
from .world import World


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m simulator", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--guild", type=int, action="append", default=[], metavar="MEMBERS", help="a guild; repeatable")
    parser.add_argument(
        "--guilds", action="append", default=[], metavar="COUNTxMEMBERS", help="many guilds; repeatable"
    )
    parser.add_argument("--shared-users", type=float, default=0.1, help="share of members also in other guilds")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="default: a free port")
    parser.add_argument("--token", default="simulated.token.for-tests")
    parser.add_argument("--no-limits", action="store_true", help="disable rate limits")
    parser.add_argument("--pages-per-second", type=float, help="rate of member pages on the gateway")
    parser.add_argument("--rest-latency", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--heartbeat-interval", type=float, default=41.25, metavar="SECONDS")
    parser.add_argument("--present", action="store_true", help="use this machine's clock")
    parser.add_argument(
        "--clock-offset", type=float, default=0.0, metavar="SECONDS", help="offset of the clock with --present"
    )
    parser.add_argument("--until-stdin-closes", action="store_true", help="also stop when standard input closes")
    return parser.parse_args(arguments)


def build_world(options: argparse.Namespace) -> World:
    """Create the world that the command line describes."""
    offset = int(options.clock_offset * 1e6)
    world = World(seed=options.seed, clock=(lambda: time.time_ns() // 1000 + offset) if options.present else None)
    sizes = list(options.guild)
    for many in options.guilds:
        count, _, members = many.partition("x")
        if not (count.isdigit() and members.isdigit()):
            raise SystemExit(f"--guilds takes COUNTxMEMBERS, for example 1000x200, not {many!r}")
        sizes += [int(members)] * int(count)
    for members in sizes or [300]:
        world.add_guild(members=members, shared_users=options.shared_users)
    return world


async def serve(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    pace, latency = options.pages_per_second, options.rest_latency
    limits = Limits(rest_latency=latency, pages_per_second=pace)
    if options.no_limits:
        limits = Limits.none(rest_latency=latency, pages_per_second=pace)
    simulator = Simulator(
        build_world(options),
        port=options.port,
        host=options.host,
        token=options.token,
        limits=limits,
        heartbeat_interval=options.heartbeat_interval,
    )
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    if options.until_stdin_closes:
        threading.Thread(target=_watch_stdin, args=(loop, stopped), daemon=True).start()
    await simulator.start(*Control(simulator).routes())
    # The world is large and long-lived; repeated garbage collection of it would stall the sockets.
    gc.collect()
    gc.freeze()
    addresses = {"api_base": simulator.api_base, "gateway_url": simulator.gateway_url, "token": simulator.token}
    print(json.dumps({**addresses, "control": f"{simulator.base_url}/control"}), flush=True)
    await stopped.wait()
    await simulator.stop()


def _watch_stdin(loop: asyncio.AbstractEventLoop, stopped: asyncio.Event) -> None:
    # Not sys.stdin: a waiting daemon thread would hold its lock and abort the interpreter at exit.
    while os.read(0, 4096):
        pass
    if not loop.is_closed():
        loop.call_soon_threadsafe(stopped.set)


if __name__ == "__main__":
    asyncio.run(serve(parse_arguments()))
