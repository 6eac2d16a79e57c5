"""Gives the database to another Discord application."""

from __future__ import annotations

from utils.database import Pool
from utils.exceptions import ValidationError
from utils.operations.action import Outcome
from utils.service import application
from utils.service.lease import hold_as_operator
from utils.settings import DEVELOPER_PORTAL

#: The largest id that a bigint can hold.
MAX_ID = 2**63 - 1


async def adopt(pool: Pool, application_id: int) -> Outcome:
    """Give the database to an application. Its next start tombstones the guilds that it is not in.

    Raises `ValidationError` for what is no id, and `GuildbookError` while a bot acts on the database.
    """
    if not 0 < application_id <= MAX_ID:
        where = f"{DEVELOPER_PORTAL} > your application > General Information"
        raise ValidationError(f"{application_id} is not an application's id: copy it from {where}")
    async with hold_as_operator(pool):
        former = await application.transfer(pool, application_id)
    data = {"application_id": application_id, "former": former}
    if former == application_id:
        return Outcome(f"The database belongs to application {application_id} already.", data)
    was = "nobody" if former is None else f"application {former}"
    return Outcome(
        f"The database belongs to application {application_id} now; before, to {was}. Guilds that it is not in count as"
        " left from its next start on.",
        data,
    )
