"""Documents during an outage, for authors who prefer old ones to an error."""

from __future__ import annotations

import asyncio
import contextvars
from contextlib import AsyncExitStack

import pytest

from tests.database.access import accessed
from tests.database.test_pool_health import behind_a_network
from tests.documents.models import Counter
from utils.database import ConnectTarget
from utils.documents import Documents
from utils.exceptions import DatabaseUnavailable

pytestmark = pytest.mark.direct("it cuts the connection to the server")


async def test_old_documents_are_returned_unless_this_process_has_changed_them(target: ConnectTarget) -> None:
    async with behind_a_network(target, 2) as (pool, network), accessed(pool, cached=False) as db:
        db.stale.patience = 0.2
        kept = Documents(db, "counters", Counter, stale_if_error=3600).guild(5)
        plain = Documents(db, "counters", Counter).guild(5)
        for key in ("read", "set", "updated", "deleted", "committed", "rolled back", "changed elsewhere"):
            await plain.set(key, Counter(count=1))
            assert (await kept.get(key)).count == 1
        assert await kept.find("absent") is None
        await plain.set("set", Counter(count=2))
        await kept.update("updated", count=2)
        await plain.delete("deleted")
        await pool.execute("UPDATE documents SET value = '{}' WHERE key = 'changed elsewhere'")

        async with AsyncExitStack() as transaction:
            await transaction.enter_async_context(db.transaction())
            await kept.set("committed", Counter(count=2))
            outside = asyncio.get_running_loop().create_task(_read(kept, "committed"), context=_empty())
            assert await outside == 1, "read again before the commit, and kept"
        with pytest.raises(LookupError):
            await db.transaction(lambda: _fail(kept))
        assert await _read(kept, "rolled back") == 1

        network.cut()
        try:
            for key in ("read", "rolled back", "changed elsewhere"):
                assert await _read(kept, key) == 1
            assert await kept.find("absent") is None
            for key in ("set", "updated", "deleted", "committed"):
                with pytest.raises(DatabaseUnavailable):
                    await kept.get(key)
            for call in (
                plain.get("read"),
                kept.set("read", Counter()),
                kept.update("read", count=3),
                kept.version("read"),
            ):
                with pytest.raises(DatabaseUnavailable):
                    await call
        finally:
            network.heal()


async def test_an_old_document_that_does_not_fit_its_model_is_returned_repaired(target: ConnectTarget) -> None:
    async with behind_a_network(target, 2) as (pool, network), accessed(pool, cached=False) as db:
        db.stale.patience = 0.2
        kept = Documents(db, "counters", Counter, stale_if_error=3600).guild(5)
        plain = Documents(db, "counters", Counter).guild(5)
        await plain.set("unfit", Counter(count=1))
        await pool.execute('UPDATE documents SET value = \'{"count": "many"}\'')
        assert await kept.get("unfit") == Counter(), "and repaired in the database, after it was read"
        network.cut()
        try:
            assert await kept.get("unfit") == Counter()
            with pytest.raises(DatabaseUnavailable):
                await plain.get("unfit")
        finally:
            network.heal()


def _empty() -> contextvars.Context:
    return contextvars.Context()


async def _read(store: Documents[Counter], key: str) -> int:
    return (await store.get(key)).count


async def _fail(store: Documents[Counter]) -> None:
    await store.set("rolled back", Counter(count=2))
    raise LookupError
