"""Years of upgrades of Guildbook and of a pack, with the commands that an operator types: no SQL by hand."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.docs.test_first_cog import cloned_sources
from tests.operations.migrations.support import HEAD, KNOWN
from utils.database import ConnectTarget
from utils.demo.bot_process import environment

pytestmark = pytest.mark.slow

#: What the older Guildbook has.
OLD_HEAD = KNOWN[-4]
COLUMN = "    note: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)\n"


class Operator:
    """Types commands in a clone of Guildbook, with a pack beside it."""

    def __init__(self, clone: Path, pack: Path, target: ConnectTarget) -> None:
        self.clone, self.pack, self.target = clone, pack, target
        self.packs = str(pack)

    async def types(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """Type a command, check its exit code, and return its result."""
        settings = environment(COGS=self.packs, DATABASE_URL=self.target.libpq_url())

        def run() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "bot.py", *arguments, "--json"], cwd=self.clone, env=settings, capture_output=True,
                text=True, timeout=90, check=False,
            )  # fmt: skip

        done = await asyncio.to_thread(run)
        assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}"
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    async def sees_a_sound_database(self, revision: str, pack_revision: str) -> None:
        """The older one has the newer one's models here, and so it says that these are ahead."""
        status = await self.types("db", "status", code=0 if revision == HEAD else 1)
        (pack,) = status["packs"]
        assert (status["revision"], status["pending"]) == (revision, [])
        assert (pack["revisions"], pack["pending"], pack["drift"]) == ([pack_revision], [], [])


@pytest.mark.timeout(600)
async def test_a_pack_survives_upgrades_downgrades_two_heads_and_a_squashed_merge(
    empty_target: ConnectTarget, tmp_path: Path
) -> None:
    clone = await asyncio.to_thread(cloned_sources, tmp_path / "guildbook")
    newest = [path for path in (clone / "migrations/versions").glob("*.py") if path.name[:4] in KNOWN[-3:]]
    pulled = tmp_path / "pulled"
    pulled.mkdir()
    for path in newest:
        shutil.move(path, pulled / path.name)
    operator = Operator(clone, tmp_path / "economy", empty_target)
    versions = operator.pack / "economy/migrations/versions"

    # An author begins with the older Guildbook, and soon has a second revision, and rows.
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "bot.py", "new", "pack", "economy"], cwd=clone, env=environment(), check=False,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model = operator.pack / "economy/models.py"
    model.write_text(model.read_text().replace("import BigInteger", "import BigInteger, Text") + COLUMN)
    second = Path((await operator.types("pack", "migration", "economy", "-m", "add a note"))["file"])
    await operator.types("db", "upgrade")
    connection = await asyncpg.connect(**empty_target.connect_kwargs())
    name: str = await connection.fetchval("SELECT current_database()")

    async def rows() -> list[tuple[Any, ...]]:
        return [tuple(row) for row in await connection.fetch("SELECT * FROM economy_entries ORDER BY user_id")]

    await connection.execute("INSERT INTO economy_entries VALUES (1, 2, 3, 'x'), (1, 3, 5, NULL)")
    before = await rows()
    await operator.sees_a_sound_database(OLD_HEAD, second.name[:17])

    # Guildbook is pulled: three revisions on, and back, and on again.
    for path in newest:
        shutil.copy(pulled / path.name, path)
    status = await operator.types("db", "status", code=1)
    assert [revision["revision"] for revision in status["pending"]] == KNOWN[-3:]
    assert (await operator.types("db", "upgrade"))["applied"] == KNOWN[-3:]
    await operator.sees_a_sound_database(HEAD, second.name[:17])
    refused = await operator.types("db", "downgrade", KNOWN[-5], "--yes-destroy", name, code=1)
    assert f"pack economy needs revision {OLD_HEAD} of Guildbook, which this would revert" in refused["error"]
    await operator.types("db", "downgrade", OLD_HEAD, "--yes-destroy", name)
    for path in newest:
        path.unlink()
    await operator.sees_a_sound_database(OLD_HEAD, second.name[:17])
    for path in newest:
        shutil.copy(pulled / path.name, path)
    await operator.types("db", "upgrade")
    assert await rows() == before

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
    assert await rows() == before

    # The pack goes; its tables follow when asked.
    operator.packs = ""
    (left,) = (await operator.types("db", "status"))["packs"]
    assert (left["is_active"], left["relations"]) == (False, ["economy_entries"])
    dropped = await operator.types("pack", "drop", "economy", "--yes")
    assert dropped["dropped"] == ["economy_entries"]
    assert dropped["backup"]
    assert (await operator.types("db", "status"))["packs"] == []
    await connection.close()
