"""`python bot.py import …` and `export …`, and imports killed at random points."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.forkserver import BotCommand, start_bot
from tests.operations.importing.files import GUILD, USER, files_in, member, stored_rows
from utils.database import Pool

pytestmark = pytest.mark.slow

ENTRIES = 5_000


async def start(directory: Path, *arguments: str, **settings: str) -> BotCommand:
    return await start_bot(directory, *arguments, is_merged=False, settings={"DATA_DIR": "data", **settings})


async def run(directory: Path, *arguments: str, **settings: str) -> tuple[int | None, str, str]:
    """Run `python bot.py …` and return its exit code and what it prints."""
    process = await start(directory, *arguments, **settings)
    async with asyncio.timeout(60):
        output, errors = await process.communicate()
    return process.returncode, output.decode(), errors.decode()


async def test_import_and_export_commands(tmp_path: Path, database: Pool, database_url: str) -> None:
    whole = {f"{GUILD}_{USER + i}": member() for i in range(3)}
    (tmp_path / "members.json").write_text(json.dumps(whole))
    code, output, _ = await run(tmp_path, "import", "members.json", "--dry-run", DATABASE_URL=database_url)
    assert (code, output.count("would be written")) == (0, 1)
    code, output, _ = await run(tmp_path, "import", ".", "--json", DATABASE_URL=database_url)
    report = json.loads(output)
    assert (code, report["ok"], report["files"][0]["stats_new"]) == (0, True, 3)
    code, output, errors = await run(tmp_path, "export", "members", DATABASE_URL=database_url)
    assert (code, json.loads(output), errors) == (0, whole, "Exported 3 of documents legacy.members\n")
    arguments = ("export", "member_stats", "--format", "csv", "--guild", str(GUILD), "--to", "stats.csv")
    code, output, _ = await run(tmp_path, *arguments, DATABASE_URL=database_url)
    assert (code, output) == (0, "Exported 3 of table member_stats to stats.csv\n")
    assert (tmp_path / "stats.csv").read_text().splitlines()[0] == "guild_id,user_id,message_count,last_active_at,xp"
    done = await database.fetch("SELECT command, result FROM ops.admin_actions ORDER BY id")
    assert [row["command"] for row in done] == ["import", "import", "export", "export"]
    assert not any(str(USER) in row["result"] for row in done)


async def test_import_command_accepts_names_that_are_not_utf8(
    tmp_path: Path, database: Pool, database_url: str
) -> None:
    name = os.fsdecode(b"caf\xe9.json")
    (tmp_path / name).write_text('{"a": {}}')
    for arguments in (("import", name), ("import", name, "--json", "--dry-run"), ("import", name + "x")):
        code, output, errors = await run(tmp_path, *arguments, DATABASE_URL=database_url)
        assert code == (2 if name + "x" in arguments else 0)
        assert "caf\\xe9.json" in (output + errors).replace("\\\\", "\\")
        assert "Traceback" not in errors
    assert await database.fetchval("SELECT count(*) FROM ops.admin_actions WHERE arguments::text LIKE '%xe9%'") == 3


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (("import", "gone.json"), 2, "gone.json: no such file or directory"),
        (("import", "wrong.json"), 1, "line 2, column 8: remove the comma before the closing }"),
        (("import", "lost.json"), 1, "none of its entries could be used"),
        (("import", "lost.json", "--json"), 1, '"ok": false'),
        (("import", "partly.json"), 3, "left out: 1 (NaN and Infinity are not valid JSON)"),
        (("import", "partly.json", "--json"), 3, '"NaN and Infinity are not valid JSON": 1'),
        (("import", "latin.json"), 1, "--encoding"),
        (("import", "latin.json", "--encoding", "latin-1"), 0, "read as latin-1"),
        (("import", "latin.json", "--encoding", "latin-0"), 2, "'latin-0' is not an encoding"),
        (("import", "wrong.json", "--as", "guilds"), 2, "'guilds' is not a kind of file"),
        (("export", "legacy.nothing"), 2, "no documents in namespace legacy.nothing"),
        (("export", "member_stat"), 2, "member_stats"),
        (("export", "member_stats", "--format", "xml"), 2, "'xml' is not a format"),
        (("export", "users", "--json"), 2, "needs --to FILE"),
    ],
)
async def test_errors_are_one_line_without_traceback(
    tmp_path: Path, database_url: str, arguments: tuple[str, ...], exit_code: int, message: str
) -> None:
    (tmp_path / "wrong.json").write_text('{"a": {},\n "b":{},\n}')
    (tmp_path / "lost.json").write_text('[{"name": "x"}]')
    (tmp_path / "partly.json").write_text('{"a": {}, "b": NaN}')
    (tmp_path / "latin.json").write_bytes(b'{"caf\xe9": {}}')
    code, output, errors = await run(tmp_path, *arguments, DATABASE_URL=database_url)
    assert code == exit_code
    assert message in output + errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param((0.0, 0.4), id="two"),
        pytest.param(
            (0.0, *(random.Random(seed).random() * 0.7 for seed in range(9))), id="ten", marks=pytest.mark.exhaustive
        ),
    ],
)
async def test_killed_import_leaves_all_or_nothing(
    tmp_path: Path, database: Pool, database_url: str, moments: tuple[float, ...]
) -> None:
    """Kill imports at these moments after the originals are copied, in parts of an import's duration."""

    def content(round_: int) -> dict[str, Any]:
        statistics = {"message_count": 17 + round_, "last_active": None}
        return {f"{GUILD}_{USER + i}": member(statistics=statistics) for i in range(ENTRIES)}

    path = tmp_path / "members.json"
    path.write_text(json.dumps(content(0)))
    loop = asyncio.get_running_loop()
    started_at = loop.time()
    code, _, errors = await run(tmp_path, "import", "members.json", DATABASE_URL=database_url)
    duration = loop.time() - started_at
    assert (code, errors) == (0, "")
    last, committed = 0, set()
    for number, moment in enumerate(moments):
        path.write_text(json.dumps(content(number + 1)))
        process = await start(tmp_path, "import", "members.json", DATABASE_URL=database_url)
        # Measure from the first copied file, so that no import is killed before it does anything.
        seen = len(_directories(tmp_path))
        async with asyncio.timeout(30):
            async for _ in ticks():
                if len(_directories(tmp_path)) > seen or process.returncode is not None:
                    break
        await asyncio.sleep(moment * duration)
        if process.returncode is None:
            process.kill()
        await process.wait()
        await _wait_until_idle(database)
        counted = await database.fetch("SELECT DISTINCT message_count FROM member_stats")
        stored = await database.fetch(
            "SELECT DISTINCT value #>> '{statistics,message_count}' AS count FROM documents"
            " WHERE namespace = 'legacy.members'"
        )
        assert len(counted) == len(stored) == 1, f"import {number}: a part of a file is stored"
        assert int(stored[0]["count"]) == counted[0]["message_count"]
        assert counted[0]["message_count"] in (17 + last, 18 + number)
        committed.add(counted[0]["message_count"] == 18 + number)
        last = counted[0]["message_count"] - 17
    assert False in committed, "no import was killed before it committed"
    code, output, _ = await run(tmp_path, "import", "members.json", "--json", DATABASE_URL=database_url)
    assert code == 0
    _, stats, _ = await stored_rows(database)
    assert {row[2] for row in stats} == {17 + len(moments)}
    assert len(stats) == ENTRIES
    assert json.loads(output)["files"][0]["entries"] == ENTRIES


def _directories(directory: Path) -> list[Path]:
    return files_in(directory / "data" / "imports") if (directory / "data").exists() else []


async def _wait_until_idle(database: Pool) -> None:
    """Wait until the server has noticed the end of the process."""
    busy = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid() AND state <> 'idle'"
    )
    async with asyncio.timeout(30):
        async for _ in ticks():
            if not await database.fetchval(busy):
                break


async def ticks() -> AsyncIterator[None]:
    """Yield every 5 ms."""
    while True:
        yield
        await asyncio.sleep(0.005)
