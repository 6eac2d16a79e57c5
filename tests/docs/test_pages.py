"""What the README and the pages under docs/ tell people to type works."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import discord
import obstore.store
import pytest
from obstore.exceptions import BaseError, UnknownConfigurationKeyError

from simulator import Limits, Simulator, World
from tests.bot.running import embedded_server, run_cli, run_python, running_bot, wait_until_mirrored
from tests.conftest import IS_EXHAUSTIVE
from tests.docs.blocks import PAGES, REHEARSAL, ROOT, Block, blocks
from utils.database import Pool
from utils.mirror.discord.permissions import invite_url
from utils.operations.migrations.batches import in_batches
from utils.settings import load_settings, variables

#: Railway reads these itself.
RAILWAYS = ("RAILWAY_DEPLOYMENT_DRAINING_SECONDS", "RAILWAY_DEPLOYMENT_OVERLAP_SECONDS", "RAILWAY_RUN_UID")
#: Stores of backups read these from the environment: obstore's configuration keys.
STORES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL")


def test_every_block_has_a_tested_language() -> None:
    # text: the demo's output is compared in tests/demo, the invitation below. json: examples of files to import, tried
    # in tests/operations/importing/test_shapes.py.
    tried = ("sh", "dotenv", "sql", "python", "text", "json")
    assert [f"{block}: {block.language!r}" for block in blocks() if block.language not in tried] == []


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_every_command_can_be_typed(block: Block, tmp_path: Path) -> None:
    # Not run in earnest: the targets take minutes and are what CI runs, or need a token or a container engine.
    # `make -n` shows that a target exists and that make understands its rules with these arguments.
    for line in block.text.splitlines():
        program, *arguments = shlex.split(line)
        if program == "python":
            continue  # below
        if program == "make":
            command = ["make", "-n", f"PYTHON={sys.executable}", *arguments]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
            assert done.returncode == 0, f"{block}: {line}: {done.stderr}"
        elif program == "cp":
            source, target = arguments
            shutil.copy(ROOT / source, tmp_path / target)
            load_settings(tmp_path / target)
        elif program == "docker":
            _check_docker(block, arguments)
        elif program == "pg_restore":
            continue  # tests/operations/migrations/test_by_hand.py
        elif program == "railway":
            assert arguments == ["ssh"], f"{block}: {line}"
        else:
            pytest.fail(f"{block}: nobody tries {line!r}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    sorted({block.page for block in blocks("sh") if "python bot.py" in block.text} - {REHEARSAL}),
    ids=lambda page: str(page.relative_to(ROOT)),
)
async def test_commands_of_a_page_succeed_in_order(page: Path, tmp_path: Path) -> None:
    """Every `python bot.py …` of a page, on a database with something in it, and the files that they name."""
    entry = {"join_date": "2024-05-01", "roles": ["5"], "statistics": {"message_count": 7}}
    (tmp_path / "members.json").write_text(json.dumps({"1_2": entry}))
    (tmp_path / "shop.json").write_text(json.dumps({"hat": {"price": 3}}))
    async with embedded_server(tmp_path / load_settings(None).data_dir):
        await _run_commands(page, tmp_path)


async def _run_commands(page: Path, tmp_path: Path) -> None:
    # In forks, which start at once. A newcomer types those of the README, each in a Python of its own: here the first
    # of each block and what loads most, and all of them in `make test-all`.
    for arguments in (("db", "upgrade"), ("db", "seed", "--members", "30")):
        code, output = await run_cli(tmp_path, *arguments)
        assert code == 0, output
    for block in blocks("sh"):
        for number, line in enumerate(block.text.splitlines() if block.page == page else ()):
            is_typed = page.name == "README.md" and (IS_EXHAUSTIVE or number == 0 or "drill" in line)
            run = run_python if is_typed else run_cli
            program, _, *rest = shlex.split(line, comments=True) if line.startswith("python") else ("", "")
            if program and rest != ["doctor"]:
                code, output = await run(tmp_path, *rest)
                assert code == 0, f"{block}: {line}: {output}"
            elif program:  # there is no Discord to be reached
                code, output = await run(tmp_path, *rest)
                assert "ok    database: " in output, output


def test_a_revision_of_the_docs_can_be_read() -> None:
    texts = [block.text for block in blocks("python") if "def upgrade" in block.text]
    assert len(texts) == 1
    called: list[tuple[Any, ...]] = []
    module: dict[str, Any] = {"op": "op", "revision": "0009"}
    exec(texts[0], module)
    module["in_batches"] = lambda *args, **named: called.append((args, named))
    module["upgrade"]()
    ((args, named),) = called
    inspect.signature(in_batches).bind(*args, **named)


def _check_docker(block: Block, arguments: list[str]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    if arguments[0] == "build":
        for source in re.findall(r"^COPY (?!\. )(\S+)", dockerfile, re.MULTILINE):
            assert (ROOT / source).exists(), f"Dockerfile: {source}"
    else:
        workdir = re.search(r"^WORKDIR (\S+)", dockerfile, re.MULTILINE)
        assert workdir is not None
        volume = arguments[arguments.index("--volume") + 1].partition(":")[2]
        assert Path(volume) == Path(workdir[1]) / load_settings(None).data_dir, str(block)
        stop = float(arguments[arguments.index("--stop-timeout") + 1])
        assert stop > load_settings(None).shutdown_seconds, str(block)


@pytest.mark.parametrize("block", blocks("dotenv"), ids=str)
def test_every_variable_that_is_named_is_read(block: Block) -> None:
    for line in block.text.splitlines():
        assert line.partition("=")[0] in (*variables(), *RAILWAYS, *STORES), f"{block}: {line}"


RAILWAY_PAGE = ROOT / "docs" / "how-to" / "railway.md"
STORE_VARIABLES = sorted(
    set(re.findall(r"\b(?:AWS|GOOGLE|AZURE)_[A-Z_]+", RAILWAY_PAGE.read_text(encoding="utf-8"))) - {"AWS_ALLOW_HTTP"}
)


@pytest.mark.parametrize("variable", STORE_VARIABLES)
def test_every_variable_of_a_store_is_read_by_it(variable: str) -> None:
    url = {"AWS": "s3://bucket/x", "GOOGLE": "gs://bucket/x", "AZURE": "az://box/x"}[variable.partition("_")[0]]
    try:
        obstore.store.from_url(url, config={variable.lower(): "true"})  # type: ignore[call-overload]
    except UnknownConfigurationKeyError:
        pytest.fail(f"{RAILWAY_PAGE.name}: {variable}")
    except BaseError:
        return  # it wants another value, or others besides


@pytest.mark.slow
async def test_every_query_runs(database: Pool) -> None:
    world = World(seed=3)
    guild_id = world.add_guild(members=50)
    async with Simulator(world, limits=Limits.none()) as simulator, running_bot(database, simulator):
        await wait_until_mirrored(database, simulator)
        world.leave(guild_id, next(id for id in world.guild(guild_id).members if id != world.bot.id))
        await wait_until_mirrored(database, simulator)
    for block in blocks("sql"):
        for statement in block.text.split(";"):
            if statement.strip():
                try:
                    await database.fetch(statement)
                except asyncpg.PostgresError as exc:
                    pytest.fail(f"{block}: {exc}: {statement}")


async def test_every_cog_works(database: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world = World(seed=3)
    guild_id = world.add_guild(members=50)
    package = tmp_path / "cogs_of_the_docs"
    package.mkdir()
    (package / "__init__.py").touch()
    cogs = [block for block in blocks("python") if "def setup" in block.text]
    for number, block in enumerate(cogs):
        (package / f"cog{number}.py").write_text(block.text)
    monkeypatch.syspath_prepend(tmp_path)
    names = [f"{package.name}.cog{number}" for number, _ in enumerate(cogs)]
    async with (
        Simulator(world, limits=Limits.none()) as simulator,
        running_bot(database, simulator, extensions=names) as bot,
    ):
        assert sorted(bot.extensions) == sorted(names)
        for command in simulator.interactions.commands():
            result = await simulator.run_command(
                command["name"], user_id=world.guild(guild_id).owner_id, guild_id=guild_id
            )
            await result.wait_done()
            assert (result.final_content or "").count(", since ") == 5


def test_the_invitation_asks_for_what_it_says() -> None:
    address = next(block.text for block in blocks("text") if block.text.startswith("https://"))
    assert address.strip() == invite_url("APPLICATION_ID")
    query = parse_qs(urlsplit(address.strip()).query)
    wanted = discord.Permissions(view_channel=True, read_message_history=True, manage_threads=True, view_audit_log=True)
    assert query["permissions"] == [str(wanted.value)]
    assert query["scope"] == ["bot applications.commands"]


def test_every_link_within_the_repository_leads_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_target_of_the_makefile_is_explained() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    explained = re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)
    assert sorted(explained) == sorted(phony[1].split())
    assert [name for name in explained if name not in ("help", "setup") and not _sets_up(makefile, name)] == []


def _sets_up(makefile: str, target: str) -> bool:
    return re.search(rf"^{target}: setup\b", makefile, re.MULTILINE) is not None


def test_ci_runs_lint_and_tests() -> None:
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert lines[-2:] == ["make lint", "make test"]
