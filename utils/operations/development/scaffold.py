"""`python bot.py new cog NAME`: writes a working cog with a table and a test, as a starting point."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from utils.exceptions import ValidationError

ROOT = Path(__file__).resolve().parents[3]
#: Also a valid slash command name: at most 32 characters (Discord API reference, "Application Command Naming").
NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")

_COG = '''"""/{name}: counts how often each member used it."""

from __future__ import annotations

import discord
from discord import app_commands

from utils.base_cog import BaseCog, Guildbook

_INCREMENT = """
INSERT INTO {name}_entries AS entry (guild_id, user_id, count) VALUES ($1, $2, 1)
ON CONFLICT (guild_id, user_id) DO UPDATE SET count = entry.count + 1
RETURNING count
"""


class {title}Cog(BaseCog):
    """Counts how often each member used the command."""

    @app_commands.command(name="{name}", description="Add one to your count")
    @app_commands.guild_only()
    async def count(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Add one and show the new count."""
        count = await self.db.fetchval(_INCREMENT, interaction.guild_id, interaction.user.id)
        await interaction.response.send_message(f"Your count is {{count}}.", ephemeral=True)


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
    """How often a member used the command in a guild."""

    __tablename__ = "{name}_entries"

    guild_id: Mapped[int] = snowflake(primary_key=True)
    user_id: Mapped[int] = snowflake(primary_key=True, erase=Erase.SUBJECT)
    count: Mapped[int] = marked(BigInteger, erase=Erase.CLEAR, server_default="0")
'''

_TEST = '''"""cogs/{name}.py: a simulated member uses the command, and the row is in the database."""

from __future__ import annotations

from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from models import Base
from models.{name} import {title}Entry
from simulator import Limits, Simulator, World
from tests.bot.running import running_bot
from utils.database import Pool


async def test_counts_each_use(database: Pool) -> None:
    # Creates the table, so that the test passes before `make migration` too.
    create = CreateTable(Base.metadata.tables[{title}Entry.__tablename__], if_not_exists=True)
    await database.execute(str(create.compile(dialect=postgresql.dialect())))  # type: ignore[no-untyped-call]
    world = World(seed=1)
    guild_id = world.add_guild(members=5)
    user_id = world.guild(guild_id).owner_id
    async with (
        Simulator(world, limits=Limits.none()) as simulator,
        running_bot(database, simulator, extensions=["cogs.{name}"]),
    ):
        for count in (1, 2):
            result = await simulator.run_command("{name}", user_id=user_id, guild_id=guild_id)
            await result.wait_done()
            assert result.content == f"Your count is {{count}}."
        rows = await database.fetch("SELECT guild_id, user_id, count FROM {name}_entries")
    assert [tuple(row) for row in rows] == [(guild_id, user_id, 2)]
'''

_FILES = {"cogs/{name}.py": _COG, "models/{name}.py": _MODEL, "tests/test_{name}.py": _TEST}


def new_cog(name: str, root: Path = ROOT) -> list[Path]:
    """Write the files of a new cog under `root` and return their paths relative to it.

    A name consists of lower-case letters, digits and underscores, starts with a letter and is not a Python keyword.
    Raises `ValidationError`, without writing anything, if the name is invalid or taken or a file cannot be written.
    """
    if not NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ValidationError(
            f"{name[:50]!r} is not a valid name for a cog: use 1 to 32 lower-case letters, digits and underscores,"
            " starting with a letter, and no Python keyword"
        )
    words = {"name": name, "title": "".join(word.capitalize() for word in name.split("_"))}
    files = {Path(path.format(**words)): text.format(**words) for path, text in _FILES.items()}
    existing = [path for path in (*files, Path("cogs", name), Path("models", name)) if (root / path).exists()]
    if existing:
        raise ValidationError(f"{name!r} is taken, choose another name: {', '.join(map(str, existing))} exists")
    written: list[Path] = []
    try:
        for path, text in files.items():
            with (root / path).open("x", encoding="utf-8") as file:
                written.append(path)
                file.write(text)
    except OSError as exc:
        for path in written:
            (root / path).unlink(missing_ok=True)
        raise ValidationError(f"cannot write {exc.filename or root}: {exc.strerror}") from exc
    return written
