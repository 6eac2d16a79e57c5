"""`python bot.py new cog NAME`: a cog that works, its table and its test, to be changed into what is wanted."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from utils.exceptions import ValidationError

ROOT = Path(__file__).resolve().parents[3]
#: A slash command's name has 32 characters at most (Discord API reference, "Application Command Naming").
NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")

_COG = '''"""/{name}: counts how often each member used it."""

from __future__ import annotations

import discord
from discord import app_commands

from utils.bot.client import Guildbook
from utils.base_cog import BaseCog

_COUNT = """
INSERT INTO {name}_entries AS entry (guild_id, user_id, count) VALUES ($1, $2, 1)
ON CONFLICT (guild_id, user_id) DO UPDATE SET count = entry.count + 1
RETURNING count
"""


class {title}Cog(BaseCog):
    """Counts for each member."""

    @app_commands.command(name="{name}", description="Add one to your count")
    @app_commands.guild_only()
    async def count(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Add one, and answer with the sum."""
        count = await self.db.fetchval(_COUNT, interaction.guild_id, interaction.user.id)
        await interaction.response.send_message(f"That makes {{count}}.", ephemeral=True)


async def setup(bot: Guildbook) -> None:
    """Add the cog."""
    await bot.add_cog({title}Cog(bot))
'''

_MODEL = '''"""The table of cogs/{name}.py."""

from __future__ import annotations

from sqlalchemy import BigInteger
from sqlalchemy.orm import Mapped

from models.base import Base, Erase, marked, snowflake


class {title}Entry(Base):
    """How often a member of a guild used the command."""

    __tablename__ = "{name}_entries"

    guild_id: Mapped[int] = snowflake(primary_key=True)
    user_id: Mapped[int] = snowflake(primary_key=True, erase=Erase.SUBJECT)
    count: Mapped[int] = marked(BigInteger, erase=Erase.CLEAR, server_default="0")
'''

_TEST = '''"""cogs/{name}.py, over the wire: a simulated member uses the command, and the row is in the database."""

from __future__ import annotations

import pytest
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from models import Base
from models.{name} import {title}Entry
from simulator import Limits, Simulator, World
from tests.bot.running import running
from utils.database import Pool


async def test_every_use_counts(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    # So that the test can be run before `make migration` as well.
    create = CreateTable(Base.metadata.tables[{title}Entry.__tablename__], if_not_exists=True)
    await database.execute(str(create.compile(dialect=postgresql.dialect())))  # type: ignore[no-untyped-call]
    world = World(seed=1)
    guild_id = world.add_guild(members=5)
    user_id = world.guild(guild_id).owner_id
    async with (
        Simulator(world, limits=Limits.none()) as simulator,
        running(database, simulator, monkeypatch, extensions=["cogs.{name}"]),
    ):
        for count in (1, 2):
            result = await simulator.run_command("{name}", user_id=user_id, guild_id=guild_id)
            await result.wait_done()
            assert result.content == f"That makes {{count}}."
        rows = await database.fetch("SELECT guild_id, user_id, count FROM {name}_entries")
    assert [tuple(row) for row in rows] == [(guild_id, user_id, 2)]
'''

_FILES = {"cogs/{name}.py": _COG, "models/{name}.py": _MODEL, "tests/test_{name}.py": _TEST}


def new_cog(name: str, root: Path = ROOT) -> list[Path]:
    """Write the files of a new cog under `root`; return their paths in it. Raises `ValidationError` and writes nothing.

    A name is lower-case letters, digits and underscores, begins with a letter and is no keyword of Python's.
    """
    if not NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ValidationError(
            f"{name[:50]!r} cannot be the name of a cog: expected 1 to 32 lower-case letters, digits and underscores,"
            " a letter first, and no keyword of Python's"
        )
    words = {"name": name, "title": "".join(word.capitalize() for word in name.split("_"))}
    files = {Path(path.format(**words)): text.format(**words) for path, text in _FILES.items()}
    taken = [path for path in (*files, Path("cogs", name), Path("models", name)) if (root / path).exists()]
    if taken:
        raise ValidationError(f"{name!r} is taken: {', '.join(map(str, taken))} exists already; choose another name")
    written: list[Path] = []
    try:
        for path, text in files.items():
            with (root / path).open("x", encoding="utf-8") as file:
                written.append(path)
                file.write(text)
    except OSError as exc:
        for path in written:
            (root / path).unlink(missing_ok=True)
        raise ValidationError(f"{exc.filename or root} cannot be written: {exc.strerror}") from exc
    return written
