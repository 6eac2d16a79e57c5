"""The database is given to another application, by an operator, while no bot acts on it."""

from __future__ import annotations

import pytest

from tests.leases import seize
from utils.database import Pool
from utils.exceptions import GuildbookError, ValidationError
from utils.operations.upkeep.adopt import adopt
from utils.service import application


async def test_gives_the_database_to_another_application(database: Pool) -> None:
    assert (await adopt(database, 1)).data == {"application_id": 1, "former": None}
    outcome = await adopt(database, 2)
    assert outcome.data == {"application_id": 2, "former": 1}
    assert "before, to application 1" in outcome.text
    assert await application.claim(database, 1) == await application.fetch_owner(database) == 2
    assert "already" in (await adopt(database, 2)).text


async def test_is_refused_while_a_bot_acts(database: Pool) -> None:
    await application.claim(database, 1)
    await seize(database, "a-bot")
    await database.execute("UPDATE ops.leases SET expires_at = clock_timestamp() + interval '1 minute'")
    with pytest.raises(GuildbookError, match="a-bot acts on this database"):
        await adopt(database, 2)
    assert await application.fetch_owner(database) == 1


@pytest.mark.parametrize("id", [0, -1, 2**63])
async def test_refuses_what_is_no_id(database: Pool, id: int) -> None:
    with pytest.raises(ValidationError, match="is not an application's id"):
        await adopt(database, id)
