"""A bot, a Discord and a PostgreSQL, with a network in between that can be broken, and 500 events a second."""

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
from tests.faults.books import Books
from tests.faults.bot import PATIENCE, Bot
from utils.bot.client import SPOOL_DIRECTORY
from utils.database import ConnectTarget, Pool
from utils.database.embedded import PORT, EmbeddedServer
from utils.exceptions import DatabaseError
from utils.mirror.records.events import Message
from utils.mirror.spool.journal import list_journals
from utils.mirror.spool.queue import decode_records
from utils.mirror.spool.segments import Segments
from utils.operations import migrations

RATE = 500.0
#: One guild of several pages, one of one page, and small ones.
GUILDS = ("--guild", "2300", "--guild", "300", "--guild", "60", "--guild", "12")
#: Seconds between two looks at the books.
LOOK_SECONDS = 0.1
#: Seconds that an event may be on its way to the bot's journal: milliseconds, on a machine that does nothing else.
HEARING_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Look:
    """How far things had come at one moment, by the event loop's clock."""

    at: float
    messages: int
    moves: int


class Rig:
    """Everything that runs; `bots` are those that were started and have not been given up."""

    def __init__(self, directory: Path, server: EmbeddedServer, simulator: SimulatorProcess, seed: int) -> None:
        self.directory = directory
        self.server = server
        self.simulator = simulator
        self.seed = seed
        self.books = Books()
        self.looks: list[Look] = []
        self.bots: list[Bot] = []
        self.proxies: dict[str, Proxy] = {}
        self.database: Pool
        #: From where on nobody hears; None while a bot does.
        self.silent_since: Look | None = Look(0.0, 0, 0)
        #: Seconds from the end of the one that acted to the moment in which another one acts.
        self.takeovers: list[float] = []
        self._number = 0
        self._starts = 0

    # --- bots

    def new_bot(self, *, data: str = "data", **settings: str) -> Bot:
        """Make another bot, with another network to the database than that of the one that acts."""
        self._number += 1
        discord, gateway = self.proxies["discord"], urlsplit(self.simulator.gateway_url)
        api = urlsplit(self.simulator.api_base)
        taken = self.bots[0].network if self.bots else None
        network = next(self.proxies[name] for name in ("one", "other") if self.proxies[name] is not taken)
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
        """The bot that acts, or should."""
        return self.bots[0]

    async def start(self, bot: Bot) -> None:
        """Start a bot, and wait until it is ready."""
        await bot.start()
        await bot.until_ready()
        await self.hears()

    async def taken_over_by(self, bot: Bot) -> None:
        """Wait until a bot that stood by acts, and then until it is ready; the one that acted has just ended."""
        begun = asyncio.get_running_loop().time()
        await bot.until_state("active")
        self.takeovers.append(asyncio.get_running_loop().time() - begun)
        await bot.until_ready()
        await self.hears()

    # --- traffic and what was told

    async def begin(self) -> None:
        """Let things happen."""
        self._starts += 1
        await self.simulator.call("traffic.start", RATE, self.seed * 1_000 + self._starts)

    async def pause(self) -> None:
        """Let nothing happen."""
        await self.simulator.call("traffic.stop")

    async def look(self) -> Look:
        """Note how far things have come."""
        at = asyncio.get_running_loop().time()
        self.looks.append(Look(at, *await self.simulator.call("world.ledger.sizes")))
        return self.looks[-1]

    async def keep_looking(self) -> None:
        """Look again and again."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    def fell_silent(self) -> None:
        """Note that from now on nobody hears; what was told in the last second may not have been taken in."""
        if self.silent_since is None:
            latest = asyncio.get_running_loop().time() - HEARING_SECONDS
            self.silent_since = next((look for look in reversed(self.looks) if look.at <= latest), self.looks[0])

    async def hears(self) -> None:
        """Note that a bot hears again."""
        since, self.silent_since = self.silent_since, None
        if since is not None:
            now = await self.look()
            self.books.unheard.append((since.messages, now.messages))
            self.books.unheard_moves.append((since.moves, now.moves))

    async def keep_what_is_on_disk(self) -> int:
        """Note which messages the journals hold: these are not to be missing; return how many."""

        def read() -> set[int]:
            kept: set[int] = set()
            for path in list_journals(self.directory / "data" / SPOOL_DIRECTORY):
                records = Segments.scan(path).read(0, 10_000_000)
                kept.update(event.id for event in decode_records(records).events if isinstance(event, Message))
            return kept

        kept = await asyncio.to_thread(read)
        self.books.kept |= kept
        return len(kept)

    # --- PostgreSQL

    @property
    def postmaster(self) -> int:
        """The process id of the server."""
        return int((self.server.cluster / "postmaster.pid").read_text().split()[0])

    async def kill_postgres(self) -> None:
        """SIGKILL the server, as the kernel does when memory runs out."""
        os.kill(self.postmaster, signal.SIGKILL)

    async def stop_postgres(self) -> None:
        """Stop the server."""
        await self.server.stop(force=True)

    async def start_postgres(self) -> None:
        """Start the server again, on the same socket."""
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    await self.server.start()
                    break
                except DatabaseError:  # processes of the killed one still hold its memory
                    await asyncio.sleep(0.2)
        await self.connect()

    async def connect(self) -> None:
        """Connect for ourselves, past the network that can be broken."""
        with contextlib.suppress(AttributeError):
            await self.database.close(timeout=1)
        self.database = Pool(self.server.target(), pool_max=2, connect_timeout=PATIENCE)
        await self.database.connect()

    # --- the verdict

    async def verdict(self, seconds: float = PATIENCE) -> list[str]:
        """Let everything come to rest, compare, and return what is still wrong after so many seconds."""
        await self.pause()
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            # Comparing holds this process, and with it the networks: not before the bot has nothing left to do.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self._until_at_rest()
            try:
                wrong = await self.books.check(self.database, self.simulator)
            except DatabaseError as error:
                wrong = [f"the database does not answer: {error}"]
            if not wrong or asyncio.get_running_loop().time() > deadline:
                return wrong
            await asyncio.sleep(1.0)

    async def _until_at_rest(self) -> None:
        """Wait until the bot that acts has heard all and written all."""
        while True:
            status, told = await self.bot.get("/readyz")
            if status == 200 and not told["rows_waiting"] and not told["events_waiting"]:
                return
            await asyncio.sleep(0.1)

    def last_words(self) -> str:
        """Return the end of the bots' logs."""
        return "\n".join(f"--- {bot.name}\n{bot.last_words()}" for bot in self.bots if bot.log.exists())


def socket_of(target: ConnectTarget) -> str:
    """Return the path of a server's unix socket."""
    return f"{target.hosts[0]}/.s.PGSQL.{PORT}"


@contextlib.asynccontextmanager
async def rigged(directory: Path, seed: int) -> AsyncIterator[Rig]:
    """Set everything up but the bots; end what was started, by its id."""
    server = EmbeddedServer(directory / "server")
    await server.start()
    try:
        await migrations.upgrade(server.target())
        async with SimulatorProcess("--seed", str(seed), "--present", "--no-limits", *GUILDS) as simulator:
            rig = Rig(directory, server, simulator, seed)
            port = urlsplit(simulator.api_base).port
            assert port is not None
            async with (
                Proxy(("127.0.0.1", port)) as discord,
                Proxy(socket_of(server.target())) as one,
                Proxy(socket_of(server.target())) as other,
            ):
                rig.proxies = {"discord": discord, "one": one, "other": other}
                await rig.connect()
                looking = asyncio.create_task(rig.keep_looking())
                try:
                    yield rig
                finally:
                    looking.cancel()
                    for bot in rig.bots:
                        await bot.kill()
                    await rig.database.close(timeout=1)
    finally:
        await server.stop(force=True)
