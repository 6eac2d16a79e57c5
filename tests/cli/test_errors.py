"""Errors of commands: one line or one JSON object, the exit code of the table, never a traceback."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bot.running import run_cli
from tests.forkserver import start_bot
from utils.database import ConnectTarget
from utils.demo.bot_process import ENTRY, environment

pytestmark = pytest.mark.slow


async def run_json(directory: Path, *arguments: str, **settings: str) -> tuple[int, dict[str, Any], str]:
    """Run a command with --json; return its exit code, its object, and what it prints on standard error."""
    process = await start_bot(directory, *arguments, "--json", is_merged=False, settings=settings)
    async with asyncio.timeout(60):
        output, errors = await process.communicate()
    return await process.wait(), json.loads(output), errors.decode()


async def run_in_shell(directory: Path, line: str, **settings: str) -> tuple[int, str, str]:
    """Run a line of bash in which `$BOT` is `python bot.py`; return exit code, standard output and standard error."""
    variables = environment(**settings) | {"BOT": f"{sys.executable} {ENTRY}"}
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", line, cwd=directory, env=variables, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(60):
        output, errors = await process.communicate()
    return await process.wait(), output.decode(), errors.decode()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("db", "seed", "--guilds", "0"), "Invalid value for '--guilds'"),
        (("db", "seed", "--gilds", "1"), "No such option: --gilds"),
        (("db", "stamp"), "Missing argument 'revision'"),
        (("db", "statsu"), "No such command 'statsu'"),
        (("import",), "Missing argument 'PATH...'"),
        (("new", "cog", "Bad Name"), "'Bad Name' is not a valid name for a cog"),
        (("export", "users"), "--json needs --to FILE"),
    ],
)
async def test_wrong_arguments_are_one_line_or_json(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    code, result, errors = await run_json(tmp_path, *arguments)
    assert (code, result["ok"], errors) == (2, False, "")
    assert message in result["error"]
    if arguments[0] != "export":
        code, output = await run_cli(tmp_path, *arguments)
        assert (code, output) == (2, f"{result['error']}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("backup", "list", "--from", ""), ("backup", "verify", "--data-dir", " "), ("import", ""), ("import", "a", ""),
        ("export", "members", "--to", ""), ("db", "stats", "--picture", ""), ("db", "preview", "--out", ""),
        ("demo", "--data-dir", ""),
    ],
)  # fmt: skip
async def test_an_empty_path_is_not_the_current_directory(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code, output = await run_cli(tmp_path, *arguments)
    assert (code, output.count("\n")) == (2, 1)
    assert "it is empty: name a file or a directory" in output
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", ["", " "])
async def test_an_empty_data_directory_is_refused(tmp_path: Path, value: str) -> None:
    code, output = await run_cli(tmp_path, "backup", "list", DATA_DIR=value)
    assert (code, output.startswith("DATA_DIR: it is empty")) == (2, True), output


@pytest.mark.parametrize(
    "arguments", [("db", "seed"), ("db", "reset"), ("db", "describe"), ("db", "stats"), ("doctor",)]
)
async def test_wrong_settings_are_json(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code, result, errors = await run_json(tmp_path, *arguments, DATABASE_URL="mysql://here/db")
    assert (result["ok"], errors) == (False, "")
    if arguments != ("doctor",):  # whose findings name it
        assert (code, result["error"].startswith("DATABASE_URL: ")) == (2, True)


async def test_results_of_development_commands_are_json(tmp_path: Path, database_url: str) -> None:
    code, result, _ = await run_json(
        tmp_path, "db", "seed", "--guilds", "2", "--members", "5", DATABASE_URL=database_url
    )
    assert (code, result["ok"], result["rows"]["members"]) == (0, True, 10)
    code, result, _ = await run_json(tmp_path, "db", "describe", "members", DATABASE_URL=database_url)
    assert (code, result["tables"][0]["name"]) == (0, "members")
    code, result, _ = await run_json(tmp_path, "db", "describe", "membres", DATABASE_URL=database_url)
    assert (code, "there is no table membres" in result["error"]) == (2, True)
    code, result, _ = await run_json(tmp_path, "db", "describe", "a.b.c.d", DATABASE_URL=database_url)
    assert (code, "'a.b.c.d' is not the name of a table: improper relation name" in result["error"]) == (2, True)
    arguments = ("db", "reset", "--yes-destroy", "elsewhere")
    code, result, _ = await run_json(tmp_path, *arguments, DATABASE_URL=database_url)
    assert (code, "not elsewhere: nothing was dropped" in result["error"]) == (2, True)
    code, result, _ = await run_json(tmp_path, "db", "reset", DATABASE_URL=database_url, ENVIRONMENT="development")
    assert (code, result["ok"]) == (0, True)


@pytest.mark.parametrize("place", ["nowhere/chart.png", "."])
async def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path, database_url: str, place: str) -> None:
    code, output = await run_cli(tmp_path, "db", "stats", "--picture", place, DATABASE_URL=database_url)
    assert (code, output.count("\n")) == (1, 1), output
    assert output.startswith(f"could not write {place}: ")


async def run_into(directory: Path, file: int, *arguments: str, **settings: str) -> tuple[int, str]:
    """Run a command whose standard output is a file; return its exit code and standard error."""
    process = await start_bot(directory, *arguments, settings=settings, is_merged=False, stdout_to=file)
    async with asyncio.timeout(60):
        _, errors = await process.communicate()
    return await process.wait(), errors.decode()


async def test_a_closed_pipe_ends_a_command_quietly(tmp_path: Path, database_url: str) -> None:
    # The doctor finds that there is no token.
    for line, expected in (("db describe", 0), ("db --help", 0), ("doctor --json", 1), ("export table:users", 0)):
        theirs, ours = os.pipe()
        reading = asyncio.create_task(asyncio.to_thread(_read_one_byte, theirs))
        settings = {"DATABASE_URL": database_url, "DISCORD_TOKEN": ""}
        code, errors = await run_into(tmp_path, ours, *line.split(), **settings)
        os.close(ours)
        await reading
        assert (code, "Traceback" in errors, "Errno" in errors) == (expected, False, False), (line, errors)
    line = "$BOT db describe > >(exec >&-; exit); echo $?"
    assert (await run_in_shell(tmp_path, line, DATABASE_URL=database_url))[1:] == ("0\n", "")


def _read_one_byte(file: int) -> None:
    """Do as `head -c 1` does."""
    os.read(file, 1)
    os.close(file)


async def test_output_that_cannot_be_written_is_one_line(tmp_path: Path, database_url: str) -> None:
    message = "the output could not be written: No space left on device\n"
    full = os.open("/dev/full", os.O_WRONLY)
    for arguments in (("db", "describe"), ("db", "describe", "--json")):
        assert await run_into(tmp_path, full, *arguments, DATABASE_URL=database_url) == (1, message)
    os.close(full)


async def test_closed_streams_are_no_terminal(tmp_path: Path, database_url: str) -> None:
    line = "$BOT db downgrade base <&-"
    code, _, errors = await run_in_shell(tmp_path, line, DATABASE_URL=database_url)
    assert (code, errors.count("\n")) == (2, 1), errors
    assert "standard input is not a terminal" in errors
    code, _, errors = await run_in_shell(tmp_path, "$BOT db status >&- 2>&-", DATABASE_URL=database_url)
    assert (code, errors) == (0, "")


async def test_a_question_without_an_answer_changes_nothing(tmp_path: Path, database_url: str) -> None:
    for typed, code in ((b"no\n", 2), (b"\x04", 2), (b"\x03", 130)):
        ours, theirs = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(ENTRY), "db", "adopt", "123", cwd=tmp_path, stdin=theirs, start_new_session=True,
            env=environment(DATABASE_URL=database_url), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(theirs)
        async with asyncio.timeout(60):
            assert process.stderr is not None
            question = await process.stderr.readuntil(b"[y/N] ")
            os.write(ours, typed)
            _, errors = await process.communicate()
        os.close(ours)
        assert question.startswith(b"Guilds that application 123 is not in")
        assert (process.returncode, b"Traceback" in errors) == (code, False), errors


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that ^C becomes a signal


async def test_a_data_directory_that_cannot_be_used_is_one_line(tmp_path: Path, target: ConnectTarget) -> None:
    (tmp_path / "file").write_text("")
    for arguments in (("db", "status"), ("db", "stats"), ("backup", "create"), ("db", "psql"), ("doctor",)):
        code, output = await run_cli(tmp_path, *arguments, DATA_DIR="file/data")
        assert (code in (1, 2), "Traceback" in output) == (True, False), output
        if arguments != ("doctor",):
            assert output.count("\n") == 1, output
    (tmp_path / "members.json").write_text("{}")
    for arguments in (("import", "members.json"), ("backup", "create")):
        code, output = await run_cli(tmp_path, *arguments, DATA_DIR="file/data", DATABASE_URL=target.libpq_url())
        assert (code in (1, 2), output.count("\n"), "Traceback" in output) == (True, 1, False), output


async def test_help_shows_whole_sentences(tmp_path: Path) -> None:
    for group in ((), ("db",), ("backup",), ("new",)):
        code, output = await run_cli(tmp_path, *group, "--help")
        assert (code, "..." in output.replace("[ARGS]...", "")) == (0, False), output
    assert "exit code 1 when there are any." in " ".join((await run_cli(tmp_path, "db", "--help"))[1].split())
