"""Events in the tables: each once, whoever tells of it again, and what listings prove beside them."""

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
    return await seize(database, "the process under test")


def stamp(fence: Fence, counter: int, *, epochs_ago: int = 0) -> int:
    return (fence.epoch - epochs_ago << COUNTER_BITS) + counter


async def tell(database: Pool, fence: Fence, *events: Event, journal: str = "a journal") -> int:
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


async def told_of(database: Pool, user_id: int = ANN) -> list[tuple[str, bool]]:
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
def test_an_event_comes_out_of_a_journal_as_it_went_in(event: Event) -> None:
    assert decode_event(event.stamp, encode_event(event)) == event


async def test_a_message_counts_once_whoever_tells_of_it(database: Pool, fence: Fence) -> None:
    first = [Message(stamp(fence, n), GUILD, ANN, 100 + n) for n in (1, 2, 3)]
    assert await tell(database, fence, *first) == 3
    again = [Message(stamp(fence, n), GUILD, ANN, 100 + n) for n in (2, 3, 4)]
    assert await tell(database, fence, *again, *again, journal="another process's") == 1
    assert await counts(database) == {ANN: 4}


async def test_activity_is_as_of_the_newest_message_and_never_goes_back(database: Pool, fence: Fence) -> None:
    newest = (1_700_000_000_000 - 1_420_070_400_000) << 22
    await tell(database, fence, Message(stamp(fence, 1), GUILD, ANN, newest))
    await tell(database, fence, Message(stamp(fence, 2), GUILD, ANN, 7))
    (row,) = await database.fetch("SELECT * FROM member_stats")
    assert (row["message_count"], row["last_active_at"].timestamp()) == (2, 1_700_000_000)


async def test_what_is_at_or_below_the_position_is_left_out(database: Pool, fence: Fence) -> None:
    events = [Membership(stamp(fence, n), GUILD, n, "ban", when(n), when(n)) for n in (1, 2, 3)]
    await tell(database, fence, *events[:2])
    await tell(database, fence, *events)
    assert await database.fetchval("SELECT count(*) FROM member_events") == 3
    assert await database.fetchval(event_statements.SELECT_POSITION, "a journal") == stamp(fence, 3)


async def test_nothing_is_written_after_another_process_has_taken_over(database: Pool, fence: Fence) -> None:
    await seize(database, "the other one")
    with pytest.raises(Exception, match="another process"):
        await tell(database, fence, Message(stamp(fence, 1), GUILD, ANN, 1))
    with pytest.raises(Exception, match="another process"):
        await write_batch(database, Batch(entries=dict([said("users", (ANN,), 1, username="a")])), fence)
    assert await counts(database) == {}
    assert await database.fetchval("SELECT count(*) FROM users") == 0


async def test_a_first_listing_proves_no_join_and_a_later_one_does(database: Pool, fence: Fence) -> None:
    await listed(database, fence, 10, {ANN: when(1)})
    assert await told_of(database) == []
    await listed(database, fence, 20, {ANN: when(1), BOB: when(15)})
    assert await told_of(database, BOB) == [("join", True)]
    (event,) = await database.fetch("SELECT * FROM member_events")
    assert (event["at"], event["earliest"]) == (when(15), when(10))
    assert event["latest"] > when(10)


async def test_a_listing_that_does_not_show_somebody_proves_that_they_left(database: Pool, fence: Fence) -> None:
    await listed(database, fence, 10, {ANN: when(1), BOB: when(2)})
    await listed(database, fence, 20, {BOB: when(2)})
    assert await told_of(database) == [("leave", True)]
    (event,) = await database.fetch("SELECT * FROM member_events")
    assert event["earliest"] == when(10)
    assert event["latest"] == event["at"] > when(10)


async def test_another_time_of_joining_proves_a_leave_and_a_join(database: Pool, fence: Fence) -> None:
    await listed(database, fence, 10, {ANN: when(1)})
    await listed(database, fence, 20, {ANN: when(15)})
    assert await told_of(database) == [("leave", True), ("join", True)]
    await listed(database, fence, 30, {ANN: when(15)})
    assert len(await told_of(database)) == 2


async def test_who_comes_back_unheard_has_joined(database: Pool, fence: Fence) -> None:
    await listed(database, fence, 10, {ANN: when(1), BOB: when(1)})
    await listed(database, fence, 20, {BOB: when(1)})
    await listed(database, fence, 30, {ANN: when(25), BOB: when(1)})
    assert await told_of(database) == [("leave", True), ("join", True)]


async def test_what_was_heard_live_is_not_inferred_once_more(database: Pool, fence: Fence) -> None:
    await listed(database, fence, 10, {ANN: when(1)})
    joined: tuple[tuple[str, Any], Entry] = said(
        "members", (GUILD, BOB), stamp(fence, 11), **_member(joined_at=when(11))
    )
    events = [Membership(stamp(fence, 11), GUILD, BOB, "join", when(11), when(11))]
    await write_batch(
        database, Batch(entries=dict([joined]), events=EventBatch("j", list[Event](events), stamp(fence, 11))), fence
    )
    await tell(database, fence, Membership(stamp(fence, 12), GUILD, ANN, "leave", when(12), when(12)))
    await listed(database, fence, 20, {BOB: when(11)})
    assert await told_of(database) == [("leave", False)]
    assert await told_of(database, BOB) == [("join", False)]


async def test_a_leave_that_was_heard_before_the_row_was_written_is_not_inferred_once_more(
    database: Pool, fence: Fence
) -> None:
    """The process was killed between the two: the leave stood in its journal, the row in its buffer."""
    await listed(database, fence, 10, {ANN: when(1), BOB: when(1)})
    await tell(database, fence, Membership(stamp(fence, 11), GUILD, ANN, "leave", when(12), when(12)))
    await listed(database, fence, 20, {ANN: when(15), BOB: when(1)})
    assert await told_of(database) == [("leave", False), ("join", True)]
    await tell(database, fence, Membership(stamp(fence, 21), GUILD, BOB, "leave", when(22), when(22)))
    await listed(database, fence, 30, {ANN: when(15)})
    assert await told_of(database, BOB) == [("leave", False)]


async def test_a_join_that_a_listing_proves_stands_before_a_leave_heard_since(database: Pool, fence: Fence) -> None:
    """The listing was asked for before the leave was heard, and written after it; the row of the leave was lost."""
    await listed(database, fence, 10, {BOB: when(1)})
    await tell(database, fence, Membership(stamp(fence, 21), GUILD, ANN, "leave", when(22), when(22)))
    await listed(database, fence, 20, {ANN: when(15), BOB: when(1)})
    await listed(database, fence, 30, {BOB: when(1)})
    assert sorted(await told_of(database)) == [("join", True), ("leave", False)]


async def test_a_leave_that_a_listing_has_just_proven_is_not_a_second_one(database: Pool, fence: Fence) -> None:
    await listed(database, fence, 10, {ANN: when(1), BOB: when(1)})
    await listed(database, fence, 20, {BOB: when(1)})
    now = database.now()
    assert await tell(database, fence, Membership(stamp(fence, 21), GUILD, ANN, "leave", now, now)) == 0
    rejoined = [
        Membership(stamp(fence, 22), GUILD, ANN, "join", now, now),
        Membership(stamp(fence, 23), GUILD, ANN, "leave", now, now),
    ]
    assert await tell(database, fence, *rejoined) == 2


def _heard(first: int, kinds: Sequence[str], data: st.DataObject, skew: int, most_late: int) -> list[Membership]:
    """Return what one process heard, each a little late in its own way; of joins Discord says the time."""
    heard: list[Membership] = []
    late = 0
    for turn, kind in enumerate(kinds, start=1):
        late = max(late, 10 * turn + data.draw(st.integers(0, most_late), label="late"))
        at = when(10 * turn + skew) if kind == "join" else when(late)
        heard.append(Membership(first + turn, GUILD, ANN, kind, at, when(late)))
    return heard


async def _replay(database: Pool, now: Fence, old: list[Membership], data: st.DataObject) -> None:
    """Write a former process's journal in pieces, as the one that acts now does."""
    done = 0
    while done < len(old):
        count = data.draw(st.integers(1, len(old) - done), label="replayed at once")
        piece, context = old[done : done + count], old[:done] + old[done + count :]
        batch = EventBatch("the former one's", list[Event](piece), piece[-1].stamp, context=context)
        await write_batch(database, Batch(events=batch), now)
        done += count


@given(kinds=st.lists(st.sampled_from(["ban", "unban", "move"]), max_size=12), data=st.data())
async def test_what_two_processes_heard_is_written_once(database: Pool, kinds: list[str], data: st.DataObject) -> None:
    """The one that lost its lease replays later, in pieces, what the other wrote some of already."""
    await database.execute("TRUNCATE member_events, ops.positions")
    now = await seize(database, "the one that acts now")
    present, happened = True, list[str]()
    for kind in kinds:
        if kind == "move":
            happened.append("leave" if present else "join")
            present = not present
        elif happened.count("ban") - happened.count("unban") == (0 if kind == "ban" else 1):
            happened.append(kind)
    heard_by_it = data.draw(st.integers(0, len(happened)), label="heard by the former holder")
    heard_since = data.draw(st.integers(0, heard_by_it), label="heard from there on by the new one")
    skew = data.draw(st.sampled_from([0, 300, -300]), label="seconds that Discord's clock is ahead of the database's")
    live = _heard(stamp(now, 0), happened, data, skew, 4)[heard_since:]
    if live:
        await tell(database, now, *live, journal="the new one's")
    await _replay(database, now, _heard(stamp(now, 0, epochs_ago=1), happened, data, skew, 4)[:heard_by_it], data)
    records = await database.fetch("SELECT kind FROM member_events ORDER BY latest")
    assert [record["kind"] for record in records] == happened


@given(moves=st.integers(1, 8), data=st.data())
async def test_moves_closer_together_than_two_processes_hear_are_told_apart_by_the_joins(
    database: Pool, moves: int, data: st.DataObject
) -> None:
    """Somebody joins and leaves within milliseconds, by which the two processes' times differ."""
    await database.execute("TRUNCATE member_events, ops.positions")
    now = await seize(database, "the one that acts now")
    happened = [("join", "leave")[turn % 2] for turn in range(moves)]
    heard_by_it = data.draw(st.integers(0, moves), label="heard by the former holder")
    heard_since = data.draw(st.integers(0, heard_by_it), label="heard from there on by the new one")
    live = _heard(stamp(now, 0), happened, data, 0, 40)[heard_since:]
    if live:
        await tell(database, now, *live, journal="the new one's")
    await _replay(database, now, _heard(stamp(now, 0, epochs_ago=1), happened, data, 0, 40)[:heard_by_it], data)
    written = Counter(record["kind"] for record in await database.fetch("SELECT kind FROM member_events"))
    assert written == Counter(happened)


def _member(**values: Any) -> dict[str, Any]:
    whole = dict.fromkeys(LISTED_MEMBER_COLUMNS) | {"roles": [], "pending": False, "flags": 0}
    return whole | values
