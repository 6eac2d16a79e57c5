"""Events: each is recorded once, whichever process reports it, and listings infer only what no event reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.leases import seize
from tests.mirror.tables import GUILD, complete_run, member_record, said, when
from utils.database import Pool
from utils.mirror.records.events import Event, Membership, Message, decode_event, encode_event
from utils.mirror.records.rows import COUNTER_BITS, Absence, Entry, Group, Mode
from utils.mirror.translate.objects import LISTED_MEMBER_COLUMNS
from utils.mirror.write import events as event_statements
from utils.mirror.write.batch import Batch, EventBatch, write_batch
from utils.service.lease import Fence

ANN, BOB = 1, 2


@pytest.fixture
async def fence(database: Pool) -> Fence:
    return await seize(database, "the holder")


def stamp(fence: Fence, counter: int, *, epochs_ago: int = 0) -> int:
    return (fence.epoch - epochs_ago << COUNTER_BITS) + counter


async def write_events(database: Pool, fence: Fence, *events: Event, journal: str = "a journal") -> int:
    batch = EventBatch(journal, list(events), max(event.stamp for event in events))
    return (await write_batch(database, Batch(events=batch), fence)).events


async def listed(
    database: Pool, fence: Fence, counter: int, present: dict[int, datetime], *, is_staged: bool = False
) -> None:
    """Write a complete listing that shows these members, with when they joined."""
    at = stamp(fence, counter)
    records = [member_record(id, at, joined_at=joined) for id, joined in sorted(present.items())]
    run = complete_run(at)
    run.started_at = when(counter)
    batch = Batch(
        groups=[Group("members", LISTED_MEMBER_COLUMNS, Mode.MERGE, records)],
        absences=[Absence("members", GUILD, at, set(present))],
        runs=[run],
    )
    await write_batch(database, batch, fence)


async def events_of(database: Pool, user_id: int = ANN) -> list[tuple[str, bool]]:
    records = await database.fetch("SELECT kind, inferred FROM member_events WHERE user_id = $1 ORDER BY id", user_id)
    return [(record["kind"], record["inferred"]) for record in records]


async def counts(database: Pool) -> dict[int, int]:
    return {row["user_id"]: row["message_count"] for row in await database.fetch("SELECT * FROM member_stats")}


_ids = st.integers(1, 2**63 - 1)
_times = st.datetimes(min_value=datetime(2015, 1, 1), max_value=datetime(2200, 1, 1)).map(  # noqa: DTZ001
    lambda time: time.replace(tzinfo=when(0).tzinfo)
)


@given(
    event=st.builds(Message, _ids, _ids, _ids, _ids)
    | st.builds(Membership, _ids, _ids, _ids, st.sampled_from(["join", "leave", "ban", "unban"]), _times, _times)
)
def test_events_survive_encoding(event: Event) -> None:
    assert decode_event(event.stamp, encode_event(event)) == event


async def test_counts_a_message_once_across_journals(database: Pool, fence: Fence) -> None:
    first = [Message(stamp(fence, n), GUILD, ANN, 100 + n) for n in (1, 2, 3)]
    assert await write_events(database, fence, *first) == 3
    again = [Message(stamp(fence, n), GUILD, ANN, 100 + n) for n in (2, 3, 4)]
    assert await write_events(database, fence, *again, *again, journal="another journal") == 1
    assert await counts(database) == {ANN: 4}


async def test_last_active_at_never_goes_back(database: Pool, fence: Fence) -> None:
    newest = (1_700_000_000_000 - 1_420_070_400_000) << 22
    await write_events(database, fence, Message(stamp(fence, 1), GUILD, ANN, newest))
    await write_events(database, fence, Message(stamp(fence, 2), GUILD, ANN, 7))
    (row,) = await database.fetch("SELECT * FROM member_stats")
    assert (row["message_count"], row["last_active_at"].timestamp()) == (2, 1_700_000_000)


async def test_skips_events_up_to_the_position(database: Pool, fence: Fence) -> None:
    events = [Membership(stamp(fence, n), GUILD, n, "ban", when(n), when(n)) for n in (1, 2, 3)]
    await write_events(database, fence, *events[:2])
    await write_events(database, fence, *events)
    assert await database.fetchval("SELECT count(*) FROM member_events") == 3
    assert await database.fetchval(event_statements.SELECT_POSITION, "a journal") == stamp(fence, 3)


async def test_writes_nothing_after_losing_the_lease(database: Pool, fence: Fence) -> None:
    await seize(database, "another process")
    with pytest.raises(Exception, match="another process"):
        await write_events(database, fence, Message(stamp(fence, 1), GUILD, ANN, 1))
    with pytest.raises(Exception, match="another process"):
        await write_batch(database, Batch(entries=dict([said("users", (ANN,), 1, username="a")])), fence)
    assert await counts(database) == {}
    assert await database.fetchval("SELECT count(*) FROM users") == 0


async def test_infers_joins_from_the_second_listing_on(database: Pool, fence: Fence) -> None:
    await listed(database, fence, 10, {ANN: when(1)})
    assert await events_of(database) == []
    await listed(database, fence, 20, {ANN: when(1), BOB: when(15)})
    assert await events_of(database, BOB) == [("join", True)]
    (event,) = await database.fetch("SELECT * FROM member_events")
    assert (event["at"], event["earliest"]) == (when(15), when(10))
    assert event["latest"] > when(10)


async def test_infers_a_leave_for_an_absent_member(database: Pool, fence: Fence) -> None:
    await listed(database, fence, 10, {ANN: when(1), BOB: when(2)})
    await listed(database, fence, 20, {BOB: when(2)})
    assert await events_of(database) == [("leave", True)]
    (event,) = await database.fetch("SELECT * FROM member_events")
    assert event["earliest"] == when(10)
    assert event["latest"] == event["at"] > when(10)


async def test_infers_leave_and_join_from_a_new_join_time(database: Pool, fence: Fence) -> None:
    await listed(database, fence, 10, {ANN: when(1)})
    await listed(database, fence, 20, {ANN: when(15)})
    assert await events_of(database) == [("leave", True), ("join", True)]
    await listed(database, fence, 30, {ANN: when(15)})
    assert len(await events_of(database)) == 2


async def test_infers_a_join_for_a_returning_member(database: Pool, fence: Fence) -> None:
    await listed(database, fence, 10, {ANN: when(1), BOB: when(1)})
    await listed(database, fence, 20, {BOB: when(1)})
    await listed(database, fence, 30, {ANN: when(25), BOB: when(1)})
    assert await events_of(database) == [("leave", True), ("join", True)]


async def test_does_not_infer_what_events_reported(database: Pool, fence: Fence) -> None:
    await listed(database, fence, 10, {ANN: when(1)})
    joined: tuple[tuple[str, Any], Entry] = said(
        "members", (GUILD, BOB), stamp(fence, 11), **_member(joined_at=when(11))
    )
    events = [Membership(stamp(fence, 11), GUILD, BOB, "join", when(11), when(11))]
    await write_batch(
        database, Batch(entries=dict([joined]), events=EventBatch("j", list[Event](events), stamp(fence, 11))), fence
    )
    await write_events(database, fence, Membership(stamp(fence, 12), GUILD, ANN, "leave", when(12), when(12)))
    await listed(database, fence, 20, {BOB: when(11)})
    assert await events_of(database) == [("leave", False)]
    assert await events_of(database, BOB) == [("join", False)]


async def test_does_not_infer_a_leave_whose_row_was_lost(database: Pool, fence: Fence) -> None:
    """A killed process leaves the event in its journal, but the row was in its buffer."""
    await listed(database, fence, 10, {ANN: when(1), BOB: when(1)})
    await write_events(database, fence, Membership(stamp(fence, 11), GUILD, ANN, "leave", when(12), when(12)))
    await listed(database, fence, 20, {ANN: when(15), BOB: when(1)})
    assert await events_of(database) == [("leave", False), ("join", True)]
    await write_events(database, fence, Membership(stamp(fence, 21), GUILD, BOB, "leave", when(22), when(22)))
    await listed(database, fence, 30, {ANN: when(15)})
    assert await events_of(database, BOB) == [("leave", False)]


async def test_infers_a_join_before_a_later_leave_event(database: Pool, fence: Fence) -> None:
    """The listing was requested before the leave event and written after it, and the row of the leave was lost."""
    await listed(database, fence, 10, {BOB: when(1)})
    await write_events(database, fence, Membership(stamp(fence, 21), GUILD, ANN, "leave", when(22), when(22)))
    await listed(database, fence, 20, {ANN: when(15), BOB: when(1)})
    await listed(database, fence, 30, {BOB: when(1)})
    assert sorted(await events_of(database)) == [("join", True), ("leave", False)]


async def test_leave_event_after_an_inferred_leave_is_a_repeat(database: Pool, fence: Fence) -> None:
    await listed(database, fence, 10, {ANN: when(1), BOB: when(1)})
    await listed(database, fence, 20, {BOB: when(1)})
    now = database.now()
    assert await write_events(database, fence, Membership(stamp(fence, 21), GUILD, ANN, "leave", now, now)) == 0
    rejoined = [
        Membership(stamp(fence, 22), GUILD, ANN, "join", now, now),
        Membership(stamp(fence, 23), GUILD, ANN, "leave", now, now),
    ]
    assert await write_events(database, fence, *rejoined) == 2


def _received(first: int, kinds: Sequence[str], data: st.DataObject, skew: int, most_late: int) -> list[Membership]:
    """Return what one process received, each event a little late; a join has the time that Discord sent."""
    received: list[Membership] = []
    late = 0
    for turn, kind in enumerate(kinds, start=1):
        late = max(late, 10 * turn + data.draw(st.integers(0, most_late), label="late"))
        at = when(10 * turn + skew) if kind == "join" else when(late)
        received.append(Membership(first + turn, GUILD, ANN, kind, at, when(late)))
    return received


async def _replay(database: Pool, now: Fence, old: list[Membership], data: st.DataObject) -> None:
    """Replay a former holder's journal in pieces."""
    done = 0
    while done < len(old):
        count = data.draw(st.integers(1, len(old) - done), label="replayed at once")
        piece, context = old[done : done + count], old[:done] + old[done + count :]
        batch = EventBatch("former journal", list[Event](piece), piece[-1].stamp, context=context)
        await write_batch(database, Batch(events=batch), now)
        done += count


@given(kinds=st.lists(st.sampled_from(["ban", "unban", "move"]), max_size=12), data=st.data())
async def test_records_once_what_two_processes_received(database: Pool, kinds: list[str], data: st.DataObject) -> None:
    """The journal of the former holder is replayed in pieces; the new holder has recorded a part of it."""
    await database.execute("TRUNCATE member_events, ops.positions")
    now = await seize(database, "the new holder")
    present, happened = True, list[str]()
    for kind in kinds:
        if kind == "move":
            happened.append("leave" if present else "join")
            present = not present
        elif happened.count("ban") - happened.count("unban") == (0 if kind == "ban" else 1):
            happened.append(kind)
    by_former = data.draw(st.integers(0, len(happened)), label="received by the former holder")
    by_new_from = data.draw(st.integers(0, by_former), label="first received by the new holder")
    skew = data.draw(st.sampled_from([0, 300, -300]), label="seconds that Discord's clock is ahead")
    live = _received(stamp(now, 0), happened, data, skew, 4)[by_new_from:]
    if live:
        await write_events(database, now, *live, journal="new journal")
    await _replay(database, now, _received(stamp(now, 0, epochs_ago=1), happened, data, skew, 4)[:by_former], data)
    records = await database.fetch("SELECT kind FROM member_events ORDER BY latest")
    assert [record["kind"] for record in records] == happened


@given(moves=st.integers(1, 8), data=st.data())
async def test_joins_tell_fast_moves_of_two_processes_apart(database: Pool, moves: int, data: st.DataObject) -> None:
    """A member joins and leaves within milliseconds, less than the two processes' times differ."""
    await database.execute("TRUNCATE member_events, ops.positions")
    now = await seize(database, "the new holder")
    happened = [("join", "leave")[turn % 2] for turn in range(moves)]
    by_former = data.draw(st.integers(0, moves), label="received by the former holder")
    by_new_from = data.draw(st.integers(0, by_former), label="first received by the new holder")
    live = _received(stamp(now, 0), happened, data, 0, 40)[by_new_from:]
    if live:
        await write_events(database, now, *live, journal="new journal")
    await _replay(database, now, _received(stamp(now, 0, epochs_ago=1), happened, data, 0, 40)[:by_former], data)
    written = Counter(record["kind"] for record in await database.fetch("SELECT kind FROM member_events"))
    assert written == Counter(happened)


def _member(**values: Any) -> dict[str, Any]:
    whole = dict.fromkeys(LISTED_MEMBER_COLUMNS) | {"roles": [], "pending": False, "flags": 0}
    return whole | values
