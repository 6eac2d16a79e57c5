"""Steps for people, and the audit log: what is recorded, and how long it is kept."""

from __future__ import annotations

import json
from typing import Any

import pytest

from utils.database import Pool
from utils.operations import action
from utils.operations.action import Step, prune_actions, record_action

INSERT = "INSERT INTO ops.admin_actions (at, command, result) SELECT now() - $1::text::interval, $2, ''"


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (Step("checking"), "checking"),
        (Step("reading", 1_234), "reading: 1,234 rows"),
        (Step("reading", 1), "reading: 1 row"),
        (Step("restoring", 0, 21, "tables"), "restoring: 0 of 21 tables"),
        (Step("restoring", 1, 1, "tables"), "restoring: 1 of 1 table"),
        (Step("uploading", 12_300_000, 45_600_000, "bytes"), "uploading: 12.3 of 45.6 MB"),
        (Step("uploading", 900, 45_600_000, "bytes"), "uploading: 900 B of 45.6 MB"),
        (Step("uploading", 0, 45_600_000, "bytes"), "uploading: 0 B of 45.6 MB"),
        (Step("copying", 45_600, None, "bytes"), "copying: 45.6 kB"),
    ],
)
def test_steps_are_in_units_of_people(step: Step, text: str) -> None:
    assert str(step) == text


async def recorded(database: Pool) -> tuple[dict[str, Any], str]:
    row = await database.fetchrow("SELECT arguments, result FROM ops.admin_actions ORDER BY id DESC LIMIT 1")
    assert row is not None
    return row["arguments"], row["result"]


async def test_what_is_recorded_is_bounded(database: Pool) -> None:
    arguments = {"name": "x" * 6_000, "tables": ["y" * 6_000] * 500, "number": 5, "none": None}
    await record_action(database, "test", arguments, "z" * 100_000)
    stored, result = await recorded(database)
    assert len(json.dumps(stored)) <= action.ARGUMENTS_LENGTH + 100
    assert (len(result), result[-1]) == (action.RESULT_LENGTH, "…")
    await record_action(database, "test", {"name": "x" * 6_000, "names": ["y"] * 500, "number": 5, "none": None}, "")
    stored, _ = await recorded(database)
    assert stored["name"] == "x" * (action.ARGUMENT_LENGTH - 1) + "…"
    assert stored["names"] == [*["y"] * action.ARGUMENT_ITEMS, "and 480 more"]
    assert (stored["number"], stored["none"]) == (5, None)


async def test_what_cannot_be_stored_is_replaced(database: Pool) -> None:
    await record_action(database, "test", {"name": "a\x00\ud83d"}, "b\x00")
    assert await recorded(database) == ({"name": "a\ufffd\ufffd"}, "b\ufffd")


async def test_old_rows_are_deleted_in_batches(database: Pool) -> None:
    for days in range(395, 406):
        await database.execute(INSERT, f"{days} days 1 hour", f"day {days}")
    await database.execute(INSERT, "500 days", action.BEGIN_ANEW)
    assert await prune_actions(database, batch=2) == 6
    rows = await database.fetch("SELECT command FROM ops.admin_actions ORDER BY at DESC")
    assert [row["command"] for row in rows] == [*(f"day {days}" for days in range(395, 400)), action.BEGIN_ANEW]
    assert await prune_actions(database) == 0


async def test_rows_beyond_the_bound_are_deleted_by_their_time(database: Pool) -> None:
    for age in (3, 1, 2, 5, 4):  # a restore adds older rows with newer ids
        await database.execute(INSERT, f"{age} hours", f"age {age}")
    await database.execute(INSERT, "9 hours", action.BEGIN_ANEW)
    assert await prune_actions(database, keep_rows=3, batch=1) == 2
    rows = await database.fetch("SELECT command FROM ops.admin_actions ORDER BY at DESC")
    assert [row["command"] for row in rows] == ["age 1", "age 2", "age 3", action.BEGIN_ANEW]
