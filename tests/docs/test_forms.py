"""Every form of docs/reference/documented-forms.md works as it is written there, in a cog and over the wire."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from docs.forms import FORMS
from models import Base
from simulator import Simulator, World
from tests.bot.running import running_bot, wait_until_mirrored
from utils.bot.registrations import remove_tables
from utils.database import Pool

MODULE = "tests.docs.documented_forms"
SOURCE = Path(__file__).with_name("documented_forms.py").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def without_tables_afterwards() -> Iterator[None]:
    """Remove the table that the cog declares: other tests compare all declared tables with the database."""
    yield
    remove_tables(MODULE)


@pytest.mark.guilds(8)
async def test_every_section_runs_over_the_wire(database: Pool, simulator: Simulator, world: World) -> None:
    (guild_id,) = world.guilds
    owner = world.guild(guild_id).owner_id
    async with running_bot(database, simulator, extensions=[MODULE]):
        create = CreateTable(Base.metadata.tables["documented_cases"])
        await database.execute(str(create.compile(dialect=postgresql.dialect())))  # type: ignore[no-untyped-call]
        await wait_until_mirrored(database, simulator)
        answers = {}
        for section in FORMS:
            # A method may not be named as `BaseCog.documents`.
            name = "documents_" if section == "Documents" else section
            result = await simulator.run_command("forms", user_id=owner, guild_id=guild_id, options={"section": name})
            await result.wait_done(30)
            answers[section] = result.final_content
    assert answers == dict.fromkeys(FORMS, "ok")


def test_every_form_stands_in_the_cog_as_it_is_written() -> None:
    missing = [form.code for forms in FORMS.values() for form in forms if form.code not in SOURCE]
    assert missing == []
