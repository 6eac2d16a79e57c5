"""Rows and values of an author's types, and `fetchval(column=)`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
from pydantic import BaseModel, Field

from models import User
from tests.database.access import PUT, accessed
from utils.database import Pool
from utils.database.access import Database
from utils.exceptions import ValidationError

ALL = "SELECT item, price FROM shelf ORDER BY item"


class Model(BaseModel):
    item: str
    price: int | None = Field(ge=0)


@dataclass
class Data:
    item: str
    price: int | None


class Named(NamedTuple):
    item: str
    price: int | None = None


@pytest.fixture
async def db(database: Pool) -> AsyncIterator[Database]:
    async with accessed(database) as access:
        await access.executemany(PUT, [("apple", 1), ("pear", None)])
        yield access


@pytest.mark.parametrize("cls", [Model, Data, Named])
async def test_rows_become_the_given_type(db: Database, cls: Any) -> None:
    for _ in range(2):  # the second time from the cache
        expected = [cls(item="apple", price=1), cls(item="pear", price=None)]
        assert await db.fetch(ALL, as_=cls) == expected
        assert await db.fetchrow(ALL, as_=cls) == expected[0]
        assert await db.fetchrow(f"{ALL} OFFSET 9", as_=cls) is None


async def test_typed_rows_are_the_readers_own(db: Database) -> None:
    first = await db.fetch(ALL, as_=Data)
    first[0].item = "changed"
    assert (await db.fetch(ALL, as_=Data))[0].item == "apple"


async def test_values_of_columns(db: Database) -> None:
    assert await db.fetchval(ALL, column=1) == await db.fetchval(ALL, column="price") == 1
    assert await db.fetchval(f"{ALL} OFFSET 9", column=1) is None
    assert await db.fetchval(ALL, column="price", as_=float) == 1.0
    assert await db.fetchval("SELECT NULL", as_=int) is None
    for column in (2, "weight"):
        with pytest.raises(ValidationError, match="the query returns item, price"):
            await db.fetchval(ALL, column=column)


async def test_what_does_not_fit_is_named_without_values(db: Database) -> None:
    await db.execute(PUT, "secret", -5)
    with pytest.raises(ValidationError, match=r"does not fit Model \(price: Input should be greater") as raised:
        await db.fetch(ALL, as_=Model)
    assert "secret" not in str(raised.value)
    with pytest.raises(ValidationError, match="item: Field required"):
        await db.fetchrow("SELECT price FROM shelf", as_=Model)
    with pytest.raises(ValidationError, match="as_=User: a table's model is read by a repository"):
        await db.fetchrow("SELECT 1", as_=User)
    with pytest.raises(ValidationError, match="as_=Database: use a pydantic model"):
        await db.fetchrow(ALL, as_=Database)
