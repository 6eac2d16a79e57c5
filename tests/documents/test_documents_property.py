"""Property tests of documents: no update is lost, and any JSON value round-trips."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from tests.conftest import examples
from tests.documents.models import PoolQueries
from utils.database import Pool
from utils.documents import Documents
from utils.text import scrub_payload


class Ledger(BaseModel):
    """A list of numbers to append to."""

    entries: list[int] = []


class Anything(BaseModel):
    """A model that accepts any value."""

    value: Any = None


KEYS = st.sampled_from(["x", "y"])
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=()))
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=5),
    max_leaves=20,
)


def with_floats(found: Any, expected: Any) -> Any:
    """Convert numbers back to floats where `expected` has floats: `jsonb` writes 1e22 without an exponent."""
    if isinstance(found, list):
        return [with_floats(*pair) for pair in zip(found, expected, strict=True)]
    if isinstance(found, dict):
        return {key: with_floats(value, expected[key]) for key, value in found.items()}
    return float(found) if isinstance(expected, float) else found


@examples(20)
@given(adds=st.lists(KEYS, max_size=40), invalid=st.sets(KEYS), existing=st.sets(KEYS))
async def test_concurrent_updates_are_never_lost(
    database: Pool, adds: list[str], invalid: set[str], existing: set[str]
) -> None:
    await database.execute("TRUNCATE documents")
    stores = [Documents(PoolQueries(database), "ledger", Ledger).everywhere() for _ in range(3)]
    for key in existing | invalid:
        await stores[0].set(key, Ledger())
    if invalid:
        await database.execute(
            "UPDATE documents SET value = '{\"entries\": 5}' WHERE key = ANY($1::text[])", sorted(invalid)
        )

    async def add(number: int, key: str) -> None:
        def append(ledger: Ledger) -> None:
            ledger.entries.append(number)

        await stores[number % len(stores)].update(key, append)

    await asyncio.gather(*(add(number, key) for number, key in enumerate(adds)))
    for key in ("x", "y"):
        expected = [number for number, chosen in enumerate(adds) if chosen == key]
        assert sorted((await stores[0].get(key)).entries) == expected


@examples(20)
@given(steps=st.lists(st.sampled_from(["add", "add", "delete", "replace"]), max_size=30))
async def test_updates_build_on_stored_values_despite_deletions(database: Pool, steps: list[str]) -> None:
    """What an update returns extends a value that was stored before."""
    await database.execute("TRUNCATE documents")
    store = Documents(PoolQueries(database), "ledger", Ledger).everywhere()
    results: list[list[int]] = [[]]

    async def step(number: int, kind: str) -> None:
        if kind == "delete":
            await store.delete("x")
        elif kind == "replace":
            results.append([-number])
            await store.set("x", Ledger(entries=[-number]))
        else:
            changed = await store.update("x", lambda ledger: Ledger(entries=[*ledger.entries, number]))
            results.append(changed.entries)

    await asyncio.gather(*(step(number, kind) for number, kind in enumerate(steps)))
    assert all(entries[:-1] in results for entries in results[1:])
    # No two updates extend the same value, except the empty one after a deletion.
    built = [tuple(entries[:-1]) for entries in results[1:] if len(entries) > 1]
    assert len(built) == len(set(built))


@examples(60)
@given(value=JSON)
async def test_round_trips_any_json(database: Pool, value: Any) -> None:
    store = Documents(PoolQueries(database), "any", Anything).everywhere()
    await store.set("x", Anything(value=value))
    found = (await store.get("x")).value
    assert with_floats(found, scrub_payload(value)) == scrub_payload(value)
    assert dict(await store.list())["x"].value == found


@examples(40)
@given(
    keys=st.sets(st.text(min_size=1, max_size=6), max_size=15),
    prefix=st.text(max_size=2),
    limit=st.integers(1, 4),
    of_user=st.booleans(),
)
async def test_pages_are_the_sorted_keys_with_the_prefix(
    database: Pool, keys: set[str], prefix: str, limit: int, of_user: bool
) -> None:
    await database.execute("TRUNCATE documents")
    stores = Documents(PoolQueries(database), "any", Anything)
    store, other = (stores.user(7), stores.everywhere()) if of_user else (stores.everywhere(), stores.user(7))
    await other.set("another's", Anything())
    keys = {key for key in keys if "\0" not in key and (of_user or not key.startswith("@user:"))}
    prefix = prefix.replace("\0", "")
    for key in keys:
        await store.set(key, Anything())
    seen: list[str] = []
    while page := await store.list(prefix, seen[-1] if seen else None, limit):
        seen += [key for key, _ in page]
    assert seen == sorted(key for key in keys if key.startswith(prefix))
