"""The event queue keeps order in memory and on disk, and bounds its memory."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import examples
from tests.mirror.spool.journals import TIMEOUT, adopt, open_journal
from tests.mirror.tables import when
from tests.waiting import until
from utils.mirror.records.events import Event, Membership, Message
from utils.mirror.spool.queue import EventQueue, HeldEvents, SpoolMode, decode_records


def event(stamp: int) -> Event:
    if stamp % 3:
        return Message(stamp, 1, 2, 1_000 + stamp)
    return Membership(stamp, 1, 2, "leave", when(stamp), when(stamp))


def events(first: int, last: int) -> list[Event]:
    return [event(stamp) for stamp in range(first, last + 1)]


async def test_without_a_spool_drops_the_oldest_when_full(caplog: pytest.LogCaptureFixture) -> None:
    queue = EventQueue(None, spool="off", max_rows=5)
    for each in events(1, 8):
        queue.add(each)
    assert (await queue.peek(100)).events == events(4, 8)
    assert (queue.dropped, len(queue), queue.is_spilled) == (3, 5, False)
    assert caplog.text.count("events are lost") == 1
    queue.spill()
    assert (await queue.peek(100)).events == events(4, 8)


@pytest.mark.parametrize("spool", ["outage", "always"])
async def test_spills_to_disk_until_committed(tmp_path: Path, spool: SpoolMode) -> None:
    journal = await open_journal(tmp_path)
    queue = EventQueue(journal, spool=spool, max_rows=5)
    for each in events(1, 9):
        queue.add(each)
        assert queue.in_memory <= 6 + journal.unwritten
    assert await journal.wait_written(TIMEOUT)
    assert (queue.is_spilled, len(queue), queue.in_memory) == (True, 9, 0)
    assert queue.age > 0
    assert await queue.peek(4) == (events(1, 4), 4)
    await queue.discard(4)
    assert await queue.peek(100) == (events(5, 9), 9)
    await queue.discard(9)
    assert (queue.is_spilled, len(queue), queue.age) == (False, 0, 0.0)
    queue.add(event(10))
    assert (await queue.peek(100)).events == events(10, 10)
    assert journal.records == (1 if spool == "always" else 0)
    await journal.close(TIMEOUT)


async def test_always_spooled_events_survive_a_crash(tmp_path: Path) -> None:
    journal = await open_journal(tmp_path)
    queue = EventQueue(journal, spool="always", max_rows=100)
    for each in events(1, 9):
        queue.add(each)
    assert await journal.wait_written(TIMEOUT)
    await queue.discard(3)
    await journal.close(TIMEOUT)
    left = await adopt(tmp_path / "ours")
    assert decode_records(await left.read(3, 100)) == (events(4, 9), 9)
    await left.close(TIMEOUT)


async def test_drops_events_only_if_disk_and_memory_are_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = await open_journal(tmp_path, max_bytes=1)
    queue = EventQueue(journal, spool="outage", max_rows=5)
    for each in events(1, 20):
        queue.add(each)
    assert queue.dropped > 0
    assert len(queue) + queue.dropped == 20
    assert not queue.is_crowded or journal.failure is None
    assert "events are lost" in caplog.text
    await journal.close(0.1)


@pytest.mark.parametrize("has_tail", [False, True])
async def test_only_what_no_file_has_is_lost_at_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, has_tail: bool
) -> None:
    journal = await open_journal(tmp_path, max_bytes=1, has_tail=has_tail)
    queue = EventQueue(journal, spool="always", max_rows=100)
    queue.add(event(1))
    assert await journal.wait_written(TIMEOUT)
    for each in events(2, 9):
        queue.add(each)
    lost, _ = await queue.spill_at_stop(0.05)
    await journal.close(0.05)
    left = await adopt(tmp_path / "ours")
    assert len(await left.read(0, 100)) == 9 - lost == (9 if has_tail else 1)
    assert ("8 events were not written to the spool" in caplog.text) == (not has_tail)
    await left.close(0.05)


def test_skips_invalid_journal_records(caplog: pytest.LogCaptureFixture) -> None:
    assert decode_records([(1, b"no event"), (2, b"[1,2,3]"), (3, b"[]")]) == ([Message(2, 1, 2, 3)], 3)
    assert "invalid event in the journal" in caplog.text


@examples(50)
@given(
    steps=st.lists(st.sampled_from(["add", "add", "add", "spill", "settle", "commit", "fail"]), max_size=60),
    spool=st.sampled_from(["outage", "always", "off"]),
    data=st.data(),
)
async def test_returns_every_event_once_and_in_order(steps: list[str], spool: SpoolMode, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        journal = await open_journal(Path(name), segment_bytes=100)
        queue = EventQueue(None if spool == "off" else journal, spool=spool, max_rows=1_000)
        stamp, written = 0, list[Event]()
        for step in steps:
            if step == "add":
                stamp += 1
                queue.add(event(stamp))
            elif step == "spill":
                queue.spill()
            elif step == "settle":
                assert await journal.wait_written(TIMEOUT)
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
        assert written == events(1, stamp)
        await journal.close(TIMEOUT)


# --- events held after the process was suspended

LEAVE = Membership(1, 1, 1, "leave", when(1), when(1))
MESSAGE = Message(2, 1, 1, 1)


async def test_delivers_at_once_if_the_lease_is_certain() -> None:
    delivered: list[Event] = []
    held = HeldEvents(delivered.append, lambda: False)
    held.add(LEAVE)
    assert delivered == [LEAVE]
    await held.wait_released()


async def test_delivers_held_events_in_order_once_the_lease_is_confirmed() -> None:
    delivered: list[Event] = []
    slept = [True]
    held = HeldEvents(delivered.append, lambda: slept[0], check_seconds=0.001)
    held.add(LEAVE)
    slept[0] = False
    held.add(MESSAGE)
    assert (delivered, len(held)) == ([], 2)
    await until(lambda: delivered)
    assert delivered == [LEAVE, MESSAGE]
    await held.wait_released()


async def test_delivers_only_messages_if_the_lease_was_lost() -> None:
    delivered: list[Event] = []
    held = HeldEvents(delivered.append, lambda: True)
    held.add(LEAVE)
    held.add(MESSAGE)
    held.release(is_lost=True)
    assert delivered == [MESSAGE]
    await held.wait_released()


async def test_holds_a_bounded_number_of_events() -> None:
    delivered: list[Event] = []
    held = HeldEvents(delivered.append, lambda: True, max_held=20, check_seconds=0.001)
    for number in range(19):
        held.add(Message(number, 1, 1, number))
    await asyncio.sleep(0.05)
    assert delivered == []
    held.add(Message(19, 1, 1, 19))
    await until(lambda: len(delivered) == 20)
