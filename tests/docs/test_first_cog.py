"""docs/your-first-cog.md, typed in from top to bottom in a clone: every block of it is run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from simulator import Limits, Simulator, World
from tests.docs.blocks import ROOT, TUTORIAL, Block, blocks_of
from utils.database import ConnectTarget
from utils.demo.bot_process import environment, free_port

pytestmark = pytest.mark.slow

BLOCKS = blocks_of(TUTORIAL)
#: Lines that an author writes at most, the table included.
LINES = 40
PATIENCE = 90.0


def author() -> dict[str, str]:
    """Return the files that the page tells to write, by path."""
    page = TUTORIAL.read_text(encoding="utf-8")
    return dict(re.findall(r"^`([\w/]+\.py)`:\n\n```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))


def toured() -> str:
    """Return the cog with everything of the tour in it."""
    tour = [block.text for block in BLOCKS if block.language == "python" and block.text not in author().values()]
    (imports,) = (text for text in tour if text.startswith("from "))
    methods = "\n".join("".join(f"    {line}" if line.strip() else line for line in text.splitlines(keepends=True))
                        for text in tour if text != imports)  # fmt: skip
    head, setup, foot = author()["cogs/tally.py"].partition("\n\nasync def setup")
    return f"{imports}\n{head}\n{methods}{setup}{foot}"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a fresh clone has in it."""
    return cloned_sources(tmp_path / "clone")


def cloned_sources(where: Path) -> Path:
    """Copy the sources, so that files can be written beside them."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "benchmarks", "faults")
    shutil.copytree(ROOT, where, ignore=ignored)
    (where / ".venv").symlink_to(sys.prefix)
    return where


def typed(clone: Path, line: str, **settings: str) -> str:
    """Type a line in the clone; return what it prints. `make` takes the environment as it is."""
    program, *arguments = shlex.split(line)
    if program == "make":
        arguments = ["--old-file", ".venv/.installed", *arguments]
    done = subprocess.run(
        [program, *arguments], cwd=clone, env=environment(**settings), capture_output=True, text=True,
        timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@asynccontextmanager
async def run_by_make(clone: Path, log: Path, **settings: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Have `make run` running for the duration of a block."""
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            "make", "--old-file", ".venv/.installed", "run",
            cwd=clone, env=environment(HEALTH_PORT=str(free_port()), **settings), stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(PATIENCE):
                    await process.wait()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


async def used(
    simulator: Simulator,
    command: str,
    user_id: int,
    guild_id: int | None,
    subcommand: str | None = None,
    **given: object,
) -> str:
    """Let a member use a command, once it is registered and the bot connected; return what the bot answers."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                result = await simulator.run_command(
                    command, user_id=user_id, guild_id=guild_id, subcommand=subcommand, options=dict(given)
                )
            except LookupError:
                await asyncio.sleep(0.05)
            else:
                await result.wait_done(30)
                return result.final_content or ""


async def until_counted(connection: asyncpg.Connection[asyncpg.Record], table: str, rows: int) -> None:
    """Wait until a table has so many rows."""
    async with asyncio.timeout(PATIENCE):
        while await connection.fetchval("SELECT count(*) FROM " + table) != rows:  # noqa: ASYNC110, S608
            await asyncio.sleep(0.05)


def test_an_author_writes_little() -> None:
    assert list(author()) == ["models/tally.py", "cogs/tally.py"]
    lines = [line for text in author().values() for line in text.splitlines() if line.strip()]
    assert len(lines) <= LINES
    assert f"{len(lines)} lines with the table" in TUTORIAL.read_text()


@pytest.mark.timeout(300)
async def test_the_page_can_be_followed_from_top_to_bottom(clone: Path, target: ConnectTarget, tmp_path: Path) -> None:
    world, log = World(seed=1), tmp_path / "bot.log"
    guild_id = world.add_guild(members=8)
    owner, other = world.guild(guild_id).owner_id, next(
        id for id, member in world.guild(guild_id).members.items()
        if id not in (world.bot.id, world.guild(guild_id).owner_id) and not world.user(id).bot
    )  # fmt: skip
    begun, made = (block for block in BLOCKS if block.language == "sh")
    (printed,) = (block for block in BLOCKS if block.language == "text")
    (query,) = (block for block in BLOCKS if block.language == "sql")
    *steps, last = made.text.splitlines()
    assert last == "make run"
    url = target.libpq_url()

    assert await asyncio.to_thread(typed, clone, begun.text) == printed.text
    for path, text in author().items():
        assert (clone / path).exists(), "the page changes what was begun"
        (clone / path).write_text(text)
    for step in steps:
        await asyncio.to_thread(typed, clone, step, DATABASE_URL=url)
    (revision,) = {*(clone / "migrations/versions").glob("*.py")} - {
        clone / "migrations/versions" / path.name for path in (ROOT / "migrations/versions").glob("*.py")
    }
    assert re.findall(r"op\.(\w\w+)\(\s*['\"](\w+)", revision.read_text()) == [
        ("create_table", "tally_entries"),
        ("drop_table", "tally_entries"),
    ]
    assert "drift from the models: none" in await asyncio.to_thread(
        typed, clone, ".venv/bin/python bot.py db status", DATABASE_URL=url
    )

    connection = await asyncpg.connect(**target.connect_kwargs())
    async with Simulator(world, limits=Limits.none()) as simulator:
        settings = {"DISCORD_TOKEN": simulator.token, "DISCORD_API_BASE": simulator.api_base, "DATABASE_URL": url}
        async with run_by_make(clone, log, **settings):
            await until_counted(connection, "members", len(world.guild(guild_id).members))
            assert (await used(simulator, "tallies", owner, guild_id)).startswith("Nobody has counted yet")
            assert await used(simulator, "tally", owner, guild_id, reason="tea") == "That makes 1."
            assert await used(simulator, "tally", owner, guild_id, reason="cake") == "That makes 2."
            rows = await connection.fetch(query.text)
            assert [tuple(row) for row in rows] == [(guild_id, owner, 2, "cake")]
            name = world.user(owner).username
            assert await used(simulator, "tallies", owner, guild_id) == f"2 {name} (cake)"

            (clone / "cogs/tally.py").write_text(toured())
            operator = world.operator_id
            text = await used(simulator, "cogs", operator, None, subcommand="reload", name="tally")
            assert text.startswith("**tally** loaded in "), text

            assert (await used(simulator, "give", other, guild_id, member=owner)).startswith("You have none to give.")
            assert await used(simulator, "give", owner, guild_id, member=other) == f"One for <@{other}>."
            rows = await connection.fetch("SELECT user_id, count FROM tally_entries")
            assert {tuple(row) for row in rows} == {(owner, 1), (other, 1)}, "what was declined left nothing"
            assert await used(simulator, "goal", owner, guild_id, goal=50) == "The goal was 10, and is 50."
            assert await used(simulator, "goal", owner, guild_id, goal=60) == "The goal was 50, and is 60."
            joined = len(world.guild(guild_id).members)
            assert await used(simulator, "joined", owner, guild_id) == f"{joined} joined, and 1 servers asked."
            failed = await used(simulator, "fail", owner, guild_id)
            found = re.search(r"\(reference (\w+)\)$", failed)
            assert found is not None, failed
            assert "nobody but the log" not in failed

            world.leave(guild_id, other)
            await until_counted(connection, "tally_entries", 1)
    await connection.close()
    told = log.read_text()
    assert found[1] in told
    assert "nobody but the log is told" in told
    assert "1 members have counted" in told


def test_every_block_is_of_a_kind_that_is_run() -> None:
    def languages(found: list[Block]) -> set[str]:
        return {block.language for block in found}

    assert languages(BLOCKS) == {"sh", "text", "python", "sql"}
