"""The demo, scene by scene."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from simulator import Limits, Simulator, World
from utils.database import Pool
from utils.demo import show
from utils.demo.child import ENTRY, Bot, Place
from utils.demo.proof import TABLES, Proof, compare
from utils.demo.story import Story
from utils.exceptions import DatabaseError, GuildbookError

GUILDS = (("Guildbook Plaza", 25_000), ("Tea House", 300), ("Chess Club", 40))
EVENTS = 240
#: Seconds over which they are spread.
EVENT_SECONDS = 4.0
#: Pages of members a second: slow enough to watch.
PAGES_A_SECOND = 12.0
READY_SECONDS = 120.0
EQUAL_SECONDS = 30.0
#: Seconds between two looks at the bot.
LOOK_SECONDS = 0.1
#: Seconds between two events of the trickle.
TRICKLE_SECONDS = 0.5


def run(data_dir: Path, *, keep: bool = False) -> int:
    """Run the demo and return its exit code: 0 when every row was right and the bot ended well.

    Raises `GuildbookError` when it could not be shown.
    """
    logging.basicConfig(level=logging.ERROR)  # what the bot says is in its own log
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    place = Place(data_dir)
    with place.claimed():
        return asyncio.run(_with_signals(Demo(place, console).play(keep=keep), keep=keep))


async def _with_signals(play: Any, *, keep: bool) -> int:
    """Let SIGINT and SIGTERM end the play with all that belongs to it; that is how `--keep` is meant to end."""
    task: asyncio.Task[int] = asyncio.create_task(play)
    signalled: list[int] = []

    def end(number: int) -> None:
        signalled.append(number)
        if len(signalled) == 1:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end, number)
    try:
        return await task
    except asyncio.CancelledError:
        return 0 if keep and signalled else 128 + (signalled[0] if signalled else signal.SIGINT)


class Demo:
    """A simulated Discord with a few guilds, the real bot, and what can be seen of both."""

    def __init__(self, place: Place, console: Console) -> None:
        self.place: Place = place
        self.console: Console = console
        self.world: World = World(seed=2)
        self.story: Story = Story(self.world)
        self.bot: Bot = Bot(place)
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        self.console.print(f"[dim]{time.monotonic() - self._started:5.1f} s[/dim]  {text}", soft_wrap=True)

    def _heading(self, text: str) -> None:
        self.console.print(f"\n[bold]{text}[/bold]")

    async def play(self, *, keep: bool) -> int:
        """Play it all and return the exit code."""
        self.console.print("[bold]Guildbook[/bold]: a simulated Discord, an embedded PostgreSQL, and the real bot\n")
        await self.place.emptied()
        for name, members in GUILDS:
            self.world.add_guild(members=members, name=name)
        simulator = Simulator(self.world, limits=Limits(pages_per_second=PAGES_A_SECOND))
        total = sum(members for _, members in GUILDS)
        async with simulator:
            self.say(f"Discord is simulated at {simulator.base_url}: {len(GUILDS)} guilds, {total:,} members")
            try:
                good = await self._show(simulator, keep=keep)
            except BaseException as error:
                await asyncio.shield(self._leave())
                if isinstance(error, asyncio.CancelledError):
                    self._where()
                raise
            code = await asyncio.shield(self._leave())
        self._where()
        if code:
            raise GuildbookError(f"the bot ended with exit code {code}:\n{self.bot.last_words()}")
        return 0 if good else 1

    async def _show(self, simulator: Simulator, *, keep: bool) -> bool:
        await self.bot.start(simulator.api_base, simulator.token)
        self.say(f"the bot was started: python bot.py (its log: {_short(self.place.log)})")
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            db = await self._reach_database(session)
            try:
                await self._watch_sync(session, db)
                await self._live(session)
                proofs = await self._until_equal(db)
                good = not any(proof.differences for proof in proofs)
                self._heading("In the database")
                self.console.print(await show.contents(db))
                self._heading("Some of the history, from the tables changes and user_changes")
                self.console.print(await show.history(db))
                self._heading("The proof, every row against the simulated Discord")
                self.console.print(show.proofs(proofs))
                for proof in proofs:
                    for line in proof.lines():
                        self.console.print(line, style="red", markup=False)
                self.console.print()
                if good and keep:
                    await self._trickle(session)
            finally:
                await db.close()
        return good

    async def _reach_database(self, session: aiohttp.ClientSession) -> Pool:
        """Wait until the bot has its database, and connect to it beside the bot."""
        async with _bounded(READY_SECONDS, "the bot does not answer on its health port", self.bot):
            while "database" not in (await self.bot.readiness(session) or {}):  # noqa: ASYNC110 - another process
                await asyncio.sleep(LOOK_SECONDS)
        await self.place.server.start()  # joins the one that the bot has started
        db = Pool(self.place.server.target(), pool_max=3)
        await db.connect()
        self.say(f"PostgreSQL {db.server_version_num // 10_000} runs, the schema is made")
        return db

    async def _watch_sync(self, session: aiohttp.ClientSession, db: Pool) -> None:
        name, figures = (
            TextColumn("         {task.description:<16}"),
            TextColumn("{task.completed:,} of {task.total:,}"),
        )
        progress = Progress(name, BarColumn(), figures, console=self.console, transient=True)
        with contextlib.ExitStack() as stack:
            if self.console.is_terminal:
                stack.enter_context(progress)
            bars = {
                id: progress.add_task(self.world.guild(id).name, total=len(self.world.guild(id).members))
                for id in self.world.guild_ids()
            }
            async with _bounded(READY_SECONDS, "the guilds were not mirrored", self.bot):
                while True:
                    state = await self.bot.readiness(session) or {}
                    received = {int(id): seen for id, seen in state.get("members_received", {}).items()}
                    rows = await db.fetch("SELECT guild_id, count(*) FROM members GROUP BY guild_id")
                    stored: dict[int, int] = {row[0]: row[1] for row in rows}
                    for id, bar in bars.items():
                        progress.update(bar, completed=max(received.get(id, 0), stored.get(id, 0)))
                    if state.get("ok"):
                        break
                    await asyncio.sleep(LOOK_SECONDS)
        self.say(f"ready: {len(bars)} guilds mirrored, {sum(stored.values()):,} members")

    async def _live(self, session: aiohttp.ClientSession) -> None:
        """Let a minute's worth of life happen."""
        for _ in self.story.minute(EVENTS):
            await asyncio.sleep(EVENT_SECONDS / EVENTS)
        told = ", ".join(f"{kind} {count}" for kind, count in self.story.told.most_common())
        self.say(f"{self.story.told.total()} live events: {told}")
        await self.bot.readiness(session)  # raises when it did not survive them

    async def _until_equal(self, db: Pool) -> list[Proof]:
        """Compare until the last events have been written; what differs by then is wrong."""
        deadline = time.monotonic() + EQUAL_SECONDS
        while True:
            proofs = [await compare(db, table, self.world.expected_rows(table)) for table in TABLES]
            if not any(proof.differences for proof in proofs):
                self.say("the tables equal the simulated Discord")
                return proofs
            if time.monotonic() > deadline:
                self.say(f"[red]the tables still differ after {EQUAL_SECONDS:g} s[/red]")
                return proofs
            await asyncio.sleep(LOOK_SECONDS)

    async def _trickle(self, session: aiohttp.ClientSession) -> None:
        """Go on until somebody has seen enough."""
        self.console.print("The bot keeps running, and something happens twice a second. Look at it from elsewhere:")
        self.console.print(f"  {self.place.server.psql_line()}", soft_wrap=True, markup=False)
        self.console.print("Ctrl-C ends it all.\n")
        with contextlib.ExitStack() as stack:
            status = stack.enter_context(self.console.status("")) if self.console.is_terminal else None
            while True:
                kind = self.story.one()
                await self.bot.readiness(session)
                if status is not None:
                    status.update(f"{self.story.told.total():,} events so far, just now: {kind}")
                await asyncio.sleep(TRICKLE_SECONDS)

    async def _leave(self) -> int:
        code = await self.bot.stop()
        self.say(f"the bot was stopped by SIGTERM: exit code {code}")
        return code

    def _where(self) -> None:
        directory = shlex.quote(_short(self.place.directory))
        python, entry = shlex.quote(_short(Path(sys.executable), follow=False)), shlex.quote(_short(ENTRY))
        self.console.print(f"\nThe data lies in {directory}. Look at it:", soft_wrap=True)
        self.console.print(f"  make psql DATA_DIR={directory}", soft_wrap=True, markup=False)
        self.console.print(f"  {python} {entry} db psql --data-dir {directory}", soft_wrap=True, markup=False)
        with contextlib.suppress(DatabaseError):
            line = self.place.server.psql_line()
            self.console.print("or, while one of these keeps the server running, with any client:", soft_wrap=True)
            self.console.print(f"  {line}", soft_wrap=True, markup=False)


@contextlib.asynccontextmanager
async def _bounded(seconds: float, what: str, bot: Bot) -> Any:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise GuildbookError(f"{what} within {seconds:g} s:\n{bot.last_words()}") from None


def _short(path: Path, *, follow: bool = True) -> str:
    """Return a path as one would type it here."""
    whole = path.resolve() if follow else path.absolute()
    here = Path.cwd().resolve()
    return str(whole.relative_to(here)) if whole.is_relative_to(here) else str(whole)
