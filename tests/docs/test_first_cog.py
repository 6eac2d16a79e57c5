"""docs/how-to/first-cog.md, followed from top to bottom in a clone: every block is run."""

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
from tests.ports import free_port
from utils.database import ConnectTarget
from utils.demo.bot_process import environment

pytestmark = pytest.mark.slow

BLOCKS = blocks_of(TUTORIAL)
#: The maximum number of lines that an author writes, including the table.
MAX_LINES = 40
#: Seconds for one step.
TIMEOUT = 90.0


def author_files() -> dict[str, str]:
    """Return the files that the page tells the reader to write, by path."""
    page = TUTORIAL.read_text(encoding="utf-8")
    return dict(re.findall(r"^`([\w/]+\.py)`:\n\n```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))


def cog_with_tour() -> str:
    """Return the cog with every block of the tour added."""
    tour = [block.text for block in BLOCKS if block.language == "python" and block.text not in author_files().values()]
    (imports,) = (text for text in tour if text.startswith("from "))
    methods = "\n".join("".join(f"    {line}" if line.strip() else line for line in text.splitlines(keepends=True))
                        for text in tour if text != imports)  # fmt: skip
    head, setup, foot = author_files()["tally/cogs/tally.py"].partition("\n\nasync def setup")
    return f"{imports}\n{head}\n{methods}{setup}{foot}"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the sources."""
    return cloned_sources(tmp_path / "clone")


def cloned_sources(where: Path) -> Path:
    """Copy the sources into a directory to write into."""
    ignored = shutil.ignore_patterns(".*", "benchmarks", "faults")
    shutil.copytree(ROOT, where, ignore=ignored)
    (where / ".venv").symlink_to(sys.prefix)
    # The environment is not set up again.
    makefile = where / "Makefile"
    makefile.write_text(makefile.read_text().replace("$(READY): requirements-dev.txt", "$(READY):"))
    return where


def run_line(directory: Path, line: str, **settings: str) -> str:
    """Run a command line in a directory and return its output."""
    done = subprocess.run(
        shlex.split(line), cwd=directory, env=environment(**settings), capture_output=True, text=True,
        timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@asynccontextmanager
async def make_run(pack: Path, log: Path, **settings: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run `make run` for the duration of a block."""
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            "make", "run", cwd=pack, env=environment(HEALTH_PORT=str(free_port()), **settings), stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(TIMEOUT):
                    await process.wait()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


async def use(
    simulator: Simulator,
    command: str,
    user_id: int,
    guild_id: int | None,
    subcommand: str | None = None,
    **options: object,
) -> str:
    """Run a command as a member, once it is registered and the bot connected, and return the answer."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            try:
                result = await simulator.run_command(
                    command, user_id=user_id, guild_id=guild_id, subcommand=subcommand, options=options
                )
            except LookupError:
                await asyncio.sleep(0.05)
            else:
                await result.wait_done(30)
                return result.final_content or ""


async def wait_for_row_count(connection: asyncpg.Connection[asyncpg.Record], table: str, rows: int) -> None:
    """Wait until a table has this number of rows."""
    async with asyncio.timeout(TIMEOUT):
        while await connection.fetchval("SELECT count(*) FROM " + table) != rows:  # noqa: ASYNC110, S608
            await asyncio.sleep(0.05)


def test_author_writes_few_lines() -> None:
    assert list(author_files()) == ["tally/models.py", "tally/cogs/tally.py", "tests/test_tally.py"]
    written = [text for path, text in author_files().items() if not path.startswith("tests/")]
    lines = [line for text in written for line in text.splitlines() if line.strip()]
    assert len(lines) <= MAX_LINES
    assert f"{len(lines)} lines with the table" in TUTORIAL.read_text()


@pytest.mark.timeout(400)
async def test_page_works_from_top_to_bottom(clone: Path, target: ConnectTarget, tmp_path: Path) -> None:
    world, log = World(seed=1), tmp_path / "bot.log"
    guild_id = world.add_guild(members=8)
    owner, other = world.guild(guild_id).owner_id, next(
        id for id, member in world.guild(guild_id).members.items()
        if id not in (world.bot.id, world.guild(guild_id).owner_id) and not world.user(id).bot
    )  # fmt: skip
    first_block, steps_block = (block for block in BLOCKS if block.language == "sh")
    (expected_output,) = (block for block in BLOCKS if block.language == "text")
    (query,) = (block for block in BLOCKS if block.language == "sql")
    set_up, new_pack, enter, first_test = first_block.text.splitlines()
    assert (set_up, enter) == ("make setup", "cd ../tally")
    *steps, last = steps_block.text.splitlines()
    assert last == "make run"
    url = target.libpq_url()

    assert await asyncio.to_thread(run_line, clone, new_pack) == expected_output.text
    pack = (clone / "../tally").resolve()
    assert "2 passed" in await asyncio.to_thread(run_line, pack, first_test)
    for path, text in author_files().items():
        assert (pack / path).exists(), "the page changes generated files"
        (pack / path).write_text(text)
    outputs = {step: await asyncio.to_thread(run_line, pack, step, DATABASE_URL=url) for step in steps}
    assert "1 passed" in outputs["make test"]
    (revision,) = (pack / "tally/migrations/versions").glob("tally_0002_*.py")
    assert re.findall(r"op\.(\w\w+)\(\s*['\"](\w+)", revision.read_text()) == [
        ("add_column", "tally_entries"),
        ("drop_column", "tally_entries"),
    ]
    changed = await asyncio.to_thread(lambda: [*clone.glob("*/*tally*"), *clone.glob("migrations/*/*tally*")])
    assert changed == [clone / "examples/tally.py"], "nothing of the pack is in Guildbook"

    connection = await asyncpg.connect(**target.connect_kwargs())
    async with Simulator(world, limits=Limits.none()) as simulator:
        settings = {"DISCORD_TOKEN": simulator.token, "DISCORD_API_BASE": simulator.api_base, "DATABASE_URL": url}
        async with make_run(pack, log, **settings):
            await wait_for_row_count(connection, "members", len(world.guild(guild_id).members))
            assert (await use(simulator, "tallies", owner, guild_id)).startswith("Nobody has counted yet")
            assert await use(simulator, "tally", owner, guild_id, reason="tea") == "Your count is 1."
            assert await use(simulator, "tally", owner, guild_id, reason="cake") == "Your count is 2."
            rows = await connection.fetch(query.text)
            assert [tuple(row) for row in rows] == [(guild_id, owner, 2, "cake")]
            name = world.user(owner).username
            assert await use(simulator, "tallies", owner, guild_id) == f"2 {name} (cake)"

            (pack / "tally/cogs/tally.py").write_text(cog_with_tour())
            operator = world.operator_id
            text = await use(simulator, "cogs", operator, None, subcommand="reload", name="tally")
            assert text.startswith("**tally** (pack tally) loaded in "), text

            assert (await use(simulator, "give", other, guild_id, member=owner)).startswith("You have none to give")
            assert await use(simulator, "give", owner, guild_id, member=other) == f"One for <@{other}>."
            rows = await connection.fetch("SELECT user_id, count FROM tally_entries")
            assert {tuple(row) for row in rows} == {(owner, 1), (other, 1)}, "the declined command was rolled back"
            assert await use(simulator, "goal", owner, guild_id, goal=50) == "The goal was 10 and is now 50."
            assert await use(simulator, "goal", owner, guild_id, goal=60) == "The goal was 50 and is now 60."
            joined = len(world.guild(guild_id).members)
            assert await use(simulator, "joined", owner, guild_id) == f"{joined} joined; 1 servers cached."
            failed = await use(simulator, "fail", owner, guild_id)
            found = re.search(r"\(ref (\w+)\)\.$", failed)
            assert found is not None, failed
            assert "only the log" not in failed

            for _ in range(3):
                world.message(guild_id, next(iter(world.guild(guild_id).channels)), owner, "hello")
            async with asyncio.timeout(TIMEOUT):
                counted = "SELECT count FROM tally_entries WHERE user_id = $1"
                while await connection.fetchval(counted, owner) != 4:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)

            world.leave(guild_id, other)
            await wait_for_row_count(connection, "tally_entries", 1)
    await connection.close()
    output = log.read_text()
    assert found[1] in output
    assert "only the log shows this" in output
    assert "1 members have counted" in output


def test_every_block_has_a_language_that_is_run() -> None:
    def languages(found: list[Block]) -> set[str]:
        return {block.language for block in found}

    assert languages(BLOCKS) == {"sh", "text", "python", "sql"}
