"""Events: each is recorded once, whichever process reports it, and listings infer only what no event reported."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.leases import seize
from tests.mirror.tables import GUILD, complete_run, entry_of, member_record, when
from utils.database import Pool
from utils.mirror.records.events import Event, Membership, Message, decode_event, encode_event
from utils.mirror.records.rows import COUNTER_BITS, Absence, Entry, Group, Mode
from utils.mirror.translate.objects import LISTED_MEMBER_COLUMNS
from utils.mirror.write import events as event_statements
from utils.mirror.write.batch import Batch, EventBatch, write_batch
from utils.mirror.write.events import Recorded, settle
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
        await write_batch(database, Batch(entries=dict([entry_of("users", (ANN,), 1, username="a")])), fence)
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
    joined: tuple[tuple[str, Any], Entry] = entry_of(
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


async def test_records_a_leave_after_an_inferred_leave_and_return(database: Pool, fence: Fence) -> None:
    """The inferred leave and return have one stamp; without an index, the planner reads them in any order."""
    name = await database.fetchval("SELECT current_database()")
    for setting in ("enable_indexscan", "enable_bitmapscan", "enable_indexonlyscan"):
        await database.execute(f"ALTER DATABASE {name} SET {setting} = off")
    await database.renew()
    await listed(database, fence, 10, {ANN: when(1)})
    await listed(database, fence, 20, {ANN: when(15)})
    now = database.now()
    assert await write_events(database, fence, Membership(stamp(fence, 21), GUILD, ANN, "leave", now, now)) == 1
    assert await events_of(database) == [("leave", True), ("join", True), ("leave", False)]


async def test_newer_join_of_a_present_member_implies_a_leave(database: Pool, fence: Fence) -> None:
    await listed(database, fence, 10, {ANN: when(1)})
    assert await write_events(database, fence, Membership(stamp(fence, 11), GUILD, ANN, "join", when(8), when(9))) == 1
    assert await events_of(database) == [("leave", True), ("join", False)]
    (leave, _) = await database.fetch("SELECT * FROM member_events ORDER BY id")
    assert (leave["at"], leave["earliest"], leave["latest"]) == (when(8), when(10), when(9))
    await write_events(database, fence, Membership(stamp(fence, 12), GUILD, ANN, "join", when(18), when(19)))
    assert await events_of(database) == [("leave", True), ("join", False)] * 2


async def test_same_join_of_a_present_member_implies_nothing(database: Pool, fence: Fence) -> None:
    await listed(database, fence, 10, {ANN: when(1)})
    await write_events(database, fence, Membership(stamp(fence, 11), GUILD, ANN, "join", when(1), when(9)))
    assert await events_of(database) == [("join", False)]


async def test_leave_of_an_unknown_member_implies_the_join(database: Pool, fence: Fence) -> None:
    await listed(database, fence, 10, {BOB: when(1)})
    await write_events(database, fence, Membership(stamp(fence, 11), GUILD, ANN, "leave", when(12), when(12)))
    assert await events_of(database) == [("join", True), ("leave", False)]
    (join, _) = await database.fetch("SELECT * FROM member_events ORDER BY id")
    assert (join["at"], join["earliest"], join["latest"]) == (when(12), when(10), when(12))


async def test_leave_before_the_first_listing_implies_no_join(database: Pool, fence: Fence) -> None:
    await write_events(database, fence, Membership(stamp(fence, 11), GUILD, ANN, "leave", when(12), when(12)))
    assert await events_of(database) == [("leave", False)]


async def test_second_leave_implies_the_join_between(database: Pool, fence: Fence) -> None:
    await listed(database, fence, 10, {ANN: when(1)})
    for counter, at in ((11, when(12)), (12, when(300))):
        await write_events(database, fence, Membership(stamp(fence, counter), GUILD, ANN, "leave", at, at))
    assert await events_of(database) == [("leave", False), ("join", True), ("leave", False)]


async def test_replayed_join_replaces_the_implied_one(database: Pool, fence: Fence) -> None:
    await listed(database, fence, 10, {BOB: when(1)})
    await write_events(database, fence, Membership(stamp(fence, 11), GUILD, ANN, "leave", when(12), when(12)))
    earlier = Membership(stamp(fence, 5, epochs_ago=1), GUILD, ANN, "join", when(8), when(8))
    await write_events(database, fence, earlier, journal="another journal")
    assert await events_of(database) == [("join", False), ("leave", False)]


async def test_replayed_move_matches_the_leave_that_implied_a_join(database: Pool, fence: Fence) -> None:
    """Both processes received the leave, and only the former holder the join before it."""
    await listed(database, fence, 10, {BOB: when(1)})
    await write_events(database, fence, Membership(stamp(fence, 11), GUILD, ANN, "leave", when(12), when(12)))
    former = [
        Membership(stamp(fence, 5, epochs_ago=1), GUILD, ANN, "join", when(8), when(8)),
        Membership(stamp(fence, 6, epochs_ago=1), GUILD, ANN, "leave", when(13), when(13)),
    ]
    await write_events(database, fence, *former, journal="another journal")
    assert await events_of(database) == [("join", False), ("leave", False)]


async def test_join_event_replaces_the_join_that_a_listing_inferred(database: Pool, fence: Fence) -> None:
    """A listing shows the last of several moves before the gateway sends them."""
    await listed(database, fence, 10, {BOB: when(1)})
    await listed(database, fence, 20, {ANN: when(18), BOB: when(1)})
    assert await events_of(database) == [("join", True)]
    moves = [("join", when(12)), ("leave", when(15)), ("join", when(18))]
    for counter, (kind, at) in enumerate(moves, start=21):
        await write_events(database, fence, Membership(stamp(fence, counter), GUILD, ANN, kind, at, at))
    assert await events_of(database) == [("join", False), ("leave", False), ("join", False)]


_moves = st.lists(st.tuples(st.sampled_from(["move", "ask", "answer"]), st.booleans(), st.booleans()), max_size=14)


@given(steps=_moves)
async def test_joins_and_leaves_always_alternate(database: Pool, steps: list[tuple[str, bool, bool]]) -> None:
    """Somebody comes and goes; events and their rows are received or missed, listings are late."""
    await database.execute("TRUNCATE member_events, members, sync_runs, ops.positions")
    fence = await seize(database, "the holder")
    joined: datetime | None = None
    asked: list[tuple[int, dict[int, datetime]]] = []
    for counter, (step, is_received, is_row_written) in enumerate([*steps, ("ask", True, True)], start=1):
        if step == "move":
            joined = when(counter) if joined is None else None
            if is_received:
                kind, at = ("leave", when(counter)) if joined is None else ("join", joined)
                event = Membership(stamp(fence, counter), GUILD, ANN, kind, at, when(counter))
                values = {"left_at": at} if joined is None else _member(joined_at=joined)
                row = entry_of("members", (GUILD, ANN), stamp(fence, counter), may_insert=joined is not None, **values)
                rows = dict([row]) if is_row_written else {}
                await write_batch(database, Batch(entries=rows, events=EventBatch("j", [event], event.stamp)), fence)
        elif step == "ask":
            asked.append((counter, {BOB: when(0)} if joined is None else {ANN: joined, BOB: when(0)}))
        elif asked:
            await listed(database, fence, *asked.pop(0))
        await _check_alternation(database)
    for counter, present in asked[-1:]:
        await listed(database, fence, counter, present)
    kinds = await _check_alternation(database)
    if any(step == "move" and is_received and not is_row_written for step, is_received, is_row_written in steps):
        return  # a lost row is restored by the replay of its journal
    assert not kinds or kinds[-1] == ("leave" if joined is None else "join")


async def _check_alternation(database: Pool) -> list[str]:
    for order in ("stamp, id", "id"):
        records = await database.fetch(f"SELECT kind FROM member_events WHERE user_id = {ANN} ORDER BY {order}")  # noqa: S608
        kinds = [record["kind"] for record in records]
        assert all(first != second for first, second in itertools.pairwise(kinds)), (order, kinds)
    return kinds


_recorded = st.builds(
    Recorded,
    st.integers(1, 2**40),
    st.sampled_from(["join", "leave"]),
    st.integers(0, 200).map(when),
    st.booleans(),
    st.none(),
    st.none() | st.integers(0, 200).map(when),
    st.integers(1, 20),
)


@given(history=st.lists(_recorded, max_size=12))
def test_settled_histories_alternate_and_stay_settled(history: list[Recorded]) -> None:
    settled = settle(sorted(history, key=lambda event: (event.stamp, event.id)))
    assert all(first.kind != second.kind for first, second in itertools.pairwise(settled))
    assert [event.stamp for event in settled] == sorted(event.stamp for event in settled)
    assert settle(settled) == settled


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
    await database.execute("TRUNCATE member_events, ops.positions, members, sync_runs")
    now = await seize(database, "the new holder")
    if data.draw(st.booleans(), label="listed before"):  # then a leave of an unknown member implies the join
        await listed(database, now, 0, {BOB: when(0)})
    happened = [("join", "leave")[turn % 2] for turn in range(moves)]
    by_former = data.draw(st.integers(0, moves), label="received by the former holder")
    by_new_from = data.draw(st.integers(0, by_former), label="first received by the new holder")
    live = _received(stamp(now, 0), happened, data, 0, 40)[by_new_from:]
    if live:
        await write_events(database, now, *live, journal="new journal")
    await _replay(database, now, _received(stamp(now, 0, epochs_ago=1), happened, data, 0, 40)[:by_former], data)
    written = Counter(record["kind"] for record in await database.fetch("SELECT kind FROM member_events"))
    assert written == Counter(happened)


@pytest.mark.parametrize(("first_kind", "second_kind"), [("join", "leave"), ("ban", "unban")])
async def test_replayed_events_of_one_instant_keep_their_order(
    database: Pool, first_kind: str, second_kind: str
) -> None:
    now = await seize(database, "the new holder")
    first = stamp(now, 0, epochs_ago=1)
    times = [(first_kind, 10), (second_kind, 30), (first_kind, 30), (second_kind, 40)]
    old = [Membership(first + turn, GUILD, ANN, kind, when(at), when(at)) for turn, (kind, at) in enumerate(times, 1)]
    for piece, context in ((old[:2], old[2:]), (old[2:], old[:2])):
        batch = EventBatch("former journal", list[Event](piece), piece[-1].stamp, context=context)
        await write_batch(database, Batch(events=batch), now)
    records = await database.fetch("SELECT kind FROM member_events ORDER BY stamp")
    assert [record["kind"] for record in records] == [kind for kind, _ in times]


def _member(**values: Any) -> dict[str, Any]:
    whole = dict.fromkeys(LISTED_MEMBER_COLUMNS) | {"roles": [], "pending": False, "flags": 0}
    return whole | values
