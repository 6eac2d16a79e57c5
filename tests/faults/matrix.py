"""The faults: each breaks something while events come, mends it, and leaves a bot that hears."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg

from tests.faults.bot import PATIENCE
from tests.faults.rig import Rig

#: Breaks and mends; the second figure is how many seconds the breakage lasts.
Fault = Callable[[Rig, float], Awaitable[None]]

#: A time that is wrong by five minutes, for every module of the process that asks for it.
SKEWED = """
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


async def kill_the_bot(rig: Rig, seconds: float) -> None:
    """SIGKILL; it is started again at once, as a supervisor does."""
    await asyncio.sleep(seconds)
    rig.fell_silent()
    await rig.bot.kill()
    await rig.keep_what_is_on_disk()
    await rig.start(rig.bot)


async def kill_the_bot_again_and_again(rig: Rig, seconds: float) -> None:
    """SIGKILL at random moments, start-up included."""
    chance = random.Random(rig.seed)
    for _ in range(4):
        rig.fell_silent()
        await rig.bot.kill()
        await rig.keep_what_is_on_disk()
        await rig.bot.start()
        await asyncio.sleep(chance.uniform(0.1, seconds))
    await rig.bot.until_ready()
    await rig.hears()


async def kill_postgres(rig: Rig, seconds: float) -> None:
    """SIGKILL of the server."""
    await rig.kill_postgres()
    await asyncio.sleep(seconds)
    await rig.start_postgres()


async def stop_postgres(rig: Rig, seconds: float) -> None:
    """The server is shut down, and started again later."""
    await rig.stop_postgres()
    await asyncio.sleep(seconds)
    await rig.start_postgres()


async def stop_the_bot(rig: Rig, seconds: float) -> None:
    """SIGSTOP, for longer than its lease lasts, with nobody to take over."""
    rig.bot.send(signal.SIGSTOP)
    await asyncio.sleep(seconds)
    rig.bot.send(signal.SIGCONT)


async def stop_the_bot_beside_another(rig: Rig, seconds: float) -> None:
    """SIGSTOP of the one that acts: the other takes over, and the first one stands by when it wakes."""
    other = rig.new_bot()
    await other.start()
    await other.until_state("standby")
    rig.fell_silent()
    rig.bot.send(signal.SIGSTOP)
    await rig.taken_over_by(other)
    await asyncio.sleep(seconds)
    rig.bot.send(signal.SIGCONT)
    await rig.bot.until_state("standby")
    await _leave_to(rig)


async def kill_the_one_that_acts(rig: Rig, seconds: float) -> None:
    """Two processes on one token: the one that acts is killed."""
    other = rig.new_bot()
    await other.start()
    await other.until_state("standby")
    await asyncio.sleep(seconds)
    rig.fell_silent()
    await rig.bot.kill()
    await asyncio.gather(rig.keep_what_is_on_disk(), rig.taken_over_by(other))
    rig.bots.pop(0)


async def cut_off_the_one_that_acts(rig: Rig, seconds: float) -> None:
    """Two processes on one token: the one that acts loses the database, not Discord; both hear the same for a time."""
    other = rig.new_bot()
    await other.start()
    await other.until_state("standby")
    network = rig.bot.network
    network.cut()
    await rig.taken_over_by(other)
    await asyncio.sleep(seconds)
    network.heal()
    await rig.bot.until_state("standby")
    await _leave_to(rig)


async def _leave_to(rig: Rig) -> None:
    """End the first bot, which stands by; the second one is left."""
    former = rig.bots.pop(0)
    former.send(signal.SIGTERM)
    assert await former.ended() == 0, former.last_words()


def network(name: str, how: str) -> Fault:
    """Return the fault of a network that is cut, frozen, or frozen and then reset."""

    async def fault(rig: Rig, seconds: float) -> None:
        proxy = rig.bot.network if name == "database" else rig.proxies[name]
        (proxy.cut if how == "cut" else proxy.freeze)()
        await asyncio.sleep(seconds)
        if how == "half-open":
            proxy.reset_all()
        proxy.heal()

    return fault


async def slow_database(rig: Rig, seconds: float) -> None:
    """200 ms between the bot and the database, each way."""
    rig.bot.network.latency = 0.2
    await asyncio.sleep(seconds)
    rig.bot.network.latency = 0.0


async def no_connection_left(rig: Rig, seconds: float) -> None:
    """Others take every connection that the server has, and the bot's are ended."""
    taken: list[asyncpg.Connection[asyncpg.Record]] = []
    kwargs = rig.server.target().connect_kwargs()
    own = await asyncpg.connect(**kwargs)
    try:
        while True:
            taken.append(await asyncpg.connect(**kwargs, timeout=10))
    except asyncpg.TooManyConnectionsError:
        pass
    try:
        ours = [own.get_server_pid(), *(connection.get_server_pid() for connection in taken)]
        async with asyncio.timeout(max(seconds, 0.1) + PATIENCE):
            ends_at = asyncio.get_running_loop().time() + seconds
            while asyncio.get_running_loop().time() < ends_at:
                await own.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = current_user"
                    " AND backend_type = 'client backend' AND pid <> ALL($1)", ours,
                )  # fmt: skip
                with contextlib.suppress(asyncpg.TooManyConnectionsError):
                    taken.append(await asyncpg.connect(**kwargs, timeout=10))
                    ours.append(taken[-1].get_server_pid())
    finally:
        for connection in (own, *taken):
            connection.terminate()
    await rig.connect()


async def locked_tables(rig: Rig, seconds: float) -> None:
    """Somebody else holds the tables."""
    connection = await asyncpg.connect(**rig.server.target().connect_kwargs())
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE member_stats, members IN SHARE MODE")
            await asyncio.sleep(seconds)
    finally:
        await connection.close()


async def full_disk(rig: Rig, seconds: float) -> None:
    """No file of the bot's may grow; then the database is stopped as well."""
    limits = resource.prlimit(rig.bot.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(rig.bot.pid, resource.RLIMIT_FSIZE, (1, limits[1]))
    await asyncio.sleep(seconds / 2)
    await rig.stop_postgres()
    await asyncio.sleep(seconds / 2)
    await rig.start_postgres()
    resource.prlimit(rig.bot.pid, resource.RLIMIT_FSIZE, limits)


async def wrong_clock(rig: Rig, seconds: float) -> None:
    """The next process's host is five minutes ahead, and the one after it is right again."""
    place = Path(rig.directory) / "skewed"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(SKEWED)
    for settings in ({"PYTHONPATH": str(place)}, {}):
        other = rig.new_bot(**settings)
        await other.start()
        await other.until_state("standby")
        rig.fell_silent()
        rig.bot.send(signal.SIGTERM)
        assert await rig.bot.ended() == 0, rig.bot.last_words()
        await other.until_ready()
        await rig.hears()
        rig.bots.pop(0)
        await asyncio.sleep(seconds)


#: By name; the seconds of the short form are those of the tests, those of the long one of the soak.
FAULTS: dict[str, tuple[Fault, float, float]] = {
    "kill -9 of the bot": (kill_the_bot, 1.0, 3.0),
    "kill -9 of the bot at random moments": (kill_the_bot_again_and_again, 2.5, 2.5),
    "kill -9 of PostgreSQL": (kill_postgres, 1.0, 3.0),
    "PostgreSQL stopped": (stop_postgres, 4.0, 60.0),
    "bot stopped, nobody stands by": (stop_the_bot, 4.0, 15.0),
    "bot stopped, another stands by": (stop_the_bot_beside_another, 1.0, 5.0),
    "two processes, the one that acts is killed": (kill_the_one_that_acts, 1.0, 3.0),
    "two processes, the one that acts is cut off": (cut_off_the_one_that_acts, 1.0, 10.0),
    "network to the database cut": (network("database", "cut"), 3.0, 15.0),
    "network to the database silent": (network("database", "silent"), 4.0, 15.0),
    "connections to the database half-open": (network("database", "half-open"), 4.0, 15.0),
    "200 ms to the database": (slow_database, 3.0, 15.0),
    "network to Discord cut": (network("discord", "cut"), 2.0, 10.0),
    "network to Discord silent": (network("discord", "silent"), 3.0, 10.0),
    "no connection left": (no_connection_left, 3.0, 10.0),
    "tables locked": (locked_tables, 3.0, 10.0),
    "disk full under the spool": (full_disk, 4.0, 10.0),
    "clocks five minutes apart": (wrong_clock, 0.5, 2.0),
}
