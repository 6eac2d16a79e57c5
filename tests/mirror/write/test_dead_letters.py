"""Isolation: what the database refuses for some rows becomes a dead letter, what it refuses for all waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.leases import seize
from tests.mirror.tables import GUILD, entry_of, rows, user_record, when, writer_of
from utils.database import ConnectTarget, Pool
from utils.exceptions import DatabaseError
from utils.mirror.records.events import Event, Membership, Message
from utils.mirror.records.rows import COUNTER_BITS, Group, Mode, Observation
from utils.mirror.translate.objects import LISTED_USER_COLUMNS
from utils.mirror.write.batch import EventBatch
from utils.mirror.write.dead_letters import write_events_isolated, write_isolated
from utils.mirror.write.writer import MirrorWriter
from utils.service.lease import Fence

BAD = 66


async def refuse(database: Pool, table: str, column: str, condition: str, sqlstate: str = "P0001") -> None:
    """Make a trigger refuse the rows for which the condition holds."""
    await database.execute(
        f"CREATE FUNCTION refuse_{table}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF NEW.{column} {condition} THEN RAISE EXCEPTION 'refused' USING ERRCODE = '{sqlstate}'; END IF;"
        " RETURN NEW; END $$"
    )
    await database.execute(
        f"CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION refuse_{table}()"
    )


async def dead_letters(database: Pool) -> list[tuple[str, int, str]]:
    found = await database.fetch("SELECT table_name, user_id, sqlstate FROM ops.dead_letters ORDER BY id")
    return [(row["table_name"], row["user_id"], row["sqlstate"]) for row in found]


def put_users(writer: MirrorWriter, ids: Sequence[int]) -> None:
    writer.buffer.give_back(dict(entry_of("users", (id,), 1, username=f"user {id}") for id in ids))


@pytest.mark.parametrize("sqlstate", ["P0001", "54000", "42501", "22001", "23514"])
async def test_isolates_the_row_that_a_trigger_refuses(database: Pool, sqlstate: str) -> None:
    await refuse(database, "users", "id", f"= {BAD}", sqlstate)
    writer = await writer_of(database)
    put_users(writer, [1, 2, BAD, 3])
    await write_isolated(writer, [])
    assert set(await rows(database, "users")) == {(1,), (2,), (3,)}
    assert await dead_letters(database) == [("users", BAD, sqlstate)]
    assert len(writer.buffer) == 0


async def test_isolates_the_only_row_that_waits(database: Pool) -> None:
    """Rows that the table has show that it accepts others."""
    writer = await writer_of(database)
    put_users(writer, [1])
    await writer.flush()
    await refuse(database, "users", "id", f"= {BAD}")
    put_users(writer, [BAD])
    await write_isolated(writer, [])
    assert await dead_letters(database) == [("users", BAD, "P0001")]


async def test_isolates_a_row_that_does_not_fit_an_index(database: Pool) -> None:
    await database.execute("CREATE INDEX ON users (username)")
    writer = await writer_of(database)
    put_users(writer, [1, 2])
    writer.buffer.give_back(dict([entry_of("users", (BAD,), 1, username="".join(map(chr, range(200, 12_000))))]))
    await write_isolated(writer, [])
    assert await dead_letters(database) == [("users", BAD, "54000")]
    assert len(await rows(database, "users")) == 2


async def test_isolates_what_row_security_refuses(database: Pool, target: ConnectTarget) -> None:
    role = f"limited_{target.database}"
    await database.execute(
        f"CREATE ROLE {role} LOGIN; GRANT ALL ON SCHEMA public, ops TO {role};"
        f" GRANT ALL ON ALL TABLES IN SCHEMA public, ops TO {role};"
        f" GRANT ALL ON ALL SEQUENCES IN SCHEMA public, ops TO {role};"
        " ALTER TABLE users ENABLE ROW LEVEL SECURITY;"
        f" CREATE POLICY not_bad ON users USING (true) WITH CHECK (id <> {BAD})"
    )
    limited = Pool(replace(target, user=role), pool_max=4, connect_timeout=10)
    try:
        await limited.connect()
        writer = await writer_of(limited)
        put_users(writer, [1, BAD, 2])
        await write_isolated(writer, [])
        assert await dead_letters(database) == [("users", BAD, "42501")]
        assert set(await rows(database, "users")) == {(1,), (2,)}
        await database.execute(f"REVOKE INSERT ON users FROM {role}")
        put_users(writer, [3])
        with pytest.raises(DatabaseError, match="permission denied"):
            await write_isolated(writer, [])
        assert len(await dead_letters(database)) == 1
    finally:
        await limited.close()
        await database.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.mark.parametrize("is_empty", [True, False])
async def test_holds_what_is_refused_for_every_row(database: Pool, is_empty: bool) -> None:
    writer = await writer_of(database)
    if not is_empty:
        put_users(writer, [1])
        await writer.flush()
    await refuse(database, "users", "id", "> 0")
    put_users(writer, range(2, 40))
    writer.buffer.give_back(dict([entry_of("guilds", (GUILD,), 1, name="guild")]))
    with pytest.raises(DatabaseError, match="refused"):
        await write_isolated(writer, [])
    assert await dead_letters(database) == []
    assert len(writer.buffer) == 38
    assert set(await rows(database, "guilds")) == {(GUILD,)}
    await database.execute("DROP TRIGGER refuse ON users")
    await write_isolated(writer, [])
    assert len(await rows(database, "users")) == 39 - is_empty


async def test_isolates_a_row_of_an_observation(database: Pool) -> None:
    await refuse(database, "users", "id", f"= {BAD}")
    writer = await writer_of(database)
    records = [user_record(id, 5) for id in (1, 2, BAD, 3)]
    observation = Observation(GUILD, 5, [Group("users", LISTED_USER_COLUMNS, Mode.MERGE, records)])
    await write_isolated(writer, [observation])
    await observation.done
    assert len(await rows(database, "users")) == 3
    assert await dead_letters(database) == [("users", BAD, "P0001")]


def _events(fence: Fence) -> list[Event]:
    base = fence.epoch << COUNTER_BITS
    joins: list[Event] = [Membership(base + id, GUILD, id, "join", when(id), when(id)) for id in (1, 2, BAD, 70)]
    return [*joins, Message(base + 99, GUILD, 1, 5)]


async def test_isolates_a_refused_event(database: Pool) -> None:
    await refuse(database, "member_events", "user_id", f"= {BAD}")
    fence = await seize(database, "a test")
    events = _events(fence)
    assert await write_events_isolated(database, fence, EventBatch("j", events, events[-1].stamp)) == 4
    assert await dead_letters(database) == [("member_events", BAD, "P0001")]


async def test_holds_events_that_are_all_refused(database: Pool) -> None:
    await refuse(database, "member_events", "user_id", "> 0")
    fence = await seize(database, "a test")
    events = _events(fence)
    batch = EventBatch("j", events, events[-1].stamp)
    with pytest.raises(DatabaseError, match="refused"):
        await write_events_isolated(database, fence, batch)
    assert await dead_letters(database) == []
    await database.execute("DROP TRIGGER refuse ON member_events")
    assert await write_events_isolated(database, fence, batch) == 5


async def test_tells_for_how_long_rows_are_refused(database: Pool) -> None:
    writer = await writer_of(database)
    assert writer.delay() is None
    assert writer._should_retry(DatabaseError("refused", sqlstate="P0001"))
    delay = writer.delay()
    assert delay is not None
    assert delay[0] >= 0
    assert delay[1] == "refused"
    await writer._write_next(2)
    assert writer.delay() is None
