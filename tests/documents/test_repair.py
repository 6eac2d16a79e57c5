"""Documents that no longer fit their model are repaired or quarantined, never lost."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, model_validator

from tests.documents.models import Counter, Item, PoolQueries, Shop
from utils.database import Pool
from utils.documents import Documents
from utils.documents.codec import Codec
from utils.exceptions import DocumentError

INSERT = "INSERT INTO documents (guild_id, namespace, key, value) VALUES (0, $1, $2, $3)"


class Grown(BaseModel):
    """A model whose validator rejects the document as a whole."""

    low: int = 0
    high: int = 10

    @model_validator(mode="after")
    def _ordered(self) -> Grown:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "utils.documents.documents"]


async def test_repair_defaults_invalid_parts_and_keeps_original(
    database: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    shops = Documents(PoolQueries(database), "shop", Shop).everywhere()
    stored = {"title": 5, "tax": 0.5, "items": [{"name": "a"}, {"price": 2}, {"name": "c", "price": "?"}], "old": 1}
    await database.execute(INSERT, "shop", "x", stored)
    fits = Shop(tax=0.5, items=[Item(name="a"), Item(name="c")])
    assert [await shops.get("x"), await shops.find("x"), (await shops.list())[0][1]] == [fits] * 3
    row = await database.fetchrow("SELECT * FROM documents")
    assert row is not None
    assert row["value"] == {"tax": 0.5, "items": [{"name": "a"}, {"name": "c"}], "old": 1}
    assert (row["quarantined"], row["version"]) == (stored, 2)
    assert row["problem"].startswith("title: Input should be a valid string; items.1.name: Field required; items.2.pr")
    (line,) = messages(caplog)
    assert line.startswith("document 'x' of shop no longer fits Shop and was repaired: title")


async def test_unrepairable_document_counts_as_absent(database: Pool, caplog: pytest.LogCaptureFixture) -> None:
    store = Documents(PoolQueries(database), "grown", Grown).everywhere()
    await database.execute(INSERT, "grown", "x", {"low": 20})
    assert await store.get("x") == Grown()
    assert await store.find("x") is None
    assert await store.list() == []
    row = await database.fetchrow("SELECT value, quarantined, problem FROM documents")
    assert row is not None
    assert tuple(row) == ({"low": 20}, {"low": 20}, "document: Value error, low is above high")
    (line,) = messages(caplog)
    assert "no longer fits Grown and counts as absent: document" in line


async def test_update_of_quarantined_document_starts_from_defaults(
    database: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    store = Documents(PoolQueries(database), "grown", Grown).everywhere()
    await database.execute(INSERT, "grown", "x", {"low": 20})
    assert await store.update("x", low=3) == Grown(low=3) == await store.get("x")
    assert await database.fetchval("SELECT quarantined FROM documents") == {"low": 20}
    assert len(messages(caplog)) == 1


async def test_quarantined_value_is_used_again_if_it_fits(database: Pool) -> None:
    await database.execute(INSERT, "grown", "x", {"low": 20})
    assert await Documents(PoolQueries(database), "grown", Grown).everywhere().find("x") is None

    class Older(BaseModel):
        low: int

    assert await Documents(PoolQueries(database), "grown", Older).everywhere().get("x") == Older(low=20)


async def test_unrepairable_document_without_defaults_is_an_error(database: Pool) -> None:
    items = Documents(PoolQueries(database), "items", Item).everywhere()
    await database.execute(INSERT, "items", "x", {"name": 5, "price": 3})
    with pytest.raises(DocumentError, match="Item has no default"):
        await items.get("x")
    assert await database.fetchval("SELECT quarantined FROM documents") == {"name": 5, "price": 3}
    await items.set("x", Item(name="apple"))
    assert await items.get("x") == Item(name="apple")


async def test_page_is_filled_despite_absent_documents(database: Pool) -> None:
    store = Documents(PoolQueries(database), "grown", Grown).everywhere()
    for number in range(10):
        await database.execute(INSERT, "grown", f"k{number}", {"low": 20 if number % 3 else number})
    assert [key for key, _ in await store.list(limit=3)] == ["k0", "k3", "k6"]
    assert [key for key, _ in await store.list(after="k6", limit=3)] == ["k9"]


async def test_repair_does_not_write_in_read_only_transaction(database: Pool) -> None:
    await database.execute(INSERT, "counters", "x", {"count": "many"})
    async with database.transaction(readonly=True) as conn:
        store = Documents(_ConnectionQueries(conn), "counters", Counter).everywhere()
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
def test_repair_removes_only_invalid_parts(stored: str, repaired: str | None) -> None:
    result = Codec(Shop).repair(stored)
    assert (None if result is None else result[0]) == repaired


class _ConnectionQueries:
    """The interface of `bot.db` on a connection inside a transaction."""

    def __init__(self, conn: Any) -> None:
        self.conn: Any = conn

    async def fetch(self, sql: str, /, *args: Any) -> Any:
        return await self.conn.fetch(sql, *args)

    def forget(self, sql: str, /, *args: Any) -> None: ...

    async def fetchrow(
        self, sql: str, /, *args: Any, use_cache: bool = True, stale_if_error: float | None = None
    ) -> Any:
        return await self.conn.fetchrow(sql, *args)

    async def fetchval(self, sql: str, /, *args: Any, use_cache: bool = True) -> Any:
        return await self.conn.fetchval(sql, *args)
