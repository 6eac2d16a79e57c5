"""The demo as people start it."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest

from utils.demo.child import ENTRY, Place, environment
from utils.exceptions import SettingsError

PATIENCE = 90.0


async def start(*arguments: str, directory: Path, **variables: str) -> asyncio.subprocess.Process:
    """Start `python bot.py …` in a directory."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        str(ENTRY),
        *arguments,
        cwd=directory,
        env={**environment(), **variables},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )


async def output_of(process: asyncio.subprocess.Process) -> str:
    """Return all that it prints until its end."""
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE):
        text = (await process.stdout.read()).decode()
        await process.wait()
    return text


def shape(text: str) -> list[str]:
    """Return the lines without what differs from run to run: figures, the history's lines, what happened how often."""
    lines = []
    for line in text.splitlines():
        kept = "(history)" if re.match(r"\d\d:\d\d:\d\d ", line) else line.partition("live events: ")[0]
        lines.append(" ".join(re.sub(r"[\d,.:]+", "N", kept).split()))
    # The bot's Python is where this test's is.
    return [re.sub(r"^\S+ \S*bot.py db psql", "python bot.py db psql", line) for line in lines if line]


async def test_the_demo_proves_every_row_and_its_data_can_be_looked_at_afterwards(tmp_path: Path) -> None:
    # Whatever the operator's own settings are, the demo stays away from them.
    (tmp_path / ".env").write_text("DATABASE_URL=postgresql://production.example/db\nDISCORD_TOKEN=theirs\n")
    foreign = {"DATABASE_URL": "postgresql://production.example/db", "DISCORD_API_BASE": "https://discord.example"}
    demo = await start("demo", directory=tmp_path, **foreign)
    text = await output_of(demo)
    assert demo.returncode == 0, text
    for table in ("guilds", "users", "members", "roles", "channels", "threads"):
        line = next(line for line in text.splitlines() if f"{table} compared" in line)
        assert line.endswith("0 differences"), text
    for words in (
        "25,340 members",
        "live events",
        "In the database",
        "came back",
        "exit code 0",
        "make psql DATA_DIR=",
    ):
        assert words in text, text
    assert not (tmp_path / ".data/demo/postgres/postmaster.pid").exists()

    command = next(line for line in text.splitlines() if "db psql --data-dir" in line).split()
    asked = ["-Atc", "SELECT count(*) > 25000 FROM members"]
    psql = await start(*command[2:], *asked, directory=tmp_path)
    assert (await output_of(psql)).splitlines()[-1] == "t"  # a log line may stand before it
    assert psql.returncode == 0


async def test_a_kept_demo_goes_on_until_ctrl_c_and_ends_cleanly(tmp_path: Path) -> None:
    demo = await start("demo", "--keep", directory=tmp_path)
    assert demo.stdout is not None
    text = ""
    async with asyncio.timeout(PATIENCE):
        while "Ctrl-C ends it all" not in text:
            line = (await demo.stdout.readline()).decode()
            assert line, text
            text += line
    # The line for psql works while the demo runs.
    command = shlex.split(next(line for line in text.splitlines() if "bin/psql" in line))
    psql = await asyncio.create_subprocess_exec(
        *command, "-Atc", "SELECT count(*) FROM guilds", stdout=asyncio.subprocess.PIPE
    )
    assert (await output_of(psql)).strip() == "3"
    demo.send_signal(signal.SIGINT)
    text += await output_of(demo)
    assert demo.returncode == 0, text
    assert "Traceback" not in text
    assert not (tmp_path / ".data/demo/postgres/postmaster.pid").exists()


async def test_a_demo_that_was_killed_leaves_nothing_in_the_way_of_the_next_one(tmp_path: Path) -> None:
    demo = await start("demo", "--keep", directory=tmp_path)
    assert demo.stdout is not None
    async with asyncio.timeout(PATIENCE):
        while "ready:" not in (line := (await demo.stdout.readline()).decode()):
            assert line, "it ended"
    demo.kill()
    await demo.wait()
    pid = int((tmp_path / ".data/demo/bot.pid").read_text())
    os.kill(pid, 0)  # the orphan lives on
    second = await start("demo", directory=tmp_path)
    text = await output_of(second)
    assert second.returncode == 0, text
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_directory_that_no_demo_made_is_never_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SettingsError, match="no demo made"), Place(tmp_path).claimed():
        pass
    assert (tmp_path / "thesis.txt").exists()


def test_two_demos_do_not_share_a_directory(tmp_path: Path) -> None:
    with (
        Place(tmp_path / "demo").claimed(),
        pytest.raises(SettingsError, match="another demo"),
        Place(tmp_path / "demo").claimed(),
    ):
        pass


def test_no_setting_of_the_operators_reaches_the_demos_bot(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("DATABASE_URL", "PGHOST", "PGSERVICE", "DB_HOST", "PORT", "RAILWAY_SERVICE_ID", "ADMIN_GUILD_ID")
    for name in names:
        monkeypatch.setenv(name, "theirs")
    monkeypatch.setenv("PATH_OF_OURS", "kept")
    given = environment(DATA_DIR="ours")
    assert "theirs" not in given.values()
    assert (given["DATA_DIR"], given["PATH_OF_OURS"]) == ("ours", "kept")
