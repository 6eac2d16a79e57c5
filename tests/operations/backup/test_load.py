"""Counting and analyzing the tables of a database."""

from __future__ import annotations

import pytest

from utils.database import Pool
from utils.exceptions import DatabaseUnavailable
from utils.operations.backup import load


async def test_a_timeout_is_one_error_not_a_group(database: Pool) -> None:
    async with database.transaction() as connection:
        await connection.execute("LOCK TABLE guilds")
        for work in (
            load.count(database.target, [("public", "guilds")], timeout=0.2),
            load.analyze(database.target, [("public", "guilds")], timeout=0.2),
        ):
            with pytest.raises(DatabaseUnavailable, match="did not answer in time"):
                await work
