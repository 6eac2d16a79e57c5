"""A listing under way: complete only when every announced page has come, and never waited for without a bound."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.mirror.tables import GUILD, when
from utils.database import Pool
from utils.exceptions import SyncError
from utils.mirror import mirror as module
from utils.mirror.reconcile.listing import Listing
from utils.mirror.reconcile.reconciler import ReconcilePolicy
from utils.mirror.records.rows import Row
from utils.mirror.spool.queue import EventQueue
from utils.mirror.translate.pages import Page
from utils.mirror.write.overlay import LiveOverlay
from utils.mirror.write.writer import FlushPolicy
from utils.service.lease import Fence

SOON = 0.01


def listing(touched: LiveOverlay | None = None) -> Listing:
    return Listing(
        GUILD, stamp=10, source="gateway", reason="request", started_at=when(0),
        overlay=touched or LiveOverlay(), on_malformed=lambda error: None,
    )  # fmt: skip


def chunk(index: int, count: int, *ids: int) -> dict[str, Any]:
    members: list[Any] = [{"user": {"id": str(id), "username": "u"}, "roles": [], "joined_at": None} for id in ids]
    return {"guild_id": str(GUILD), "chunk_index": index, "chunk_count": count, "members": members}


async def drained(found: Listing) -> list[Page]:
    pages = []
    while (page := await found.next_page(SOON)) is not None:
        pages.append(page)
    return pages


def shown(pages: list[Page]) -> list[int]:
    return sorted(record[1] for page in pages for record in page.members)


@given(data=st.data())
async def test_every_order_and_repetition_of_all_pages_is_complete_and_each_page_counts_once(
    data: st.DataObject,
) -> None:
    count = data.draw(st.integers(1, 6), label="pages")
    order = data.draw(st.permutations(range(count)), label="order")
    repeated = data.draw(st.lists(st.sampled_from(range(count)), max_size=4), label="repeated")
    found = listing()
    for position, index in enumerate(order):
        assert not found.is_complete
        found.add_chunk(chunk(index, count, index + 1))
        for again in repeated:
            if again in order[: position + 1]:
                found.add_chunk(chunk(again, count, again + 1))
    assert found.is_complete
    assert shown(await drained(found)) == list(range(1, count + 1))
    assert (found.pages, found.seen) == (count, count)


@given(data=st.data())
async def test_no_listing_with_a_page_missing_is_complete(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 6), label="pages")
    missing = data.draw(st.integers(0, count - 1), label="missing")
    found = listing()
    for index in data.draw(st.permutations([index for index in range(count) if index != missing]), label="order"):
        found.add_chunk(chunk(index, count, index + 1))
        found.add_chunk(chunk(index, count, index + 1))
    assert not found.is_complete
    with pytest.raises(SyncError, match=f"{count - 1} of {count} received"):
        await drained(found)


@pytest.mark.parametrize(("index", "count"), [(1, 4), (3, 3), (-1, 3), (0, 0), (5, 3)])
async def test_pages_that_contradict_one_another_prove_nothing(index: int, count: int) -> None:
    found = listing()
    found.add_chunk(chunk(0, 3, 1))
    found.add_chunk(chunk(index, count, 2))
    assert not found.is_complete
    with pytest.raises(SyncError):
        await drained(found)


async def test_the_wait_for_a_page_has_a_bound_and_says_what_had_come() -> None:
    with pytest.raises(SyncError, match=r"no page within 0\.01 s; 0 received"):
        await listing().next_page(SOON)


async def test_a_page_ends_the_wait_for_it() -> None:
    found = listing()
    waiting = asyncio.create_task(found.next_page(5))
    await asyncio.sleep(0)
    found.add_chunk(chunk(0, 1, 1))
    page = await waiting
    assert page is not None
    assert shown([page]) == [1]
    assert await found.next_page(SOON) is None


async def test_a_failure_ends_the_wait_and_hides_the_pages_that_had_come() -> None:
    found = listing()
    found.add_chunk(chunk(0, 2, 1))
    found.fail(SyncError("the socket dropped"))
    found.fail(SyncError("a later one"))
    with pytest.raises(SyncError, match="the socket dropped"):
        await found.next_page(5)
    other = listing()
    waiting = asyncio.create_task(other.next_page(5))
    await asyncio.sleep(0)
    other.fail(SyncError("the socket dropped"))
    with pytest.raises(SyncError):
        await waiting


async def test_a_failure_after_the_last_page_takes_nothing_from_the_proof() -> None:
    found = listing()
    found.add_chunk(chunk(0, 1, 1))
    found.fail(SyncError("too late"))
    assert shown(await drained(found)) == [1]


async def test_whoever_waits_for_room_is_released_by_a_page_taken_a_failure_and_the_end() -> None:
    async def fails(found: Listing) -> None:
        found.fail(SyncError("x"))

    async def ends(found: Listing) -> None:
        found.close()

    for release in (lambda found: found.next_page(5), fails, ends):
        found = listing()
        found.add_chunk(chunk(0, 3, 1))
        found.add_chunk(chunk(1, 3, 2))
        waiting = asyncio.create_task(found.wait_for_room(2))
        await asyncio.sleep(0)
        assert not waiting.done()
        await release(found)
        await asyncio.wait_for(waiting, 5)


async def test_the_gateway_is_not_held_up_again_by_a_listing_that_no_page_is_taken_from(
    database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each message would wait for as long again, and the session die of unanswered heartbeats."""
    monkeypatch.setattr(module, "PAUSE_SECONDS", SOON)
    found = listing()
    for index in range(8):
        found.add_chunk(chunk(index, 8, index + 1))
    mirror = module.Mirror(
        database, None, Fence("nobody", 1), EventQueue(None, spool="off", max_rows=1_000), shards=1,  # type: ignore[arg-type]
        flush_policy=FlushPolicy(), reconcile_policy=ReconcilePolicy(page_timeout=1.0, cooldown=0),
    )  # fmt: skip
    mirror.reconciler.listings["nonce"] = found
    await mirror._pause()
    assert found.pages_waiting < module.PAGES_WAITING or found._error is not None


async def test_who_was_touched_and_who_could_not_be_read_is_spared() -> None:
    touched = LiveOverlay()
    touched.open("listing")
    touched.add(Row("members", (GUILD, 1), {}), 9)
    touched.add(Row("members", (GUILD, 2), {}), 11)
    found = listing(touched)
    broken = chunk(0, 2, 4)
    broken["members"].append({"user": {"id": "3"}})
    found.add_chunk(broken)
    assert found.protected_ids() == {2, 3}
    broken = chunk(1, 2, 5)
    broken["members"].append(None)
    found.add_chunk(broken)
    assert found.protected_ids() is None
