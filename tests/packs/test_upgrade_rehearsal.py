"""Years of upgrades of Guildbook and of a pack, with the commands that an operator types: no SQL by hand.

`make test` goes through those of the pack. `make test-all` also pulls Guildbook, in a clone of an older one, where
every command is a Python of its own; tests/packs/test_revisions.py has the same upgrades and downgrades in one process.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.conftest import sampled
from tests.docs.test_first_cog import cloned_sources
from tests.forkserver import BotCommand, start_bot
from tests.operations.migrations.support import HEAD, KNOWN
from utils.database import ConnectTarget
from utils.demo.bot_process import environment

pytestmark = pytest.mark.slow

#: What the older Guildbook has.
OLD_HEAD = KNOWN[-4]
COLUMN = "    note: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)\n"


class Operator:
    """Types commands in a clone of Guildbook, or of the Guildbook that is tested, with a pack beside it."""

    def __init__(self, directory: Path, pack: Path, target: ConnectTarget, *, is_clone: bool) -> None:
        self.directory, self.pack, self.target, self.is_clone = directory, pack, target, is_clone
        self.packs = ""

    async def types(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """Type a command, check its exit code, and return its result."""
        settings = {"COGS": self.packs, "DATABASE_URL": self.target.libpq_url()}
        if self.is_clone:
            process: asyncio.subprocess.Process | BotCommand = await asyncio.create_subprocess_exec(
                sys.executable, "bot.py", *arguments, "--json", cwd=self.directory, env=environment(**settings),
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
        else:
            process = await start_bot(self.directory, *arguments, "--json", settings=settings, is_merged=False)
        async with asyncio.timeout(90):
            output, errors = await process.communicate()
        assert await process.wait() == code, f"{arguments}\n{output.decode()}\n{errors.decode()}"
        result: dict[str, Any] = json.loads(output)
        return result

    async def sees_a_sound_database(self, revision: str, pack_revision: str) -> None:
        """The older one has the newer one's models here, and so it says that these are ahead."""
        status = await self.types("db", "status", code=0 if revision == HEAD else 1)
        (pack,) = status["packs"]
        assert (status["revision"], status["pending"]) == (revision, [])
        assert (pack["revisions"], pack["pending"], pack["drift"]) == ([pack_revision], [], [])


@pytest.fixture
async def connection(empty_target: ConnectTarget) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """For looking at rows."""
    connection = await asyncpg.connect(**empty_target.connect_kwargs())
    yield connection
    await connection.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("is_pulled", sampled([False, True], [False]), ids=["the pack", "Guildbook and the pack"])
async def test_a_pack_survives_upgrades_downgrades_two_heads_and_a_squashed_merge(
    empty_target: ConnectTarget,
    connection: asyncpg.Connection[asyncpg.Record],
    tmp_path: Path,
    is_pulled: bool,
) -> None:
    directory, newest = tmp_path / "guildbook", []
    pulled = tmp_path / "pulled"
    pulled.mkdir()
    if is_pulled:
        await asyncio.to_thread(cloned_sources, directory)
        newest = [path for path in (directory / "migrations/versions").glob("*.py") if path.name[:4] in KNOWN[-3:]]
        for path in newest:
            shutil.move(path, pulled / path.name)
    else:
        directory.mkdir()
    operator = Operator(directory, tmp_path / "economy", empty_target, is_clone=is_pulled)
    versions = operator.pack / "economy/migrations/versions"

    # An author begins with the older Guildbook, and soon has a second revision, and rows.
    await operator.types("new", "pack", "economy", "--directory", str(operator.pack))
    operator.packs = str(operator.pack)
    model = operator.pack / "economy/models.py"
    model.write_text(model.read_text().replace("import BigInteger", "import BigInteger, Text") + COLUMN)
    second = Path((await operator.types("pack", "migration", "economy", "-m", "add a note"))["file"])
    await operator.types("db", "upgrade")
    await connection.execute("INSERT INTO economy_entries VALUES (1, 2, 3, 'x'), (1, 3, 5, NULL)")
    before = await rows(connection)
    await operator.sees_a_sound_database(OLD_HEAD if is_pulled else HEAD, second.name[:17])
    if is_pulled:
        await pull_guildbook(operator, newest, pulled, second.name[:17])
        assert await rows(connection) == before

    # Two developers write a revision each, on branches of their own.
    anna = Path((await operator.types("pack", "migration", "economy", "-m", "from anna", "--empty"))["file"])
    shutil.move(anna, tmp_path / anna.name)
    ben = Path((await operator.types("pack", "migration", "economy", "-m", "from ben", "--empty"))["file"])
    shutil.move(tmp_path / anna.name, anna)
    (problem,) = (await operator.types("db", "upgrade", code=1))["problems"]
    assert "pack merge economy" in problem
    merge = Path((await operator.types("pack", "merge", "economy"))["file"])
    assert len((await operator.types("db", "upgrade"))["applied"]) == 3
    await operator.sees_a_sound_database(HEAD, merge.name[:17])

    # The branches are merged with a squash: one revision stands for the three, here and in new databases.
    for path in (anna, ben, merge):
        path.unlink()
    squashed = versions / "economy_0009_squashed.py"
    squashed.write_text(
        f'"""From anna and ben."""\n\nrevision = "economy_0009"\ndown_revision = "{second.name[:17]}"\n'
        f'replaces = ("{merge.name[:17]}",)\n\n\n'
        "def upgrade() -> None:\n    pass\n\n\ndef downgrade() -> None:\n    pass\n"
    )
    assert (await operator.types("db", "upgrade"))["applied"] == []
    await operator.sees_a_sound_database(HEAD, "economy_0009")
    reverted = await operator.types("pack", "downgrade", "economy", second.name[:17], "--yes")
    assert reverted["taken_back"] == ["economy_0009"]
    assert (await operator.types("db", "upgrade"))["applied"] == ["economy_0009"]
    assert await rows(connection) == before

    # The pack goes; its tables follow when asked.
    operator.packs = ""
    (left,) = (await operator.types("db", "status"))["packs"]
    assert (left["is_active"], left["relations"]) == (False, ["economy_entries"])
    dropped = await operator.types("pack", "drop", "economy", "--yes")
    assert dropped["dropped"] == ["economy_entries"]
    assert dropped["backup"]
    assert (await operator.types("db", "status"))["packs"] == []


async def pull_guildbook(operator: Operator, newest: list[Path], pulled: Path, pack_revision: str) -> None:
    """Go three revisions of Guildbook on, and back, and on again."""
    name = str(operator.target.database)
    for path in newest:
        shutil.copy(pulled / path.name, path)
    status = await operator.types("db", "status", code=1)
    assert [revision["revision"] for revision in status["pending"]] == KNOWN[-3:]
    assert (await operator.types("db", "upgrade"))["applied"] == KNOWN[-3:]
    await operator.sees_a_sound_database(HEAD, pack_revision)
    refused = await operator.types("db", "downgrade", KNOWN[-5], "--yes-destroy", name, code=1)
    assert f"pack economy needs revision {OLD_HEAD} of Guildbook, which this would revert" in refused["error"]
    await operator.types("db", "downgrade", OLD_HEAD, "--yes-destroy", name)
    for path in newest:
        path.unlink()
    await operator.sees_a_sound_database(OLD_HEAD, pack_revision)
    for path in newest:
        shutil.copy(pulled / path.name, path)
    await operator.types("db", "upgrade")


async def rows(connection: asyncpg.Connection[asyncpg.Record]) -> list[tuple[Any, ...]]:
    """Return what is in the table of the pack."""
    return [tuple(row) for row in await connection.fetch("SELECT * FROM economy_entries ORDER BY user_id")]
