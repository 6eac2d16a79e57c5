"""The watchdog names the line of a cog that blocks the event loop, once, and nothing else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from simulator import Simulator
from tests.bot.running import running_bot
from tests.bot.temporary_cogs import TemporaryCogs
from tests.waiting import until
from utils.bot.watchdog import Watchdog
from utils.database import Pool
from utils.service import metrics

pytestmark = pytest.mark.guilds(10)

BLOCKING = """
import statistics, time
class Blocking(BaseCog):
    @app_commands.command()
    async def block(self, interaction: discord.Interaction[Guildbook]) -> None:
        self.count()
        await interaction.response.send_message("done")

    def count(self) -> None:
        statistics.fmean(map(self.slow, [1]))  # by way of a library

    def slow(self, number: int) -> int:
        time.sleep(0.5)  # this line
        return number

async def setup(bot: Guildbook) -> None:
    await bot.add_cog(Blocking(bot))
"""


async def test_names_the_cog_and_the_line(
    database: Pool,
    simulator: Simulator,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> None:
    cogs = TemporaryCogs(tmp_path, monkeypatch)
    cogs.write("blocking", BLOCKING)
    guild = next(iter(simulator.world.guilds.values()))
    async with running_bot(database, simulator, extensions=cogs.extensions):
        result = await simulator.run_command("block", user_id=guild.owner_id, guild_id=guild.id)
        await result.wait_done()
        await until(lambda: "blocked for" in caplog.text)
    lines = [line.getMessage() for line in caplog.records if line.name == "utils.bot.watchdog"]
    (line,) = [line for line in lines if cogs.module("blocking") in line]
    number = 1 + (cogs.directory / "blocking.py").read_text().splitlines().index("        time.sleep(0.5)  # this line")
    assert f"blocking.py:{number} in slow: time.sleep(0.5)  # this line" in line
    assert metrics.loop_blocks.labels(cogs.module("blocking"))._value.get() == 1


@pytest.fixture
def watchdog() -> Iterator[Watchdog]:
    """A watchdog that is stopped after the test."""
    watchdog = Watchdog(lambda: [__name__], threshold=0.1, interval=0.02, long_block=0.3)
    yield watchdog
    watchdog.stop()


def block(seconds: float) -> None:
    time.sleep(seconds)


async def test_a_line_that_blocks_again_and_again_is_logged_a_few_times(
    watchdog: Watchdog, caplog: pytest.LogCaptureFixture
) -> None:
    watchdog.start()
    before = metrics.loop_blocks.labels(__name__)._value.get()
    for number in range(1, 6):
        block(0.2)
        await until(lambda: metrics.loop_blocks.labels(__name__)._value.get() == before + number)  # noqa: B023 - awaited in this turn
    assert caplog.text.count("was blocked for") == 3


async def test_a_block_without_end_is_named_while_it_lasts(
    watchdog: Watchdog, caplog: pytest.LogCaptureFixture
) -> None:
    watchdog.start()
    await asyncio.sleep(0)
    deadline = time.monotonic() + 10
    while "has been blocked for" not in caplog.text and time.monotonic() < deadline:
        block(0.01)
    assert "has been blocked for" in caplog.text
    assert "in block: time.sleep(seconds)" in caplog.text or "test_watchdog.py" in caplog.text


async def test_a_stopped_watchdog_ends_its_thread(watchdog: Watchdog) -> None:
    watchdog.start()
    watchdog.start()
    (thread,) = [it for it in threading.enumerate() if it is watchdog._thread]
    watchdog.stop()
    await asyncio.to_thread(thread.join, 10)
    assert not thread.is_alive()


async def test_names_each_of_two_cogs_that_block_one_after_the_other(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    functions = []
    for name in ("first", "second"):
        path = tmp_path / f"{name}.py"
        path.write_text("import time\ndef work():\n    time.sleep(0.4)\n")
        module: dict[str, Any] = {"__name__": f"cog_{name}"}
        exec(compile(path.read_text(), str(path), "exec"), module)
        functions.append(module["work"])
    watchdog = Watchdog(lambda: ["cog_first", "cog_second"], threshold=0.1, interval=0.02)
    watchdog.start()
    try:
        await asyncio.sleep(0.05)
        for function in functions:
            function()
        await until(lambda: caplog.text.count("was blocked for") == 2)
    finally:
        watchdog.stop()
    assert "by cog_first at" in caplog.text
    assert "by cog_second at" in caplog.text
