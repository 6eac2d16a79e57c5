"""Runs the demo step by step."""

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
from utils.cli.common import is_terminal
from utils.database import Pool
from utils.demo import display
from utils.demo.bot_process import ENTRY, BotProcess, DataDirectory
from utils.demo.compare import TABLES, Comparison, compare
from utils.demo.scenario import Scenario
from utils.exceptions import DatabaseError, GuildbookError
from utils.operations.action import Outcome

GUILDS = (("Guildbook Plaza", 25_000), ("Tea House", 300), ("Chess Club", 40))
EVENTS = 240
#: Seconds over which the events are spread.
EVENT_SECONDS = 4.0
#: Pages of members per second: slow enough to watch.
PAGES_PER_SECOND = 12.0
READY_SECONDS = 120.0
MATCH_SECONDS = 30.0
#: Seconds between two polls of the bot and the database.
POLL_SECONDS = 0.1
#: Seconds between two events with --keep.
EVENT_INTERVAL_SECONDS = 0.5


def run(data_dir: Path, *, keep: bool = False, reports_on_stderr: bool = False) -> Outcome:
    """Run the demo, and return the number of rows compared and of differences in each table.

    The exit code is 0 if every row matched and the bot exited cleanly. What happens is printed on the way, to standard
    error if `reports_on_stderr`. Raises `GuildbookError` if the demo could not be completed.
    """
    logging.basicConfig(level=logging.ERROR)  # the bot has its own log file
    stream = sys.stderr if reports_on_stderr else sys.stdout
    console = Console(file=stream, highlight=False, width=None if is_terminal(stream) else 110)
    directory = DataDirectory(data_dir)
    with directory.lock():
        return asyncio.run(_with_signals(Demo(directory, console), keep=keep))


async def _with_signals(demo: Demo, *, keep: bool) -> Outcome:
    """Run the demo; cancel it on SIGINT or SIGTERM, which is the normal end with `--keep`."""
    task: asyncio.Task[bool] = asyncio.create_task(demo.run(keep=keep))
    signalled: list[int] = []

    def end(number: int) -> None:
        signalled.append(number)
        if len(signalled) == 1:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end, number)
    try:
        code = 0 if await task else 1
    except asyncio.CancelledError:
        code = 0 if keep and signalled else 128 + (signalled[0] if signalled else signal.SIGINT)
    return Outcome("", demo.data(), ok=code == 0, exit_code=code)


class Demo:
    """Starts a simulated Discord and the bot, shows the mirrored rows, and compares the two."""

    def __init__(self, directory: DataDirectory, console: Console) -> None:
        self.directory: DataDirectory = directory
        self.console: Console = console
        self.world: World = World(seed=2)
        self.scenario: Scenario = Scenario(self.world)
        self.bot: BotProcess = BotProcess(directory)
        #: The last comparison of each table.
        self.comparisons: list[Comparison] = []
        self._started = time.monotonic()

    def data(self) -> dict[str, Any]:
        """Return the results as JSON."""
        tables = {one.table: {"compared": one.compared, "differences": one.differences} for one in self.comparisons}
        seconds = round(time.monotonic() - self._started, 1)
        return {"tables": tables, "seconds": seconds, "data_dir": str(self.directory.path)}

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        self.console.print(f"[dim]{time.monotonic() - self._started:5.1f} s[/dim]  {text}", soft_wrap=True)

    def _heading(self, text: str) -> None:
        self.console.print(f"\n[bold]{text}[/bold]")

    async def run(self, *, keep: bool) -> bool:
        """Run the whole demo and return whether every row matched."""
        self.console.print("[bold]Guildbook[/bold]: a simulated Discord, an embedded PostgreSQL, and the real bot\n")
        await self.directory.clear()
        for name, members in GUILDS:
            self.world.add_guild(members=members, name=name)
        simulator = Simulator(self.world, limits=Limits(pages_per_second=PAGES_PER_SECOND))
        total = sum(members for _, members in GUILDS)
        async with simulator:
            self.say(f"simulated Discord at {simulator.base_url}: {len(GUILDS)} guilds, {total:,} members")
            try:
                matches = await self._demonstrate(simulator, keep=keep)
            except BaseException as error:
                await asyncio.shield(self._stop_bot())
                if isinstance(error, asyncio.CancelledError):
                    self._print_data_directory()
                raise
            code = await asyncio.shield(self._stop_bot())
        self._print_data_directory()
        if code:
            raise GuildbookError(f"the bot exited with code {code}:\n{self.bot.log_tail()}")
        return matches

    async def _demonstrate(self, simulator: Simulator, *, keep: bool) -> bool:
        await self.bot.start(simulator.api_base, simulator.token)
        self.say(f"started the bot: python bot.py (log: {_short(self.directory.log)})")
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            pool = await self._reach_database(session)
            try:
                await self._watch_sync(session, pool)
                await self._live(session)
                self.comparisons = comparisons = await self._compare_until_equal(pool)
                matches = not any(comparison.differences for comparison in comparisons)
                self._heading("In the database")
                self.console.print(await display.contents(pool))
                self._heading("A sample of the history, from the tables changes and user_changes")
                self.console.print(await display.history(pool))
                self._heading("Verification: every row compared with the simulated Discord")
                self.console.print(display.comparisons(comparisons))
                for comparison in comparisons:
                    for line in comparison.lines():
                        self.console.print(line, style="red", markup=False)
                self.console.print()
                if matches and keep:
                    await self._keep_running(session)
            finally:
                await pool.close()
        return matches

    async def _reach_database(self, session: aiohttp.ClientSession) -> Pool:
        """Wait until the bot has started the database and connect to it."""
        async with _time_limit(READY_SECONDS, "the bot did not respond on its health port", self.bot):
            while "database" not in (await self.bot.readiness(session) or {}):  # noqa: ASYNC110 - another process
                await asyncio.sleep(POLL_SECONDS)
        await self.directory.server.start()  # attaches to the server that the bot started
        pool = Pool(self.directory.server.target(), pool_max=3)
        await pool.connect()
        self.say(f"PostgreSQL {pool.server_version_num // 10_000} is running, the schema has been created")
        return pool

    async def _watch_sync(self, session: aiohttp.ClientSession, pool: Pool) -> None:
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
            async with _time_limit(READY_SECONDS, "the guilds were not mirrored", self.bot):
                while True:
                    state = await self.bot.readiness(session) or {}
                    received = {int(id): seen for id, seen in state.get("members_received", {}).items()}
                    rows = await pool.fetch("SELECT guild_id, count(*) FROM members GROUP BY guild_id")
                    stored: dict[int, int] = {row[0]: row[1] for row in rows}
                    for id, bar in bars.items():
                        progress.update(bar, completed=max(received.get(id, 0), stored.get(id, 0)))
                    if state.get("ok"):
                        break
                    await asyncio.sleep(POLL_SECONDS)
        self.say(f"ready: {len(bars)} guilds mirrored, {sum(stored.values()):,} members")

    async def _live(self, session: aiohttp.ClientSession) -> None:
        """Apply the scenario's events."""
        for _ in self.scenario.events(EVENTS):
            await asyncio.sleep(EVENT_SECONDS / EVENTS)
        counts = ", ".join(f"{kind} {count}" for kind, count in self.scenario.counts.most_common())
        self.say(f"{self.scenario.counts.total()} live events: {counts}")
        await self.bot.readiness(session)  # raises if the bot exited

    async def _compare_until_equal(self, pool: Pool) -> list[Comparison]:
        """Compare until the tables match or the time is up, and return the last comparison."""
        deadline = time.monotonic() + MATCH_SECONDS
        while True:
            comparisons = [await compare(pool, table, self.world.expected_rows(table)) for table in TABLES]
            if not any(comparison.differences for comparison in comparisons):
                self.say("the tables match the simulated Discord")
                return comparisons
            if time.monotonic() > deadline:
                self.say(f"[red]the tables still differ after {MATCH_SECONDS:g} s[/red]")
                return comparisons
            await asyncio.sleep(POLL_SECONDS)

    async def _keep_running(self, session: aiohttp.ClientSession) -> None:
        """Apply two events per second until the demo is cancelled."""
        self.console.print("The bot keeps running, with two events per second. To inspect the database meanwhile:")
        self.console.print(f"  {self.directory.server.psql_line()}", soft_wrap=True, markup=False)
        self.console.print("Press Ctrl-C to stop.\n")
        with contextlib.ExitStack() as stack:
            status = stack.enter_context(self.console.status("")) if self.console.is_terminal else None
            while True:
                kind = self.scenario.next_event()
                await self.bot.readiness(session)
                if status is not None:
                    status.update(f"{self.scenario.counts.total():,} events so far, last one: {kind}")
                await asyncio.sleep(EVENT_INTERVAL_SECONDS)

    async def _stop_bot(self) -> int:
        code = await self.bot.stop()
        self.say(f"stopped the bot with SIGTERM: exit code {code}")
        return code

    def _print_data_directory(self) -> None:
        directory = shlex.quote(_short(self.directory.path))
        python, entry = shlex.quote(_short(Path(sys.executable), follow=False)), shlex.quote(_short(ENTRY))
        self.console.print(f"\nThe data is in {directory}. To inspect it:", soft_wrap=True)
        self.console.print(f"  make psql DATA_DIR={directory}", soft_wrap=True, markup=False)
        self.console.print(f"  {python} {entry} db psql --data-dir {directory}", soft_wrap=True, markup=False)
        with contextlib.suppress(DatabaseError):
            line = self.directory.server.psql_line()
            self.console.print("Or, while one of these keeps the server running, with any client:", soft_wrap=True)
            self.console.print(f"  {line}", soft_wrap=True, markup=False)


@contextlib.asynccontextmanager
async def _time_limit(seconds: float, failure: str, bot: BotProcess) -> Any:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise GuildbookError(f"{failure} within {seconds:g} s:\n{bot.log_tail()}") from None


def _short(path: Path, *, follow: bool = True) -> str:
    """Return a path relative to the working directory if it is inside."""
    whole = path.resolve() if follow else path.absolute()
    here = Path.cwd().resolve()
    return str(whole.relative_to(here)) if whole.is_relative_to(here) else str(whole)
