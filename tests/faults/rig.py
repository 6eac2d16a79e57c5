"""Test rig: bots, a simulated Discord and a PostgreSQL server, connected by proxies that faults can interrupt."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from simulator.proxy import Proxy
from simulator.remote import SimulatorProcess
from tests.faults.audit import Audit
from tests.faults.bot import TIMEOUT, Bot
from utils.bot.client import SPOOL_DIRECTORY
from utils.database import ConnectTarget, Pool
from utils.database.embedded import PORT, EmbeddedServer
from utils.exceptions import DatabaseError
from utils.mirror.records.events import Message
from utils.mirror.spool.journal import list_journals
from utils.mirror.spool.queue import decode_records
from utils.mirror.spool.segments import Segments
from utils.operations import migrations

#: Events per second, in the soak and in the tests.
RATE, MODERATE_RATE = 500.0, 250.0
#: One guild with several pages of members, one with a single page, and small ones.
GUILDS = ("--guild", "2300", "--guild", "300", "--guild", "60", "--guild", "12")
#: Seconds between two records of the progress.
PROGRESS_SECONDS = 0.1
#: Seconds until the tables must equal the world. Archived threads are read last, a few requests a second, and what no
#: listing shows is requested one by one; a bot is ready before that, and nothing reports how far it is.
VERIFY_SECONDS = 180.0
#: Seconds that an event may take from the simulator to the bot's journal: milliseconds on an idle machine.
DELIVERY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How much the simulator had sent at one time of the event loop's clock."""

    at: float
    messages: int
    moves: int


class Rig:
    """Everything that runs. The first of `bots` is the active one, the others stand by."""

    def __init__(
        self, directory: Path, server: EmbeddedServer, simulator: SimulatorProcess, seed: int, rate: float
    ) -> None:
        self.directory = directory
        self.server = server
        self.simulator = simulator
        self.seed = seed
        self.rate = rate
        self.audit = Audit()
        self.progress: list[Progress] = []
        self.bots: list[Bot] = []
        self.proxies: dict[str, Proxy] = {}
        self.pool: Pool
        #: The progress since which no bot is connected; None while one is.
        self.offline_since: Progress | None = Progress(0.0, 0, 0)
        #: Seconds from the end of an active bot until another one was active.
        self.takeovers: list[float] = []
        self._number = 0
        self._starts = 0

    # --- bots

    def new_bot(self, *, data: str = "data", **settings: str) -> Bot:
        """Create a bot, with a database proxy that the active bot does not use."""
        self._number += 1
        discord, gateway = self.proxies["discord"], urlsplit(self.simulator.gateway_url)
        api = urlsplit(self.simulator.api_base)
        used = self.bots[0].network if self.bots else None
        network = next(self.proxies[name] for name in ("one", "other") if self.proxies[name] is not used)
        bot = Bot(
            f"bot-{self._number}",
            self.directory,
            network,
            DISCORD_TOKEN=self.simulator.token,
            DISCORD_API_BASE=f"http://127.0.0.1:{discord.port}{api.path}",
            DISCORD_GATEWAY_URL=f"ws://127.0.0.1:{discord.port}{gateway.path}",
            DATABASE_URL=f"postgresql://postgres@127.0.0.1:{network.port}/guildbook?sslmode=disable",
            DATA_DIR=str(self.directory / data),
            CHUNK_COOLDOWN_SECONDS="0",
            FLUSH_SECONDS="0.5",
            **{"SPOOL": "always", **settings},
        )
        self.bots.append(bot)
        return bot

    @property
    def bot(self) -> Bot:
        """The active bot."""
        return self.bots[0]

    async def start(self, bot: Bot) -> None:
        """Start a bot and wait until it is ready."""
        await bot.start()
        await bot.wait_until_ready()
        await self.mark_online()

    async def wait_for_takeover(self, bot: Bot) -> None:
        """Wait until a standby is active and ready, after the active bot has ended, and record how long that took."""
        started_at = asyncio.get_running_loop().time()
        await bot.wait_for_state("active")
        self.takeovers.append(asyncio.get_running_loop().time() - started_at)
        await bot.wait_until_ready()
        await self.mark_online()

    # --- traffic

    async def start_traffic(self) -> None:
        """Start sending random events."""
        self._starts += 1
        await self.simulator.call("traffic.start", self.rate, self.seed * 1_000 + self._starts)

    async def stop_traffic(self) -> None:
        """Stop sending events."""
        await self.simulator.call("traffic.stop")

    async def record_progress(self) -> Progress:
        """Record how much the simulator has sent."""
        at = asyncio.get_running_loop().time()
        self.progress.append(Progress(at, *await self.simulator.call("world.ledger.sizes")))
        return self.progress[-1]

    async def record_progress_continuously(self) -> None:
        """Record the progress until cancelled."""
        while True:
            await self.record_progress()
            await asyncio.sleep(PROGRESS_SECONDS)

    def mark_offline(self) -> None:
        """Record that no bot is connected. Events of the last second may not have been received either."""
        if self.offline_since is None:
            latest = asyncio.get_running_loop().time() - DELIVERY_SECONDS
            self.offline_since = next((it for it in reversed(self.progress) if it.at <= latest), self.progress[0])

    async def mark_online(self) -> None:
        """Record that a bot receives events again."""
        since, self.offline_since = self.offline_since, None
        if since is not None:
            now = await self.record_progress()
            self.audit.missed.append((since.messages, now.messages))
            self.audit.missed_moves.append((since.moves, now.moves))

    async def record_journaled_messages(self) -> int:
        """Record which messages are in the journals, and so must not be missing, and return their number."""

        def read() -> set[int]:
            journaled: set[int] = set()
            for path in list_journals(self.directory / "data" / SPOOL_DIRECTORY):
                records = Segments.scan(path).read(0, 10_000_000)
                journaled.update(event.id for event in decode_records(records).events if isinstance(event, Message))
            return journaled

        journaled = await asyncio.to_thread(read)
        self.audit.journaled |= journaled
        return len(journaled)

    # --- PostgreSQL

    @property
    def postmaster(self) -> int:
        """The process id of the PostgreSQL server."""
        return int((self.server.cluster / "postmaster.pid").read_text().split()[0])

    async def kill_postgres(self) -> None:
        """Send SIGKILL to the server, as the kernel does when memory runs out."""
        os.kill(self.postmaster, signal.SIGKILL)

    async def stop_postgres(self) -> None:
        """Stop the server."""
        await self.server.stop(force=True)

    async def start_postgres(self) -> None:
        """Start the server again on the same socket, and connect."""
        async with asyncio.timeout(TIMEOUT):
            while True:
                try:
                    await self.server.start()
                    break
                except DatabaseError:  # backends of a killed server still hold its shared memory
                    await asyncio.sleep(0.2)
        await self.connect()

    async def connect(self) -> None:
        """Connect directly, not through a proxy."""
        with contextlib.suppress(AttributeError):
            await self.pool.close(timeout=1)
        self.pool = Pool(self.server.target(), pool_max=2, connect_timeout=TIMEOUT)
        await self.pool.connect()

    # --- verification

    async def verify(self, seconds: float = VERIFY_SECONDS) -> list[str]:
        """Stop the traffic and compare until nothing differs; return the differences left after `seconds`."""
        await self.stop_traffic()
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            # Comparing blocks this process, and with it the proxies, so let the bot finish first.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self._wait_until_idle()
            try:
                wrong = await self.audit.check(self.pool, self.simulator)
            except DatabaseError as error:
                wrong = [f"the database does not respond: {error}"]
            if not wrong or asyncio.get_running_loop().time() > deadline:
                return wrong
            await asyncio.sleep(1.0)

    async def _wait_until_idle(self) -> None:
        """Wait until the active bot has received and written everything."""
        while True:
            status, readiness = await self.bot.get("/readyz")
            if status == 200 and not readiness["rows_waiting"] and not readiness["events_waiting"]:
                return
            await asyncio.sleep(0.1)

    def log_tail(self) -> str:
        """Return the last lines of each bot's log."""
        return "\n".join(f"--- {bot.name}\n{bot.log_tail()}" for bot in self.bots if bot.log.exists())


def socket_of(target: ConnectTarget) -> str:
    """Return the path of a server's Unix socket."""
    return f"{target.hosts[0]}/.s.PGSQL.{PORT}"


@contextlib.asynccontextmanager
async def running_rig(directory: Path, seed: int, rate: float = RATE) -> AsyncIterator[Rig]:
    """Start everything except bots, and stop it all at the end, bots included."""
    server = EmbeddedServer(directory / "server")
    await server.start()
    try:
        await migrations.upgrade(server.target())
        async with SimulatorProcess("--seed", str(seed), "--present", "--no-limits", *GUILDS) as simulator:
            rig = Rig(directory, server, simulator, seed, rate)
            port = urlsplit(simulator.api_base).port
            assert port is not None
            async with (
                Proxy(("127.0.0.1", port)) as discord,
                Proxy(socket_of(server.target())) as one,
                Proxy(socket_of(server.target())) as other,
            ):
                rig.proxies = {"discord": discord, "one": one, "other": other}
                await rig.connect()
                recording = asyncio.create_task(rig.record_progress_continuously())
                try:
                    yield rig
                finally:
                    recording.cancel()
                    for bot in rig.bots:
                        await bot.kill()
                    await rig.pool.close(timeout=1)
    finally:
        await server.stop(force=True)
