"""Documents that do not fit their model any more: repaired or set aside, and never lost."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, model_validator

from tests.documents.models import Counter, Item, Shop, Verbs
from utils.database import Pool
from utils.documents import Documents
from utils.documents.codec import Codec
from utils.exceptions import DocumentError

INSERT = "INSERT INTO documents (guild_id, namespace, key, value) VALUES (0, $1, $2, $3)"


class Grown(BaseModel):
    """A model that refuses as a whole."""

    low: int = 0
    high: int = 10

    @model_validator(mode="after")
    def _ordered(self) -> Grown:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "utils.documents.documents"]


async def test_parts_that_do_not_fit_get_their_defaults_once_and_the_original_is_kept(
    database: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    shops = Documents(Verbs(database), "shop", Shop)
    stored = {"title": 5, "tax": 0.5, "items": [{"name": "a"}, {"price": 2}, {"name": "c", "price": "?"}], "old": 1}
    await database.execute(INSERT, "shop", "x", stored)
    fits = Shop(tax=0.5, items=[Item(name="a"), Item(name="c")])
    assert [await shops.get("x"), await shops.find("x"), (await shops.list())[0][1]] == [fits] * 3
    row = await database.fetchrow("SELECT * FROM documents")
    assert row is not None
    assert row["value"] == {"tax": 0.5, "items": [{"name": "a"}, {"name": "c"}], "old": 1}
    assert (row["quarantined"], row["version"]) == (stored, 2)
    assert row["problem"].startswith("title: Input should be a valid string; items.1.name: Field required; items.2.pr")
    (line,) = told(caplog)
    assert line.startswith("document 'x' of shop does not fit Shop any more and was repaired: title")


async def test_what_cannot_be_repaired_counts_as_absent_and_stays(
    database: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    store = Documents(Verbs(database), "grown", Grown)
    await database.execute(INSERT, "grown", "x", {"low": 20})
    assert await store.get("x") == Grown()
    assert await store.find("x") is None
    assert await store.list() == []
    row = await database.fetchrow("SELECT value, quarantined, problem FROM documents")
    assert row is not None
    assert tuple(row) == ({"low": 20}, {"low": 20}, "the whole: Value error, low is above high")
    (line,) = told(caplog)
    assert "does not fit Grown any more and counts as absent: the whole" in line


async def test_an_update_of_what_was_set_aside_begins_with_the_defaults_and_keeps_the_original(
    database: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    store = Documents(Verbs(database), "grown", Grown)
    await database.execute(INSERT, "grown", "x", {"low": 20})
    assert await store.update("x", low=3) == Grown(low=3) == await store.get("x")
    assert await database.fetchval("SELECT quarantined FROM documents") == {"low": 20}
    assert len(told(caplog)) == 1


async def test_a_model_that_fits_again_gets_its_value_back(database: Pool) -> None:
    await database.execute(INSERT, "grown", "x", {"low": 20})
    assert await Documents(Verbs(database), "grown", Grown).find("x") is None

    class Older(BaseModel):
        low: int

    assert await Documents(Verbs(database), "grown", Older).get("x") == Older(low=20)


async def test_without_a_default_what_does_not_fit_is_an_error(database: Pool) -> None:
    items = Documents(Verbs(database), "items", Item)
    await database.execute(INSERT, "items", "x", {"name": 5, "price": 3})
    with pytest.raises(DocumentError, match="Item has no default"):
        await items.get("x")
    assert await database.fetchval("SELECT quarantined FROM documents") == {"name": 5, "price": 3}
    await items.set("x", Item(name="apple"))
    assert await items.get("x") == Item(name="apple")


async def test_a_page_is_full_although_some_documents_count_as_absent(database: Pool) -> None:
    store = Documents(Verbs(database), "grown", Grown)
    for number in range(10):
        await database.execute(INSERT, "grown", f"k{number}", {"low": 20 if number % 3 else number})
    assert [key for key, _ in await store.list(limit=3)] == ["k0", "k3", "k6"]
    assert [key for key, _ in await store.list(after="k6", limit=3)] == ["k9"]


async def test_a_transaction_that_only_reads_is_not_broken_by_a_repair(database: Pool) -> None:
    await database.execute(INSERT, "counters", "x", {"count": "many"})
    async with database.transaction(readonly=True) as conn:
        store = Documents(_OnConnection(conn), "counters", Counter)
        assert await store.get("x") == Counter()
        assert await store.get("x") == Counter()
    assert await database.fetchval("SELECT value FROM documents") == {"count": "many"}


@pytest.mark.parametrize(
    ("stored", "repaired"),
    [
        ('{"tax": null}', "{}"),
        ('{"sold": {"a": 1, "b": "x"}}', '{"sold": {"a": 1}}'),
        ('{"items": [1, {"name": "a"}, [], {"name": null}]}', '{"items": [{"name": "a"}]}'),
        ('{"items": 5, "sold": []}', "{}"),
        ('{"items": {"0": 1}}', "{}"),
        ("[]", None),
        ("5", None),
        ("null", None),
    ],
)
def test_a_repair_drops_no_more_than_does_not_fit(stored: str, repaired: str | None) -> None:
    result = Codec(Shop).repair(stored)
    assert (None if result is None else result[0]) == repaired


class _OnConnection:
    """The verbs of `bot.db` inside a transaction."""

    def __init__(self, conn: Any) -> None:
        self.conn: Any = conn

    async def fetch(self, sql: str, /, *args: Any) -> Any:
        return await self.conn.fetch(sql, *args)

    async def fetchrow(self, sql: str, /, *args: Any, use_cache: bool = True) -> Any:
        return await self.conn.fetchrow(sql, *args)

    async def fetchval(self, sql: str, /, *args: Any, use_cache: bool = True) -> Any:
        return await self.conn.fetchval(sql, *args)
