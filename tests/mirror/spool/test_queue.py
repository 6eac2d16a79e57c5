"""The queue of events: in order, in memory or on disk, and never more than memory may hold."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mirror.tables import when
from utils.mirror.records.events import Event, Membership, Message
from utils.mirror.spool.journal import Journal
from utils.mirror.spool.queue import EventQueue, SpoolMode, decode_records

BOUND = 20.0


def event(stamp: int) -> Event:
    if stamp % 3:
        return Message(stamp, 1, 2, 1_000 + stamp)
    return Membership(stamp, 1, 2, "leave", when(stamp), when(stamp))


def told(first: int, last: int) -> list[Event]:
    return [event(stamp) for stamp in range(first, last + 1)]


async def test_without_a_spool_the_oldest_is_given_up_when_memory_is_full(caplog: pytest.LogCaptureFixture) -> None:
    queue = EventQueue(None, spool="off", max_rows=5)
    for each in told(1, 8):
        queue.add(each)
    assert (await queue.peek(100)).events == told(4, 8)
    assert (queue.dropped, len(queue), queue.is_spilled) == (3, 5, False)
    assert caplog.text.count("events are lost") == 1
    queue.spill()
    assert (await queue.peek(100)).events == told(4, 8)


@pytest.mark.parametrize("spool", ["outage", "always"])
async def test_what_memory_does_not_hold_is_on_disk_until_it_is_committed(tmp_path: Path, spool: SpoolMode) -> None:
    journal = await Journal.open(tmp_path, "ours", max_bytes=2**20)
    queue = EventQueue(journal, spool=spool, max_rows=5)
    for each in told(1, 9):
        queue.add(each)
        assert queue.in_memory <= 6 + journal.unwritten
    assert await journal.wait_written(BOUND)
    assert (queue.is_spilled, len(queue), queue.in_memory) == (True, 9, 0)
    assert queue.age > 0
    assert await queue.peek(4) == (told(1, 4), 4)
    await queue.discard(4)
    assert await queue.peek(100) == (told(5, 9), 9)
    await queue.discard(9)
    assert (queue.is_spilled, len(queue), queue.age) == (False, 0, 0.0)
    queue.add(event(10))
    assert (await queue.peek(100)).events == told(10, 10)
    assert journal.records == (1 if spool == "always" else 0)
    await journal.close(BOUND)


async def test_what_is_spooled_always_is_there_after_a_kill(tmp_path: Path) -> None:
    journal = await Journal.open(tmp_path, "ours", max_bytes=2**20)
    queue = EventQueue(journal, spool="always", max_rows=100)
    for each in told(1, 9):
        queue.add(each)
    assert await journal.wait_written(BOUND)
    await queue.discard(3)
    await journal.close(BOUND)
    left = await Journal.adopt(tmp_path / "ours")
    assert left is not None
    assert decode_records(await left.read(3, 100)) == (told(4, 9), 9)
    await left.close(BOUND)


async def test_events_are_given_up_only_when_neither_disk_nor_memory_takes_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = await Journal.open(tmp_path, "ours", max_bytes=1)
    queue = EventQueue(journal, spool="outage", max_rows=5)
    for each in told(1, 20):
        queue.add(each)
    assert queue.dropped > 0
    assert len(queue) + queue.dropped == 20
    assert not queue.is_crowded or journal.failure is None
    assert "events are lost" in caplog.text
    await journal.close(0.1)


def test_what_is_no_event_is_left_out_of_what_a_journal_holds(caplog: pytest.LogCaptureFixture) -> None:
    assert decode_records([(1, b"no event"), (2, b"[1,2,3]"), (3, b"[]")]) == ([Message(2, 1, 2, 3)], 3)
    assert "invalid event in the journal" in caplog.text


@settings(max_examples=80)
@given(
    steps=st.lists(st.sampled_from(["add", "add", "add", "spill", "settle", "commit", "fail"]), max_size=60),
    spool=st.sampled_from(["outage", "always", "off"]),
    data=st.data(),
)
async def test_every_event_comes_out_once_and_in_order(steps: list[str], spool: SpoolMode, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        journal = await Journal.open(Path(name), "ours", max_bytes=2**20, segment_bytes=100)
        queue = EventQueue(None if spool == "off" else journal, spool=spool, max_rows=1_000)
        stamp, written = 0, list[Event]()
        for step in steps:
            if step == "add":
                stamp += 1
                queue.add(event(stamp))
            elif step == "spill":
                queue.spill()
            elif step == "settle":
                assert await journal.wait_written(BOUND)
            else:
                limit = data.draw(st.integers(1, 9), label="limit")
                oldest = await queue.peek(limit)
                if step == "commit" and oldest.upto:
                    written += oldest.events
                    await queue.discard(oldest.upto)
            assert len(queue) == stamp - len(written)
        while (oldest := await queue.peek(7)).upto:
            written += oldest.events
            await queue.discard(oldest.upto)
        assert written == told(1, stamp)
        await journal.close(BOUND)
