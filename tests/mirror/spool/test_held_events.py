"""What a process hears just after it was stopped waits until it is known who acts."""

from __future__ import annotations

from tests.mirror.tables import when
from tests.waiting import until
from utils.mirror.records.events import Event, Membership, Message
from utils.mirror.spool.queue import MOST, HeldEvents

LEAVE = Membership(1, 1, 1, "leave", when(1), when(1))
MESSAGE = Message(2, 1, 1, 1)


async def test_nothing_waits_while_there_is_no_doubt() -> None:
    told: list[Event] = []
    doubtful = HeldEvents(told.append, lambda: False)
    doubtful.add(LEAVE)
    assert told == [LEAVE]
    await doubtful.wait_released()


async def test_events_wait_until_the_doubt_is_settled_and_keep_their_order() -> None:
    told: list[Event] = []
    slept = [True]
    doubtful = HeldEvents(told.append, lambda: slept[0])
    doubtful.add(LEAVE)
    slept[0] = False
    doubtful.add(MESSAGE)
    assert (told, len(doubtful)) == ([], 2)
    await until(lambda: told)
    assert told == [LEAVE, MESSAGE]
    await doubtful.wait_released()


async def test_of_a_process_that_has_lost_the_lease_only_messages_are_told() -> None:
    told: list[Event] = []
    doubtful = HeldEvents(told.append, lambda: True)
    doubtful.add(LEAVE)
    doubtful.add(MESSAGE)
    doubtful.release(is_lost=True)
    assert told == [MESSAGE]
    await doubtful.wait_released()


async def test_memory_bounds_what_waits() -> None:
    told: list[Event] = []
    doubtful = HeldEvents(told.append, lambda: True)
    for number in range(MOST):
        doubtful.add(Message(number, 1, 1, number))
    await until(lambda: len(told) == MOST)
