"""Every command of the tree with each of its options: no traceback, one line of error, a known exit code, valid JSON.

The commands and options come from the tree itself: a new one is tried without being named here. `make test` tries each
command in one form where `make test-all` tries all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

import bot
from tests.conftest import IS_EXHAUSTIVE
from tests.forkserver import start_bot
from tests.ports import free_port
from utils.cli.common import EXIT_CODES
from utils.database import ConnectTarget, Pool
from utils.operations.development.seed import seed

pytestmark = pytest.mark.slow

Path_ = tuple[str, ...]
#: Arguments of commands that need some, and of those that would otherwise do more than a test should.
ARGUMENTS: Mapping[Path_, Sequence[str]] = {
    ("db", "downgrade"): ("0003", "--yes-destroy", "elsewhere"),
    ("db", "stamp"): ("head",),
    ("db", "adopt"): ("123", "--yes"),
    ("db", "psql"): ("-Atc", "SELECT 1"),
    ("backup", "restore"): ("latest", "--yes"),
    ("import",): ("members.json",),
    ("export",): ("members",),
    ("new", "cog"): ("db",),  # taken: it would be written beside the others
    ("new", "pack"): ("db",),  # taken, likewise
    ("pack", "migration"): ("economy", "-m", "words"),
    ("demo",): ("--data-dir", "file/data"),  # cannot be used: the demo takes a minute
}
#: Valid values of options and arguments, by name; others by their type.
VALUES: Mapping[str, str] = {
    "revision": "0003", "table": "members", "tables": "members", "kind": "members", "form": "csv", "id": "latest",
    "namespace": "legacy.x", "encoding": "latin-1", "to": "out.csv", "out": "out.sql", "picture": "chart.png",
}  # fmt: skip
#: Commands that hand over to another program, or that have no result of their own.
WITHOUT_JSON = {("db", "psql"), ()}
#: What nobody means.
NONSENSE = "\udcff\u00e4; '\"%s"


@dataclass(frozen=True, slots=True)
class Command:
    """A command of the tree."""

    path: Path_
    params: tuple[Any, ...]

    def __str__(self) -> str:
        return " ".join(self.path) or "bot.py"

    @property
    def arguments(self) -> list[str]:
        """What it needs to be run."""
        if self.path in ARGUMENTS:
            return [*self.path, *ARGUMENTS[self.path]]
        needed = [one for one in self.params if one.param_type_name == "argument" and one.required]
        return [*self.path, *(VALUES.get(one.name, "latest") for one in needed)]

    @property
    def has_json(self) -> bool:
        return any("--json" in one.opts for one in self.params)


def walk(command: Any, path: Path_ = ()) -> Iterator[Command]:
    children: dict[str, Any] = getattr(command, "commands", {})
    if not children or command.invoke_without_command:
        yield Command(path, tuple(command.params))
    for name, child in children.items():
        yield from walk(child, (*path, name))


TREE = typer.main.get_command(bot.app)
COMMANDS = list(walk(TREE))
OPTIONS = [
    (command, one) for command in COMMANDS for one in command.params if one.param_type_name == "option"
]  # fmt: skip


def valid(option: Any) -> list[str]:
    """Return an option with a value that it accepts."""
    if option.is_flag:
        return [option.opts[0]]
    annotation = option.type_descriptor.annotation
    return [option.opts[0], VALUES.get(option.name, str(option.min or 1) if annotation is int else "data")]


def wrong(option: Any) -> Iterator[list[str]]:
    """Yield values that an option does not accept."""
    if option.is_flag:
        yield [f"{option.opts[0]}=x"]
    elif option.type_descriptor.annotation is int:
        yield [option.opts[0], "x"]
        yield [option.opts[0], str(10**30)]
        if option.min is not None:
            yield [option.opts[0], str(option.min - 1)]
    else:
        yield [option.opts[0], NONSENSE]


def check(arguments: Sequence[str], code: int, output: str, errors: str, *, lines: int = 1) -> None:
    """Check what a command prints, and its exit code. With --json, standard output is one object.

    lines: of a failed command on standard error, warnings included.
    """
    shown = f"{arguments}: {code}\n{output}\n{errors}"
    assert code in EXIT_CODES, shown
    assert "Traceback" not in output + errors, shown
    assert "unexpected error" not in output + errors, shown
    assert code == 0 or errors.count("\n") <= lines, shown
    if "--json" in arguments and "--help" not in arguments:
        try:
            result = json.loads(output)
        except ValueError:
            pytest.fail(shown)
        assert result["ok"] == (code == 0), shown
        assert code != 2 or result["error"], shown
    elif code == 2:
        assert errors.count("\n") == 1, shown


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_wrong_arguments(command: Command, capfd: pytest.CaptureFixture[str]) -> None:
    """In this process: nothing is connected to before the arguments are read."""
    options = [one for one in command.params if one.param_type_name == "option"]
    cases = [[*command.path, "--no-such-option"]]
    cases += [[*command.path, *words] for one in options for words in wrong(one) if words[-1] != NONSENSE]
    cases += [[*command.arguments, one.opts[0]] for one in options if not one.is_flag]  # without a value
    if any(one.required for one in command.params):
        cases.append([*command.path])
    if command.path == ("db", "psql"):
        cases = []  # psql's own
    for case in cases:
        if str(10**30) in case:
            continue  # refused by what it is used for
        for arguments in (case, [*case[: len(command.path)], "--json", *case[len(command.path) :]]):
            with pytest.raises(SystemExit) as caught:
                TREE.main(arguments)
            output, errors = capfd.readouterr()
            assert caught.value.code == 2, arguments
            check(arguments, 2, output, errors)


def test_every_command_with_a_result_has_json() -> None:
    assert {command.path for command in COMMANDS if not command.has_json} == WITHOUT_JSON


@contextlib.asynccontextmanager
async def silent_server() -> AsyncIterator[str]:
    """Yield the address of a server that accepts connections and never answers."""
    opened: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: opened.append(writer), "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in opened:
            writer.close()


async def run_all(
    directory: Path, cases: Sequence[Sequence[str]], *, has_reader: bool = True, lines: int = 1, **settings: str
) -> list[tuple[int, str, str]]:
    """Run commands, four at a time, and check each; return exit codes and what they print."""
    (directory / "file").write_text("")
    (directory / "members.json").write_text(json.dumps({"1_2": {"statistics": {"message_count": 7}}}))
    turns = asyncio.Semaphore(4)

    async def run(arguments: Sequence[str]) -> tuple[int, str, str]:
        async with turns:
            process = await start_bot(
                directory, *arguments, is_merged=False, has_reader=has_reader, settings={"DATA_DIR": "data", **settings}
            )
            async with asyncio.timeout(90):
                output, errors = await process.communicate()
            return await process.wait(), output.decode(), errors.decode()

    results = await asyncio.gather(*map(run, cases))
    for arguments, (code, output, errors) in zip(cases, results, strict=True):
        if has_reader and arguments[:2] != ["db", "psql"]:
            check(arguments, code, output, errors, lines=lines)
        assert code in EXIT_CODES, (arguments, code)
        assert "Traceback" not in errors, (arguments, errors)
    return results


def with_json(commands: Sequence[Command]) -> list[list[str]]:
    """Return each command's arguments, without and with --json; one of the two if not exhaustive, by turns."""
    plain = [command.arguments for command in commands]
    other = [[*command.arguments, "--json"] if command.has_json else command.arguments for command in commands]
    if IS_EXHAUSTIVE:
        return plain + [arguments for arguments in other if arguments not in plain]
    return [(plain if number % 2 else other)[number] for number in range(len(commands))]


def first_of_each(cases: Sequence[list[str]]) -> list[list[str]]:
    """Return the first of the cases of each command; all of them if exhaustive."""
    if IS_EXHAUSTIVE:
        return list(cases)
    paths = sorted((command.path for command in COMMANDS), key=len)  # the longest one that fits is the last
    found: dict[Path_, list[str]] = {}
    for case in cases:
        found.setdefault([path for path in paths if tuple(case[: len(path)]) == path][-1], case)
    return list(found.values())


async def test_no_database(tmp_path: Path) -> None:
    url = f"postgresql://u:s3cr3t-password@127.0.0.1:{free_port()}/d"
    cases = with_json(COMMANDS)
    results = await run_all(tmp_path, cases, DATABASE_URL=url, DB_CONNECT_TIMEOUT="1")
    for arguments, (code, output, errors) in zip(cases, results, strict=True):
        assert "s3cr3t" not in output + errors, arguments
        if arguments[:1] in (["db"], ["import"], ["export"]) and arguments[:2] != ["db", "psql"]:
            assert code == (2 if arguments[0] == "export" and "--json" in arguments else 1), (arguments, errors)


async def test_nonsense_as_a_value(tmp_path: Path) -> None:
    url = f"postgresql://u@127.0.0.1:{free_port()}/d"
    cases = [
        [*command.arguments, *words, "--json"]
        for command, option in OPTIONS
        for words in wrong(option)
        if command.has_json and words[-1] in (NONSENSE, str(10**30)) and option.name != "data_dir"
    ]
    cases += [
        [*command.path, NONSENSE, "--json"]
        for command in COMMANDS
        if command.has_json and any(one.param_type_name == "argument" for one in command.params)
    ]
    results = await run_all(tmp_path, first_of_each(cases), DATABASE_URL=url, DB_CONNECT_TIMEOUT="1")
    assert 0 not in [code for code, _, _ in results]


async def test_nobody_reads_the_output(tmp_path: Path, database: Pool, database_url: str) -> None:
    await seed(database, guilds=1, members=5)
    reading = [command for command in COMMANDS if command.path[:1] in (("db",), ("export",), ("doctor",))]
    writing = ("downgrade", "reset", "adopt", "seed", "psql")  # psql prints an error of its own
    harmless = [one for one in reading if one.path[-1] not in writing]
    cases = [*with_json(harmless), ["--help"], ["db"], ["db", "stats", "--help"], ["nothing", "--json"]]
    results = await run_all(tmp_path, cases, has_reader=False, DATABASE_URL=database_url)
    for arguments, (_, _, errors) in zip(cases, results, strict=True):
        assert errors.count("\n") <= 1 or arguments == ["db"], (arguments, errors)
        assert "Broken pipe" not in errors, arguments


@pytest.mark.direct("pg_dump needs a direct connection")
async def test_a_question_without_a_terminal(tmp_path: Path, database: Pool, database_url: str) -> None:
    await database.execute("INSERT INTO guilds (id, name) VALUES (41771983423143937, 'a')")
    await run_all(tmp_path, [["backup", "create"]], DATABASE_URL=database_url)
    asking = [one for one in COMMANDS if any(option.name in ("yes", "yes_destroy") for option in one.params)]
    needed = {one.path: [*one.path, *ARGUMENTS.get(one.path, ())[:1]] for one in asking}
    cases = [[*arguments, *words] for arguments in needed.values() for words in ([], ["--json"])]
    results = await run_all(tmp_path, cases, DATABASE_URL=database_url)
    codes = {(arguments[0], arguments[1]): code for arguments, (code, _, _) in zip(cases, results, strict=True)}
    assert codes.pop(("db", "maintain")) == 0  # without --yes it only lists what is due
    assert set(codes.values()) == {2}
    assert await database.fetchval("SELECT name FROM guilds") == "a"


async def test_a_store_that_hangs(tmp_path: Path, target: ConnectTarget) -> None:
    reading = [command for command in COMMANDS if command.path[0:1] == ("backup",)]
    reading += [command for command in COMMANDS if command.path in (("db", "stats"), ("doctor",))]
    async with silent_server() as address:
        results = await run_all(
            tmp_path,
            [[*command.arguments, "--json"] for command in reading],
            lines=3,
            DATABASE_URL=target.libpq_url(),
            BACKUP_URL="s3://bucket/prefix",
            AWS_ENDPOINT_URL=f"http://{address}",
            AWS_ALLOW_HTTP="true",
            AWS_ACCESS_KEY_ID="a",
            AWS_SECRET_ACCESS_KEY="b",
            AWS_REGION="us-east-1",
        )
    codes = {command.path: code for command, (code, _, _) in zip(reading, results, strict=True)}
    assert codes["db", "stats"] == 0
    assert codes["backup", "list"] == 1


@pytest.mark.exhaustive
@pytest.mark.direct("pg_dump needs a direct connection")
@pytest.mark.timeout(600)
async def test_every_option_with_a_value(tmp_path: Path, database: Pool, database_url: str) -> None:
    await seed(database, guilds=1, members=5)
    await run_all(tmp_path, [["backup", "create"], ["import", "members.json"]], DATABASE_URL=database_url)
    cases = [
        [*command.arguments, *valid(option)]
        for command, option in OPTIONS
        if command.path and option.opts[0] not in ("--help", "--data-dir", "--yes-destroy") and option.name != "keep"
    ]
    cases += [[*case, "--json"] for case in cases if case[-1] != "--json" and case[:2] != ["db", "psql"]]
    for case in cases:  # one after the other: some change the database
        await run_all(tmp_path, [case], DATABASE_URL=database_url)
