"""The demo, started from the command line."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest

from utils.demo.bot_process import ENTRY, DataDirectory, environment
from utils.exceptions import SettingsError

pytestmark = pytest.mark.slow

TIMEOUT = 90.0


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


async def read_output(process: asyncio.subprocess.Process) -> str:
    """Wait for the process to exit and return its output."""
    assert process.stdout is not None
    async with asyncio.timeout(TIMEOUT):
        text = (await process.stdout.read()).decode()
        await process.wait()
    return text


def shape(text: str) -> list[str]:
    """Return the lines without what differs between runs: numbers, lines of history, counts of events."""
    lines = []
    for line in text.splitlines():
        stable = "(history)" if re.match(r"\d\d:\d\d:\d\d ", line) else line.partition("live events: ")[0]
        lines.append(" ".join(re.sub(r"[\d,.:]+", "N", stable).split()))
    # The path of Python depends on the environment.
    return [re.sub(r"^\S+ \S*bot.py db psql", "python bot.py db psql", line) for line in lines if line]


async def kill_one_that_runs(directory: Path) -> int:
    """Start a demo, kill it while its bot runs, and return the bot's process id."""
    demo = await start("demo", "--keep", directory=directory)
    assert demo.stdout is not None
    async with asyncio.timeout(TIMEOUT):
        while "ready:" not in (line := (await demo.stdout.readline()).decode()):
            assert line, "the demo exited"
    demo.kill()
    await demo.wait()
    pid = int((directory / ".data/demo/bot.pid").read_text())
    os.kill(pid, 0)  # the bot is still running
    return pid


async def test_demo_cleans_up_after_a_killed_one_verifies_rows_and_leaves_data_to_inspect(tmp_path: Path) -> None:
    left_behind = await kill_one_that_runs(tmp_path)
    # The demo must ignore the operator's settings.
    (tmp_path / ".env").write_text("DATABASE_URL=postgresql://production.example/db\nDISCORD_TOKEN=theirs\n")
    foreign = {"DATABASE_URL": "postgresql://production.example/db", "DISCORD_API_BASE": "https://discord.example"}
    demo = await start("demo", directory=tmp_path, **foreign)
    text = await read_output(demo)
    assert demo.returncode == 0, text
    for table in ("guilds", "users", "members", "roles", "channels", "threads"):
        line = next(line for line in text.splitlines() if f"{table} compared" in line)
        assert line.endswith("0 differences"), text
    for phrase in (
        "25,340 members",
        "live events",
        "In the database",
        "rejoined",
        "exit code 0",
        "make psql DATA_DIR=",
    ):
        assert phrase in text, text
    assert not (tmp_path / ".data/demo/postgres/postmaster.pid").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(left_behind, 0)

    command = next(line for line in text.splitlines() if "db psql --data-dir" in line).split()
    asked = ["-Atc", "SELECT count(*) > 25000 FROM members"]
    psql = await start(*command[2:], *asked, directory=tmp_path)
    assert (await read_output(psql)).splitlines()[-1] == "t"  # a log line may come first
    assert psql.returncode == 0


async def test_demo_with_keep_runs_until_ctrl_c(tmp_path: Path) -> None:
    demo = await start("demo", "--keep", directory=tmp_path)
    assert demo.stdout is not None
    text = ""
    async with asyncio.timeout(TIMEOUT):
        while "Press Ctrl-C to stop" not in text:
            line = (await demo.stdout.readline()).decode()
            assert line, text
            text += line
    # The psql command works while the demo runs.
    command = shlex.split(next(line for line in text.splitlines() if "bin/psql" in line))
    psql = await asyncio.create_subprocess_exec(
        *command, "-Atc", "SELECT count(*) FROM guilds", stdout=asyncio.subprocess.PIPE
    )
    assert (await read_output(psql)).strip() == "3"
    demo.send_signal(signal.SIGINT)
    text += await read_output(demo)
    assert demo.returncode == 0, text
    assert "Traceback" not in text
    assert not (tmp_path / ".data/demo/postgres/postmaster.pid").exists()


def test_never_clears_a_directory_of_others(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SettingsError, match="no demo created"), DataDirectory(tmp_path).lock():
        pass
    assert (tmp_path / "thesis.txt").exists()


def test_two_demos_cannot_share_a_directory(tmp_path: Path) -> None:
    with (
        DataDirectory(tmp_path / "demo").lock(),
        pytest.raises(SettingsError, match="another demo"),
        DataDirectory(tmp_path / "demo").lock(),
    ):
        pass


def test_environment_omits_operators_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("DATABASE_URL", "PGHOST", "PGSERVICE", "DB_HOST", "PORT", "RAILWAY_SERVICE_ID", "ADMIN_GUILD_ID")
    for name in names:
        monkeypatch.setenv(name, "theirs")
    monkeypatch.setenv("PATH_OF_OURS", "inherited")
    given = environment(DATA_DIR="ours")
    assert "theirs" not in given.values()
    assert (given["DATA_DIR"], given["PATH_OF_OURS"]) == ("ours", "inherited")
