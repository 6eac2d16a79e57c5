"""Documents: round trips, defaults, versions, listings and validation."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import discord
import pytest
from pydantic import BaseModel, ConfigDict, Field, RootModel, computed_field

from tests.documents.models import Counter, Item, PoolQueries, Shop
from utils.database import Pool
from utils.documents import Documents
from utils.exceptions import DocumentConflict, DocumentError

GUILD = 81384788765712384


@pytest.fixture
def shops(database: Pool) -> Documents[Shop]:
    """Documents without a guild."""
    return Documents(PoolQueries(database), "shop", Shop).everywhere()


async def test_get_returns_defaults_without_storing_them(shops: Documents[Shop]) -> None:
    assert await shops.get("main") == Shop()
    assert await shops.find("main") is None
    assert await shops.version("main") == 0
    assert await shops.count() == 0


async def test_get_returns_a_fresh_instance(shops: Documents[Shop]) -> None:
    shop = Shop(title="Pie", items=[Item(name="apple", price=3)], sold={"apple": 2})
    await shops.set("main", shop)
    first = await shops.get("main")
    assert first == shop
    first.items.clear()
    assert await shops.find("main") == shop


async def test_separates_guilds_namespaces_and_keys(shops: Documents[Shop]) -> None:
    of_guild, other = shops.guild(GUILD), Documents(shops.db, "other", Shop).everywhere()
    await of_guild.set(GUILD, Shop(title="here"))
    assert (await shops.get(GUILD, guild_id=GUILD)).title == (await of_guild.get(str(GUILD))).title == "here"
    assert await shops.find(GUILD) is await of_guild.find(1) is await other.find(GUILD, GUILD) is None
    assert [await store.count() for store in (of_guild, shops, other)] == [1, 0, 0]


async def test_scopes_are_separate(shops: Documents[Shop]) -> None:
    bare, person = Documents(shops.db, "shop", Shop), discord.Object(7)
    scopes = [
        bare.everywhere(), bare.guild(GUILD), bare.guild(5), bare.user(person), bare.user(8), bare.member(GUILD, 7),
        bare.member(GUILD, 8), bare.member(5, person),
    ]  # fmt: skip
    for number, scope in enumerate(scopes):
        assert await scope.find("a") is None
        await scope.set("a", Shop(title=f"{number}"))
        await scope.update("b", title=f"{number}")
    for number, scope in enumerate(scopes):
        assert (await scope.get("a")).title == f"{number}"
        assert [(key, shop.title) for key, shop in await scope.list()] == [("a", f"{number}"), ("b", f"{number}")]
        assert [key for key, _ in await scope.list("b")] == [key for key, _ in await scope.list(after="a")] == ["b"]
        assert [key for key, _ in await scope.list(limit=1)] == ["a"]
        assert await scope.count() == 2
    assert await scopes[5].delete("a")
    assert [await scope.count() for scope in scopes] == [2, 2, 2, 2, 2, 1, 2, 2]
    assert (await bare.get("a", GUILD)).title == (await bare.get("a", guild_id=GUILD)).title == "1"
    assert (await bare.get("a", guild_id=0)).title == "0"


async def test_leaving_out_the_guild_never_means_everywhere(shops: Documents[Shop]) -> None:
    bare, in_direct_message = Documents(shops.db, "shop", Shop), None
    for call in (
        bare.get("a"), bare.find("a", in_direct_message), bare.version("a"), bare.set("a", Shop()), bare.delete("a"),
        bare.update("a", title="b"), bare.count(), bare.list(),
    ):  # fmt: skip
        with pytest.raises(DocumentError, match=r"whose document of shop\? .*everywhere\(\)"):
            await call
    assert await shops.count() == 0
    for wrong in (0, None, -5):
        with pytest.raises(DocumentError, match=r"is no id; everywhere\(\)"):
            bare.guild(wrong)  # type: ignore[arg-type]
    with pytest.raises(DocumentError, match="are of a user"):
        await bare.user(7).get("a", GUILD)
    with pytest.raises(DocumentError, match=r"use user\(id\) or member"):
        await shops.set("@user:7/a", Shop())


async def test_a_dict_is_no_document(shops: Documents[Shop]) -> None:
    with pytest.raises(DocumentError, match="it is a dict, not a Shop"):
        await shops.guild(GUILD).set("a", {})  # type: ignore[arg-type]


async def test_missing_document_without_defaults_is_an_error(shops: Documents[Shop]) -> None:
    items = Documents(shops.db, "items", Item).guild(GUILD)
    with pytest.raises(DocumentError, match=rf"no document 'x' of items in guild {GUILD}, and Item has no .*\(name"):
        await items.get("x")
    with pytest.raises(DocumentError, match="set it first"):
        await items.update("x", price=3)
    assert await items.find("x") is None


async def test_update_sets_fields_and_calls_function(shops: Documents[Shop]) -> None:
    assert await shops.update("main", title="Pie") == Shop(title="Pie")

    def sell(shop: Shop) -> None:
        shop.sold["apple"] = shop.sold.get("apple", 0) + 1

    await shops.update("main", sell)
    both = await shops.update("main", lambda shop: shop.model_copy(update={"tax": 0.5}), title="Cake")
    assert both == await shops.get("main") == Shop(title="Cake", tax=0.5, sold={"apple": 1})


async def test_failed_update_changes_nothing(shops: Documents[Shop]) -> None:
    await shops.set("main", Shop(title="Pie"))

    def fail(shop: Shop) -> None:
        shop.title = "Cake"
        raise LookupError("sold out")

    with pytest.raises(LookupError, match="sold out"):
        await shops.update("main", fail)
    with pytest.raises(DocumentError, match="Shop has no field colour, size"):
        await shops.update("main", size=3, colour="red")
    with pytest.raises(DocumentError, match="'main' of shop cannot be stored: tax: Input should be a valid number"):
        await shops.update("main", tax="much")
    assert await shops.get("main") == Shop(title="Pie")


async def test_set_with_version_detects_conflicts(shops: Documents[Shop]) -> None:
    first = await shops.set("main", Shop(), version=0)
    with pytest.raises(DocumentConflict, match="'main' of shop no longer has version 0"):
        await shops.set("main", Shop(title="lost"), version=0)
    second = await shops.set("main", Shop(title="Pie"), version=first)
    assert second == await shops.version("main") > first
    with pytest.raises(DocumentConflict):
        await shops.set("main", Shop(title="lost"), version=first)
    assert await shops.set("main", Shop(title="Cake")) > second


async def test_recreated_document_gets_a_new_version(shops: Documents[Shop]) -> None:
    before = await shops.set("main", Shop())
    assert await shops.delete("main")
    assert not await shops.delete("main")
    assert await shops.set("main", Shop(title="another")) > before
    with pytest.raises(DocumentConflict):
        await shops.set("main", Shop(title="lost"), version=before)


async def test_list_pages_in_code_point_order(shops: Documents[Shop]) -> None:
    keys = ["A", "B", "a", "a1", "a\ud7ff", "a\ue000", "a\U0010ffff", "a\U0010ffff!", "b", "ä", "\U0001f382"]
    for key in reversed(keys):
        await shops.set(key, Shop(title=key))
    await shops.set("other", Shop(), GUILD)
    seen: list[str] = []
    while page := await shops.list(after=seen[-1] if seen else None, limit=3):
        assert all(value.title == key for key, value in page)
        seen += [key for key, _ in page]
    assert seen == keys == sorted(keys)
    assert [key for key, _ in await shops.list("a")] == [key for key in keys if key.startswith("a")]
    assert [key for key, _ in await shops.list("a\ud7ff")] == ["a\ud7ff"]
    assert [key for key, _ in await shops.list("a\U0010ffff", limit=1)] == ["a\U0010ffff"]
    assert [key for key, _ in await shops.list("a", after="a\ue000")] == ["a\U0010ffff", "a\U0010ffff!"]
    assert await shops.list("\U0010ffff") == await shops.list(limit=0) == []
    assert [key for key, _ in await shops.list(guild_id=GUILD)] == ["other"]


@pytest.mark.parametrize("key", ["", "x" * 256, "a\0", "\ud800"])
async def test_rejects_invalid_key(shops: Documents[Shop], key: str) -> None:
    with pytest.raises(DocumentError, match="invalid key"):
        await shops.get(key)


@pytest.mark.parametrize("namespace", ["", "my shop", "shop\0", "x" * 101])
async def test_rejects_invalid_namespace(shops: Documents[Shop], namespace: str) -> None:
    with pytest.raises(DocumentError, match="invalid namespace"):
        Documents(shops.db, namespace, Shop)


async def test_rejects_value_larger_than_one_megabyte(shops: Documents[Shop]) -> None:
    room = 2**20 - len(Shop(title="").model_dump_json())
    await shops.set("main", Shop(title="x" * room))
    with pytest.raises(DocumentError, match=r"has 1,048,577 bytes as JSON, the maximum is 1,048,576: split it"):
        await shops.set("main", Shop(title="x" * (room + 1)))
    assert len((await shops.get("main")).title) == room


class Anything(BaseModel):
    """A model that accepts any value."""

    value: Any = None


@pytest.mark.parametrize("value", [object(), 10**5000, {"deep": b"\xff"}], ids=type)
async def test_rejects_value_that_is_not_json(database: Pool, value: Any) -> None:
    store = Documents(PoolQueries(database), "any", Anything).everywhere()
    with pytest.raises(DocumentError, match="cannot be stored: it cannot be represented as JSON"):
        await store.set("x", Anything(value=value))
    assert await store.count() == 0


@pytest.mark.parametrize("tax", [float("nan"), float("-inf")])
async def test_rejects_nan_and_infinity(shops: Documents[Shop], tax: float) -> None:
    with pytest.raises(DocumentError, match="cannot be represented as JSON"):
        await shops.update("main", tax=tax)


async def test_rejects_value_invalidated_after_validation(shops: Documents[Shop]) -> None:
    shop = Shop()
    shop.tax = "much"  # type: ignore[assignment]
    with pytest.raises(DocumentError, match="tax: Input should be a valid number"):
        await shops.set("main", shop)


async def test_replaces_nul_and_lone_surrogates(database: Pool) -> None:
    store = Documents(PoolQueries(database), "any", Anything).everywhere()
    await store.set("x", Anything(value={"a\0\ud800": ["b\udfff", {"\0": 1}]}))
    assert (await store.get("x")).value == {"a\ufffd\ufffd": ["b\ufffd", {"\ufffd": 1}]}


class Awkward(BaseModel):
    """A model whose round trip is difficult: strict, frozen, aliases, computed fields."""

    model_config = ConfigDict(strict=True, extra="forbid", serialize_by_alias=True, frozen=True)

    at: datetime | None = None
    amount: Decimal = Decimal(0)
    big: int = Field(default=0, alias="Big")
    tags: set[str] = set()
    pair: tuple[int, float] = (0, 0.0)
    by_id: dict[int, str] = {}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def doubled(self) -> int:
        """Twice `big`."""
        return self.big * 2


async def test_round_trips_strict_models_and_aliases(database: Pool) -> None:
    store = Documents(PoolQueries(database), "awkward", Awkward).everywhere()
    value = Awkward(
        at=datetime(2026, 1, 2, tzinfo=UTC), amount=Decimal("0.10"), Big=2**80 + 1, tags={"a"}, pair=(1, 1e300),
        by_id={GUILD: "x"},
    )  # fmt: skip
    await store.set("x", value)
    assert await store.get("x") == value
    assert (await store.update("x", tags={"b"})).doubled == 2**81 + 2
    assert (await store.get("x")).tags == {"b"}


async def test_list_can_be_a_document(database: Pool) -> None:
    store = Documents(PoolQueries(database), "lists", RootModel[list[int]]).everywhere()
    await store.set("x", RootModel[list[int]]([1, 2]))
    assert (await store.get("x")).root == [1, 2]


async def test_set_is_one_statement_and_update_two(database: Pool) -> None:
    queries = PoolQueries(database)
    store = Documents(queries, "counters", Counter).everywhere()
    await store.set("x", Counter())
    assert queries.statements == 1
    await store.update("x", count=2)
    assert queries.statements == 3
