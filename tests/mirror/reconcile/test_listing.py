"""A member listing: complete only when every announced page was received, and every wait has a bound."""

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
from utils.mirror.discord.source import DiscordSource
from utils.mirror.reconcile.listing import Listing
from utils.mirror.reconcile.reconciler import ReconcilePolicy
from utils.mirror.records.rows import Row
from utils.mirror.spool.queue import EventQueue
from utils.mirror.translate.pages import Page
from utils.mirror.write.overlay import LiveOverlay
from utils.mirror.write.writer import FlushPolicy
from utils.service.lease import Fence

SOON = 0.01


def listing(overlay: LiveOverlay | None = None) -> Listing:
    return Listing(
        GUILD, stamp=10, source="gateway", reason="request", started_at=when(0),
        overlay=overlay or LiveOverlay(), on_malformed=lambda error: None,
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
async def test_all_pages_in_any_order_are_complete_and_count_once(
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
async def test_listing_with_a_missing_page_is_incomplete(data: st.DataObject) -> None:
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
async def test_contradicting_pages_fail_the_listing(index: int, count: int) -> None:
    found = listing()
    found.add_chunk(chunk(0, 3, 1))
    found.add_chunk(chunk(index, count, 2))
    assert not found.is_complete
    with pytest.raises(SyncError):
        await drained(found)


async def test_wait_for_a_page_times_out_and_names_what_came() -> None:
    with pytest.raises(SyncError, match=r"no page within 0\.01 s; 0 received"):
        await listing().next_page(SOON)


async def test_page_ends_the_wait() -> None:
    found = listing()
    waiting = asyncio.create_task(found.next_page(5))
    await asyncio.sleep(0)
    found.add_chunk(chunk(0, 1, 1))
    page = await waiting
    assert page is not None
    assert shown([page]) == [1]
    assert await found.next_page(SOON) is None


async def test_failure_ends_the_wait_and_discards_pages() -> None:
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


async def test_failure_after_the_last_page_is_ignored() -> None:
    found = listing()
    found.add_chunk(chunk(0, 1, 1))
    found.fail(SyncError("too late"))
    assert shown(await drained(found)) == [1]


async def test_wait_for_room_ends_with_a_page_a_failure_or_close() -> None:
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


async def test_stuck_listing_pauses_the_gateway_only_once(database: Pool) -> None:
    """Otherwise each message would wait as long again, and the session would miss its heartbeats."""
    found = listing()
    for index in range(8):
        found.add_chunk(chunk(index, 8, index + 1))
    mirror = module.Mirror(
        database, DiscordSource(None), Fence("nobody", 1), EventQueue(None, spool="off", max_rows=1_000), shards=1,  # type: ignore[arg-type]
        flush_policy=FlushPolicy(), reconcile_policy=ReconcilePolicy(page_timeout=1.0, cooldown=0), pause_seconds=SOON,
    )  # fmt: skip
    mirror.reconciler.listings["nonce"] = found
    await mirror._wait_for_listings()
    assert found.pages_waiting < module.MAX_WAITING_PAGES or found._error is not None


async def test_protects_touched_and_unreadable_members() -> None:
    overlay = LiveOverlay()
    overlay.open("listing")
    overlay.add(Row("members", (GUILD, 1), {}), 9)
    overlay.add(Row("members", (GUILD, 2), {}), 11)
    found = listing(overlay)
    broken = chunk(0, 2, 4)
    broken["members"].append({"user": {"id": "3"}})
    found.add_chunk(broken)
    assert found.protected_ids() == {2, 3}
    broken = chunk(1, 2, 5)
    broken["members"].append(None)
    found.add_chunk(broken)
    assert found.protected_ids() is None


async def test_listing_of_which_nothing_could_be_read_is_not_complete() -> None:
    found = listing()
    found.add_page([{"user": {"id": "x"}}, {"user": {"id": "7"}}], last=True)
    await found.next_page(SOON)
    with pytest.raises(SyncError, match="none of 2 members could be read"):
        await found.next_page(SOON)


async def test_listing_notes_the_first_unreadable_member() -> None:
    found = listing()
    members = [*chunk(0, 1, 1)["members"], *({"user": {"id": str(id)}} for id in range(10, 205))]
    found.add_page(members, last=True)
    assert (found.seen, len(found.unreadable)) == (196, 195)
    assert found.first_problem is not None
    assert shown(await drained(found)) == [1]
