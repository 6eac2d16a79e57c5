"""The rehearsal of docs/how-to/database-gone.md: a large database is dropped, and one command brings it back."""

from __future__ import annotations

import re
import shlex
import sys
import time
from pathlib import Path

import pytest

from simulator import Simulator, World
from tests.bot.held import BARE, Held
from tests.bot.running import wait_until_mirrored
from tests.docs.blocks import REHEARSAL, blocks_of
from tests.mirror.restoring import Droppable
from tests.waiting import until

pytestmark = pytest.mark.slow

MEMBERS = 25_000


@pytest.fixture
def world() -> World:
    """One guild of the size that the page speaks of, and a small one."""
    world = World(seed=25)
    world.add_guild(members=MEMBERS, name="Large")
    world.add_guild(members=40, name="Small")
    return world


def commands(heading: str) -> list[list[str]]:
    """Return the arguments of `python bot.py` in the blocks under a heading; empty: those before the first one."""
    text = REHEARSAL.read_text(encoding="utf-8")
    start = text.index(f"\n## {heading}\n") if heading else 0
    end = text.find("\n## ", start + 1)
    first, last = text.count("\n", 0, start) + 1, text.count("\n", 0, end)
    lines = [
        line
        for block in blocks_of(REHEARSAL)
        if block.language == "sh" and first <= block.line <= last
        for line in block.text.splitlines()
    ]
    return [shlex.split(line)[2:] for line in lines]


def test_the_page_has_one_command() -> None:
    assert commands("") == [["backup", "restore", "latest", "--yes"]]
    assert commands("Restore")[1] == commands("")[0]
    assert f"{MEMBERS:,} members" in REHEARSAL.read_text(encoding="utf-8")


async def test_one_command_brings_the_database_back(
    tmp_path: Path, simulator: Simulator, dropped: Droppable, capsys: pytest.CaptureFixture[str]
) -> None:
    page = REHEARSAL.read_text(encoding="utf-8")
    held = Held(tmp_path, simulator, dropped)
    async with held.bot as bot:
        await bot.wait_until_ready()
        for command in commands("Before it happens"):
            code, output = await held.cli(*command)
            assert code == 0, (command, output)
        await dropped.recreate(template=BARE)

        # What the page says that operators see.
        await until(held.is_held)
        status, body = await held.readiness()
        assert (status, body["state"]) == (503, "held")
        assert {"reason", "backup", "todo"} <= set(body["held"])
        assert (await bot.get("/healthz"))[0] == 200
        shown = re.search(r"`(the database is empty[^`]+)`", page)
        assert shown is not None
        before, after = shown[1].split(" … ")
        await bot.wait_for_output(before)
        assert after in bot.output
        await until(lambda: any(before in message["content"] for message in simulator.channels.sent.values()))
        code, output = await held.cli("doctor")
        assert (code, "fail  backups: the database is empty" in output) == (1, True), output
        code, output = await held.cli(*commands("Restore")[0])
        assert code == 0, output

        started = time.monotonic()
        code, output = await held.cli(*commands("")[0])
        assert code == 0, output
        restored = time.monotonic() - started
        await bot.wait_until_ready()
        ready = time.monotonic() - started
        await wait_until_mirrored(held.pool, simulator)
        equal = time.monotonic() - started
        assert await held.pool.fetchval("SELECT count(*) FROM members WHERE left_at IS NULL") == MEMBERS + 40
        for command in commands("Restore")[2:]:
            code, output = await held.cli(*command)
            assert code == 0, (command, output)
        await held.stop()
    assert "Traceback" not in bot.output
    with capsys.disabled():
        sys.stdout.write(
            f"\n{MEMBERS:,} members: restored in {restored:.1f} s, ready after {ready:.1f} s, 0 differences after"
            f" {equal:.1f} s\n"
        )
