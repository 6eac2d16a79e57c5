"""`python bot.py db stats`, `health` and `maintain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from utils.cli.common import AsJson, DataDir, act
from utils.database import Pool
from utils.operations.action import Outcome, Progress
from utils.settings import Settings


def register(app: typer.Typer) -> None:
    """Add the commands to `db`."""
    app.command("stats")(stats)
    app.command("maintain")(maintain)


def stats(
    picture: Annotated[Path | None, typer.Option(help="Write the picture there, as PNG.")] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Show how large the tables are, how they grow, and how the server fares."""

    async def work(settings: Settings, database: Pool, progress: Progress) -> Outcome:
        from utils.operations.upkeep.picture import draw
        from utils.operations.upkeep.statistics import collect, outcome

        found = await collect(database)
        if picture is not None:
            picture.write_bytes(await draw(found))
        return outcome(found)

    act("db stats", work, data_dir=data_dir, as_json=as_json)


def maintain(
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without it, only say what would be done.")] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Analyse, rebuild bloated indexes, refresh views, make partitions."""

    async def work(settings: Settings, database: Pool, progress: Progress) -> Outcome:
        from utils.operations.upkeep import maintain as upkeep

        return await (upkeep.maintain(database, progress=progress) if yes else upkeep.preview(database))

    act("db maintain", work, data_dir=data_dir, as_json=as_json, arguments={"yes": yes})
