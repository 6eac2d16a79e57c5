"""What dispatches changed is handed on after the commit: once, in order, with the rows before and after."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mirror.tables import GUILD, OTHER_GUILD, empty, fence_of, rows, when
from utils.database import Pool
from utils.exceptions import DatabaseUnavailable
from utils.mirror.records.rows import Group, Mode, Row, Stamps
from utils.mirror.spool.queue import EventQueue
from utils.mirror.write import live_events
from utils.mirror.write import writer as module
from utils.mirror.write.batch import Batch, WriteCounts, write_batch
from utils.mirror.write.live_events import Kind, LiveEvents, MemberChange, UserChange
from utils.mirror.write.writer import FlushPolicy, MirrorWriter

BLANK: dict[str, Any] = {"nick": None, "roles": []}
ABSENT: Any = object()


class Rig:
    """A writer that is flushed by hand, what it handed on, and what it should have handed on."""

    def __init__(self, writer: MirrorWriter, stamps: Stamps, told: list[Any]) -> None:
        self.writer = writer
        self.stamps = stamps
        self.told = told
        self.expected: list[Any] = []
        self.members: dict[tuple[int, int], dict[str, Any] | None] = {}
        self.users: dict[int, str] = {}

    @property
    def live(self) -> LiveEvents:
        assert self.writer.live_events is not None
        return self.writer.live_events

    def receive(self, kind: Kind, guild_id: int, user_id: int, name: str, nick: Any = ABSENT, roles: Any = ()) -> None:
        """Receive a dispatch; `nick` may be absent from an update."""
        stamp, is_whole = self.stamps.next(), kind == "join" or nick is not ABSENT
        values: dict[str, Any] = {"roles": [*roles], "left_at": None}
        if kind == "leave":
            values = {"left_at": when(stamp % 1_000)}
        if kind != "leave" and is_whole:
            values["nick"] = None if nick is ABSENT else nick
        found = [
            Row("users", (user_id,), {"username": name}),
            Row("members", (guild_id, user_id), values, may_insert=kind != "leave" and is_whole),
        ]
        self.live.observe(kind, found, stamp)
        for row in found:
            self.writer.put(row, stamp)
        self._expect(kind, guild_id, user_id, name, values, is_whole=is_whole)

    def _expect(
        self, kind: Kind, guild_id: int, user_id: int, name: str, values: dict[str, Any], *, is_whole: bool
    ) -> None:
        known = self.users.get(user_id)
        if known not in (None, name):
            self.expected.append(("user", user_id, known, name))
        self.users[user_id] = name
        key = guild_id, user_id
        before = self.members.get(key)
        seen = {name: values[name] for name in ("nick", "roles") if name in values}
        is_present = before is not None and before["present"]
        if kind == "leave":
            if before is None:
                self.expected.append(("leave", *key, None))
            elif is_present:
                self.expected.append(("leave", *key, _shown(before)))
                self.members[key] = {**before, "present": False}
            return
        after = (before or BLANK) | seen | {"present": True}
        if kind == "update" and before is not None and is_present and _shown(before) != _shown(after):
            self.expected.append(("update", *key, _shown(before), _shown(after)))
        if before is not None or is_whole:
            self.members[key] = after

    async def show(self, guild_id: int, user_id: int, nick: str) -> None:
        """Merge what a listing shows of a member: it is not handed on."""
        await self.writer.flush()
        record: tuple[Any, ...] = (guild_id, user_id, nick, [], None, self.stamps.next())
        group = Group("members", ("nick", "roles", "left_at"), Mode.MERGE, [record])
        await self.writer.write(Batch(groups=[group]))
        self.members[guild_id, user_id] = {"nick": nick, "roles": [], "present": True}

    def shown(self) -> list[Any]:
        """Return what was handed on, in the form of `expected`."""
        return [_told(change) for change in self.told]


def _shown(row: Any) -> dict[str, Any]:
    return {name: row[name] for name in BLANK}


def _told(change: MemberChange | UserChange) -> tuple[Any, ...]:
    if isinstance(change, UserChange):
        return "user", change.after["id"], change.before["username"], change.after["username"]
    before = _shown(change.before) if "nick" in change.before else None
    key = change.guild_id, change.user_id
    return ("leave", *key, before) if change.after is None else ("update", *key, before, _shown(change.after))


async def rig_of(database: Pool, **options: Any) -> Rig:
    fence, told = await fence_of(database), list[Any]()
    writer = MirrorWriter(
        database, fence, EventQueue(None, spool="off", max_rows=20_000), FlushPolicy(), on_lost=lambda: None,
        on_dropped=lambda guilds: None, live_events=LiveEvents(database, told.append, **options),
    )  # fmt: skip
    return Rig(writer, Stamps(fence.epoch), told)


Write = Callable[..., Awaitable[WriteCounts]]


def failing(write: Write, *, is_committed: bool) -> Write:
    """Return a write that fails, before the commit or before its confirmation arrives."""

    async def fail(*args: Any) -> WriteCounts:
        if is_committed:
            await write(*args)
        raise DatabaseUnavailable("the connection broke")

    return fail


PEOPLE = st.tuples(st.sampled_from([GUILD, OTHER_GUILD]), st.integers(1, 2))
NAMES, NICKS = st.sampled_from(["ada", "bob"]), st.sampled_from([None, "x", "y"])
ROLES = st.sampled_from([(), (1,), (1, 2)])
DISPATCHES = st.one_of(
    st.tuples(st.just("update"), PEOPLE, NAMES, st.just(ABSENT) | NICKS, ROLES),
    st.tuples(st.just("join"), PEOPLE, NAMES, NICKS, ROLES),
    st.tuples(st.just("leave"), PEOPLE, NAMES, st.none(), st.just(())),
)
STEPS = st.lists(
    DISPATCHES
    | st.tuples(st.just("list"), PEOPLE, NICKS.filter(bool))
    | st.tuples(st.just("flush"))
    | st.tuples(st.just("fail"), st.booleans()),
    min_size=4,
    max_size=30,
)


@settings(max_examples=60)
@given(steps=STEPS)
async def test_each_change_is_told_once_in_order_whatever_is_flushed_or_fails(
    database: Pool, monkeypatch: pytest.MonkeyPatch, steps: list[Any]
) -> None:
    await empty(database)
    rig = await rig_of(database)
    for name, *rest in steps:
        if name == "flush":
            await rig.writer.flush()
        elif name == "list":
            (guild_id, user_id), nick = rest
            await rig.show(guild_id, user_id, nick)
        elif name == "fail":
            monkeypatch.setattr(module, "write_batch", failing(write_batch, is_committed=rest[0]))
            with pytest.raises(DatabaseUnavailable):
                await rig.writer.flush()
            monkeypatch.undo()
        else:
            (guild_id, user_id), username, nick, roles = rest
            rig.receive(name, guild_id, user_id, username, nick, roles)
    await rig.writer.flush()
    assert rig.shown() == rig.expected
    assert (len(rig.live), rig.live._before) == (0, {})
    found = await rows(database, "members")
    present = {key: _shown(row) for key, row in found.items() if row["left_at"] is None}
    assert present == {key: _shown(row) for key, row in rig.members.items() if row is not None and row["present"]}


async def test_a_change_that_a_listing_showed_first_is_not_told(database: Pool) -> None:
    rig = await rig_of(database)
    await rig.show(GUILD, 1, "x")
    await rig.show(GUILD, 1, "y")
    rig.receive("update", GUILD, 1, "ada", "y")
    await rig.writer.flush()
    assert rig.told == []


async def test_rows_of_a_listing_or_a_replay_are_not_told(database: Pool) -> None:
    rig = await rig_of(database)
    rig.receive("join", GUILD, 1, "ada")
    await rig.writer.flush()
    rig.writer.put(Row("members", (GUILD, 1), {"nick": "replayed"}), rig.stamps.next())
    await rig.writer.flush()
    assert rig.told == []


async def test_rows_dropped_for_lack_of_memory_are_not_told(database: Pool) -> None:
    rig = await rig_of(database)
    await rig.show(GUILD, 1, "x")
    rig.receive("update", GUILD, 1, "ada", "y")
    rig.writer.buffer.drop_oldest_members(1)
    await rig.writer.flush()
    assert (rig.told, len(rig.live)) == ([], 0)


async def test_too_many_waiting_changes_are_dropped_and_joins_among_them_go_on(
    database: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    rig, joined = await rig_of(database, max_waiting=4), list[str]()
    await rig.show(GUILD, 1, "x")
    rig.receive("leave", GUILD, 1, "ada")
    assert rig.live.defer(GUILD, 1, lambda: joined.append("again"))
    rig.receive("update", GUILD, 2, "bob", "y")
    assert joined == ["again"]
    assert "5 events about members are not dispatched" in caplog.text
    await rig.writer.flush()
    assert rig.told == []


async def test_a_join_waits_for_the_leave_before_it(database: Pool) -> None:
    rig = await rig_of(database)
    await rig.show(GUILD, 1, "x")
    rig.receive("leave", GUILD, 1, "ada")
    rig.receive("join", GUILD, 1, "ada")
    assert rig.live.defer(GUILD, 1, lambda: rig.told.append("joined"))
    rig.receive("join", GUILD, 2, "bob")
    assert not rig.live.defer(GUILD, 2, lambda: None)
    await rig.writer.flush()
    assert [change if change == "joined" else _told(change)[0] for change in rig.told] == ["leave", "joined"]


async def test_nothing_is_kept_without_listeners(database: Pool) -> None:
    rig = await rig_of(database, has_listeners=lambda: False)
    rig.receive("update", GUILD, 1, "ada", "x")
    assert len(rig.live) == 0


def _fail(*args: Any) -> Any:
    raise RuntimeError("a mistake of ours")


_MISSING_COLUMN = "SELECT no_such_column FROM members WHERE $1::bigint[] IS NOT NULL"


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        *((name, _fail) for name in ("_has_listeners", "_take", "_apply")),
        ("_SELECT_MEMBERS", f"{_MISSING_COLUMN} AND $2::bigint[] IS NOT NULL"),
        ("_SELECT_USERS", _MISSING_COLUMN),
    ],
)
async def test_an_error_costs_events_but_no_row(
    database: Pool, monkeypatch: pytest.MonkeyPatch, name: str, replacement: Any
) -> None:
    rig = await rig_of(database)
    await rig.show(GUILD, 1, "x")
    rig.receive("update", GUILD, 1, "ada", "before")
    await rig.writer.flush()
    rig.told.clear()
    monkeypatch.setattr(live_events if name.startswith("_SELECT") else rig.live, name, replacement)
    rig.receive("update", GUILD, 1, "ada", "during")
    await rig.writer.flush()
    assert (await rows(database, "members"))[GUILD, 1]["nick"] == "during"
    assert (len(rig.live), rig.live._before, rig.told) == (0, {}, [])
    monkeypatch.undo()
    rig.receive("update", GUILD, 1, "ada", "after")
    await rig.writer.flush()
    assert [(change.before["nick"], change.after["nick"]) for change in rig.told] == [("during", "after")]


async def test_rows_that_cannot_be_read_are_no_dead_letters(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = await rig_of(database)
    await rig.show(GUILD, 1, "x")
    monkeypatch.setattr(live_events, "_SELECT_USERS", _MISSING_COLUMN)
    rig.writer.start()
    rig.receive("update", GUILD, 1, "ada", "y")
    await rig.writer.wait_committed(GUILD)
    await rig.writer.stop(5)
    assert (await rows(database, "members"))[GUILD, 1]["nick"] == "y"
    assert await database.fetchval("SELECT count(*) FROM ops.dead_letters") == 0
