"""Faults: each breaks something while events are sent, repairs it, and leaves a connected bot behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import asyncpg

from tests.faults.bot import TIMEOUT
from tests.faults.rig import Rig

#: Injects a fault into a rig for a number of seconds, and repairs it.
Inject = Callable[[Rig, float], Awaitable[None]]

#: A sitecustomize module that sets the clock of a process five minutes ahead.
SKEWED_CLOCK = """
import datetime, time
_time, _time_ns, _datetime = time.time, time.time_ns, datetime.datetime

class datetime_skewed(_datetime):
    @classmethod
    def now(cls, tz=None):
        return _datetime.now(tz) + datetime.timedelta(minutes=5)

    @classmethod
    def utcnow(cls):
        return _datetime.utcnow() + datetime.timedelta(minutes=5)

time.time = lambda: _time() + 300
time.time_ns = lambda: _time_ns() + 300 * 10**9
datetime.datetime = datetime_skewed
"""


async def kill_bot(rig: Rig, seconds: float) -> None:
    """Send SIGKILL to the bot and restart it, as a supervisor does."""
    await asyncio.sleep(seconds)
    rig.mark_offline()
    await rig.bot.kill()
    await rig.record_journaled_messages()
    await rig.start(rig.bot)


async def kill_bot_repeatedly(rig: Rig, seconds: float) -> None:
    """Send SIGKILL to the bot at random times, also during its start."""
    rng = random.Random(rig.seed)
    for _ in range(4):
        rig.mark_offline()
        await rig.bot.kill()
        await rig.record_journaled_messages()
        await rig.bot.start()
        await asyncio.sleep(rng.uniform(0.1, seconds))
    await rig.bot.wait_until_ready()
    await rig.mark_online()


async def kill_postgres(rig: Rig, seconds: float) -> None:
    """Send SIGKILL to PostgreSQL."""
    await rig.kill_postgres()
    await asyncio.sleep(seconds)
    await rig.start_postgres()


async def stop_postgres(rig: Rig, seconds: float) -> None:
    """Shut PostgreSQL down, and start it later."""
    await rig.stop_postgres()
    await asyncio.sleep(seconds)
    await rig.start_postgres()


async def suspend_bot(rig: Rig, seconds: float) -> None:
    """Suspend the only bot for longer than its lease lasts."""
    rig.bot.send(signal.SIGSTOP)
    await asyncio.sleep(seconds)
    rig.bot.send(signal.SIGCONT)


async def suspend_active_bot(rig: Rig, seconds: float) -> None:
    """Suspend the active one of two bots: the other takes over, and the first stands by once resumed."""
    other = rig.new_bot()
    await other.start()
    await other.wait_for_state("standby")
    rig.mark_offline()
    rig.bot.send(signal.SIGSTOP)
    await rig.wait_for_takeover(other)
    await asyncio.sleep(seconds)
    rig.bot.send(signal.SIGCONT)
    await rig.bot.wait_for_state("standby")
    await _retire_first_bot(rig)


async def kill_active_bot(rig: Rig, seconds: float) -> None:
    """Kill the active one of two bots."""
    other = rig.new_bot()
    await other.start()
    await other.wait_for_state("standby")
    await asyncio.sleep(seconds)
    rig.mark_offline()
    await rig.bot.kill()
    await asyncio.gather(rig.record_journaled_messages(), rig.wait_for_takeover(other))
    rig.bots.pop(0)


async def isolate_active_bot(rig: Rig, seconds: float) -> None:
    """Cut the active one of two bots off from the database but not from Discord: for a time both receive events."""
    other = rig.new_bot()
    await other.start()
    await other.wait_for_state("standby")
    network = rig.bot.network
    network.cut()
    await rig.wait_for_takeover(other)
    await asyncio.sleep(seconds)
    network.heal()
    await rig.bot.wait_for_state("standby")
    await _retire_first_bot(rig)


async def _retire_first_bot(rig: Rig) -> None:
    """Stop the first bot, which stands by."""
    former = rig.bots.pop(0)
    former.send(signal.SIGTERM)
    assert await former.wait_for_exit() == 0, former.log_tail()


def interrupt_network(name: str, how: str) -> Inject:
    """Return a fault that cuts a proxy, freezes it, or freezes it and then resets its connections ("half-open")."""

    async def inject(rig: Rig, seconds: float) -> None:
        proxy = rig.bot.network if name == "database" else rig.proxies[name]
        (proxy.cut if how == "cut" else proxy.freeze)()
        await asyncio.sleep(seconds)
        if how == "half-open":
            proxy.reset_all()
        proxy.heal()

    return inject


async def delay_database(rig: Rig, seconds: float) -> None:
    """Delay everything between the bot and the database by 200 ms in each direction."""
    rig.bot.network.latency = 0.2
    await asyncio.sleep(seconds)
    rig.bot.network.latency = 0.0


async def exhaust_connections(rig: Rig, seconds: float) -> None:
    """Take every connection of the server, and terminate the bot's."""
    taken: list[asyncpg.Connection[asyncpg.Record]] = []
    kwargs = rig.server.target().connect_kwargs()
    own = await asyncpg.connect(**kwargs)
    try:
        while True:
            taken.append(await asyncpg.connect(**kwargs, timeout=10))
    except asyncpg.TooManyConnectionsError:
        pass
    try:
        pids = [own.get_server_pid(), *(connection.get_server_pid() for connection in taken)]
        async with asyncio.timeout(max(seconds, 0.1) + TIMEOUT):
            ends_at = asyncio.get_running_loop().time() + seconds
            while asyncio.get_running_loop().time() < ends_at:
                await own.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = current_user"
                    " AND backend_type = 'client backend' AND pid <> ALL($1)", pids,
                )  # fmt: skip
                with contextlib.suppress(asyncpg.TooManyConnectionsError):
                    taken.append(await asyncpg.connect(**kwargs, timeout=10))
                    pids.append(taken[-1].get_server_pid())
    finally:
        for connection in (own, *taken):
            connection.terminate()
    await rig.connect()


async def lock_tables(rig: Rig, seconds: float) -> None:
    """Lock tables that the bot writes to."""
    connection = await asyncpg.connect(**rig.server.target().connect_kwargs())
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE member_stats, members IN SHARE MODE")
            await asyncio.sleep(seconds)
    finally:
        await connection.close()


async def fill_disk(rig: Rig, seconds: float) -> None:
    """Prevent the bot's files from growing, and then stop the database as well."""
    limits = resource.prlimit(rig.bot.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(rig.bot.pid, resource.RLIMIT_FSIZE, (1, limits[1]))
    await asyncio.sleep(seconds / 2)
    await rig.stop_postgres()
    await asyncio.sleep(seconds / 2)
    await rig.start_postgres()
    resource.prlimit(rig.bot.pid, resource.RLIMIT_FSIZE, limits)


async def skew_clock(rig: Rig, seconds: float) -> None:
    """Replace the bot by one whose clock is five minutes ahead, and that one by one with the right time."""
    directory = Path(rig.directory) / "skewed"
    directory.mkdir(exist_ok=True)
    (directory / "sitecustomize.py").write_text(SKEWED_CLOCK)
    for settings in ({"PYTHONPATH": str(directory)}, {}):
        other = rig.new_bot(**settings)
        await other.start()
        await other.wait_for_state("standby")
        rig.mark_offline()
        rig.bot.send(signal.SIGTERM)
        assert await rig.bot.wait_for_exit() == 0, rig.bot.log_tail()
        await other.wait_until_ready()
        await rig.mark_online()
        rig.bots.pop(0)
        await asyncio.sleep(seconds)


class Fault(NamedTuple):
    """How to inject a fault, and for how many seconds in the tests and in the soak."""

    inject: Inject
    short: float
    long: float


#: By name.
FAULTS: dict[str, Fault] = {
    "kill -9 of the bot": Fault(kill_bot, 1.0, 3.0),
    "kill -9 of the bot at random times": Fault(kill_bot_repeatedly, 2.5, 2.5),
    "kill -9 of PostgreSQL": Fault(kill_postgres, 1.0, 3.0),
    "PostgreSQL stopped": Fault(stop_postgres, 4.0, 60.0),
    "only bot suspended": Fault(suspend_bot, 4.0, 15.0),
    "active bot suspended, standby takes over": Fault(suspend_active_bot, 1.0, 5.0),
    "active bot killed, standby takes over": Fault(kill_active_bot, 1.0, 3.0),
    "active bot cut off from the database, standby takes over": Fault(isolate_active_bot, 1.0, 10.0),
    "network to the database cut": Fault(interrupt_network("database", "cut"), 3.0, 15.0),
    "network to the database frozen": Fault(interrupt_network("database", "silent"), 4.0, 15.0),
    "connections to the database half-open": Fault(interrupt_network("database", "half-open"), 4.0, 15.0),
    "200 ms to the database": Fault(delay_database, 3.0, 15.0),
    "network to Discord cut": Fault(interrupt_network("discord", "cut"), 2.0, 10.0),
    "network to Discord frozen": Fault(interrupt_network("discord", "silent"), 3.0, 10.0),
    "connections exhausted": Fault(exhaust_connections, 3.0, 10.0),
    "tables locked": Fault(lock_tables, 3.0, 10.0),
    "disk full under the spool": Fault(fill_disk, 4.0, 10.0),
    "clocks five minutes apart": Fault(skew_clock, 0.5, 2.0),
}
