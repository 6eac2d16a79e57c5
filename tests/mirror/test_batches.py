"""Batches of cogs: what is added arrives once, whatever fails, and what a table refuses stops nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import Member
from tests.mirror.batching import POLICY, BatchProcess, batch_process, outage, xp_of
from tests.mirror.faults.test_database import administrator
from tests.mirror.tables import GUILD, dead_letters
from tests.waiting import until
from utils.database import Pool
from utils.exceptions import DatabaseUnavailable, GuildbookError, SpoolError, ValidationError
from utils.mirror.batches import resolve_target
from utils.mirror.records.batch_rows import (
    BatchRow,
    BatchTarget,
    decode_row,
    encode_head,
    encode_row,
    group_rows,
    is_batch_row,
)
from utils.mirror.records.events import Message, encode_event
from utils.mirror.spool.queue import SpoolMode
from utils.mirror.spool.segments import Tail
from utils.mirror.write.batch_rows import write_batch_rows


def row(user: int, xp: Any = 1, **values: Any) -> dict[str, Any]:
    return {"guild_id": GUILD, "user_id": user, "xp": xp, **values}


# --- what a batch does


async def test_adds_up_increments_and_keeps_the_last_of_other_values(database: Pool, tmp_path: Path) -> None:
    await database.execute("INSERT INTO member_stats (guild_id, user_id, xp) VALUES ($1, 1, 100)", GUILD)
    first, last = datetime(2026, 1, 2, tzinfo=UTC), datetime(2026, 1, 3, tzinfo=UTC)
    async with batch_process(database, tmp_path) as process:
        batch = await process.xp()
        batch.add(row(1, 5, last_active_at=first))
        batch.add(row(1, 7, last_active_at=last))
        batch.add(row(2, 3))
        batch.add({"guild_id": GUILD, "user_id": 3, "message_count": 2})
        batch.add({"guild_id": GUILD, "user_id": 4})
        assert (batch.queue_size, await xp_of(database)) == (5, {(GUILD, 1): 100})
        assert await batch.flush() == 5
        assert (batch.queue_size, await batch.flush()) == (0, 0)
    assert await xp_of(database) == {(GUILD, 1): 112, (GUILD, 2): 3, (GUILD, 3): 0, (GUILD, 4): 0}
    assert await database.fetchval("SELECT last_active_at FROM member_stats WHERE user_id = 1") == last
    assert process.written == [frozenset({"member_stats"})]
    assert await database.fetchval("SELECT count(*) FROM ops.positions") == 0


async def test_writes_by_size_and_by_age(database: Pool, tmp_path: Path) -> None:
    async with batch_process(database, tmp_path) as process:
        batch = await process.xp(size=3)
        for user in (1, 2):
            batch.add(row(user))
        await asyncio.sleep(0.1)
        assert batch.queue_size == 2
        batch.add(row(3))
        await until(lambda: batch.queue_size == 0)
        aging = await process.xp(seconds=0.2)
        aging.add(row(4))
        await until(lambda: aging.queue_size == 0)
    assert len(await xp_of(database)) == 4


async def test_closed_batch_hurries_no_other(database: Pool, tmp_path: Path) -> None:
    async with batch_process(database, tmp_path) as process:
        batch, closed = await process.xp(), await process.xp(size=1, seconds=0.01)
        await closed.close()
        batch.add(row(1))
        await asyncio.sleep(0.2)
        assert batch.queue_size == 1


async def test_refuses_rows_that_no_table_could_take(database: Pool, tmp_path: Path) -> None:
    async with batch_process(database, tmp_path) as process:
        batch = await process.xp()
        for bad, message in (
            ({"guild_id": GUILD, "xp": 1}, "the row has no user_id, which is part of the key"),
            (row(1, level=3), "it has no column 'level': expected some of guild_id, last_active_at"),
            (row(1, "five"), "xp: 'five' cannot be added up: expected a number"),
            (row(1, None), "xp: None cannot be added up"),
            (row(1, float("nan")), "xp: nan is not a finite number"),
            (row(1, last_active_at=object()), "cannot be stored: Type is not JSON serializable: object"),
            (row(1, 2**70), "cannot be stored"),
        ):
            with pytest.raises(ValidationError, match=message):
                batch.add(bad)
        assert batch.queue_size == 0
        await batch.close()
        with pytest.raises(GuildbookError, match="closed"):
            batch.add(row(1))


async def test_row_may_be_changed_after_it_was_added(database: Pool, tmp_path: Path) -> None:
    async with batch_process(database, tmp_path) as process:
        batch = await process.xp()
        reused = row(1, 5)
        batch.add(reused)
        reused["user_id"] = 2
        batch.add(reused)
    assert await xp_of(database) == {(GUILD, 1): 5, (GUILD, 2): 5}


async def test_full_batch_refuses_instead_of_dropping(database: Pool, tmp_path: Path) -> None:
    async with batch_process(database, tmp_path, spool="off", max_rows=10) as process:
        batch = await process.xp()
        for user in range(10):
            batch.add(row(user))
        with pytest.raises(DatabaseUnavailable, match="10 rows wait for the database, and there is no room for more"):
            batch.add(row(11))
        await batch.flush()
        batch.add(row(11))
    assert len(await xp_of(database)) == 11


async def test_row_that_the_disk_refuses_is_not_waited_for(
    database: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with batch_process(database, tmp_path, spool="always") as process:
        batch = await process.xp()
        batch.add(row(1))
        with monkeypatch.context() as patch:
            patch.setattr(Tail, "append", refuse)
            with pytest.raises(SpoolError, match="No space left on device"):
                batch.add(row(2))
        assert await batch.flush(5.0) == 1
        assert await xp_of(database) == {(GUILD, 1): 1}


# --- whose table it is


@pytest.mark.parametrize(
    ("table", "increments", "message"),
    [
        ("nowhere", (), "batch of 'nowhere': no model declares this table"),
        ("ops.leases", (), "batch of 'ops.leases': no model declares this table in the main schema"),
        ("members", (), "batch of members: the table belongs to Guildbook, not to cogs.levels"),
        (Member, (), "batch of members: the table belongs to Guildbook"),
        ("member_stats", ("level",), "increments names 'level', which is no column beside the key: expected some of"),
        ("member_stats", ("user_id",), "increments names 'user_id'"),
        ("member_stats", "xp", "expected a sequence of names"),
    ],
)
def test_names_what_is_wrong_with_a_table(table: Any, increments: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as raised:
        resolve_target(table, "Levels", "cogs.levels", increments)
    assert "\n" not in str(raised.value)


async def test_names_columns_that_the_database_lacks(database: Pool, tmp_path: Path) -> None:
    async with batch_process(database, tmp_path) as process:
        batch = await process.xp()
        await database.execute("ALTER TABLE member_stats DROP COLUMN xp")
        with pytest.raises(ValidationError, match="the database has no column xp: run python"):
            await batch.verify()
        await database.execute("DROP TABLE member_stats CASCADE")
        with pytest.raises(ValidationError, match="the database has no such table"):
            await batch.verify()


# --- what the table refuses


async def test_refused_rows_become_dead_letters_and_stop_nobody(database: Pool, tmp_path: Path) -> None:
    await database.execute("ALTER TABLE member_stats ADD CHECK (xp < 1000)")
    async with batch_process(database, tmp_path) as process:
        batch = await process.xp()
        for user in range(20):
            batch.add(row(user, 1))
        batch.add(row(7, 5_000))
        batch.add(row(7, 2))
        batch.add(row(8, last_active_at="yesterday or so"))
        await batch.flush()
    assert await xp_of(database) == {(GUILD, user): 3 if user == 7 else 1 for user in range(20)}
    letters = await dead_letters(database)
    assert [(letter["key"]["user_id"], letter["sqlstate"]) for letter in letters] == [(7, "23514"), (8, "22007")]
    assert letters[0]["payload"] == row(7, 5_000)
    assert (letters[0]["table_name"], letters[0]["user_id"], letters[0]["cog"]) == ("member_stats", 7, "Levels")


async def test_deferred_constraints_refuse_only_their_rows(database: Pool, tmp_path: Path) -> None:
    await database.execute("CREATE TABLE allowed (user_id bigint PRIMARY KEY)")
    await database.execute("INSERT INTO allowed VALUES (1)")
    await database.execute(
        "ALTER TABLE member_stats ADD FOREIGN KEY (user_id) REFERENCES allowed DEFERRABLE INITIALLY DEFERRED"
    )
    async with batch_process(database, tmp_path) as process:
        batch = await process.xp()
        for user in (1, 2):
            batch.add(row(user))
        await batch.flush()
    assert await xp_of(database) == {(GUILD, 1): 1}
    assert [letter["key"]["user_id"] for letter in await dead_letters(database)] == [2]


async def test_spooled_rows_of_changed_columns_are_written_or_dead_letters(database: Pool, tmp_path: Path) -> None:
    target = BatchTarget("notes", ("id",), ("count",), "Notes")
    head = encode_head(target)
    spooled: list[dict[str, Any]] = [
        {"id": 1, "count": 2},
        {"id": 1, "count": 3, "dropped": "x"},
        {"id": 2, "count": 1, "kept": 5},
    ]
    rows = [BatchRow(number, encode_row(head, values, ("count",))) for number, values in enumerate(spooled, start=1)]
    await database.execute("CREATE TABLE notes (id bigint PRIMARY KEY, count int, kept text, added text DEFAULT 'new')")
    async with batch_process(database, tmp_path) as process:
        assert await write_batch_rows(database, process.fence, "former", rows, 3) == {"notes"}
        assert await write_batch_rows(database, process.fence, "former", rows, 3) == {"notes"}
        gone = encode_head(target._replace(table="gone"))
        other = BatchRow(4, encode_row(gone, {"id": 1}, ()))
        await write_batch_rows(database, process.fence, "former", [other], 4)
    assert [tuple(r) for r in await database.fetch("SELECT id, count, kept, added FROM notes ORDER BY id")] == [
        (1, 2, None, "new"),
        (2, 1, "5", "new"),
    ]
    letters = [(letter["payload"], letter["sqlstate"]) for letter in await dead_letters(database)]
    assert letters == [({"id": 1, "count": 3, "dropped": "x"}, "42703"), ({"id": 1}, "42P01")]


async def test_locked_table_delays_its_batch_and_closing_does_not_wait(
    database: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with batch_process(database, tmp_path) as process:
        batch = await process.xp()
        batch.add(row(1))
        async with administrator(database) as admin, admin.transaction():
            await admin.execute("LOCK TABLE member_stats IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(DatabaseUnavailable, match=r"1 rows were not written within 0\.2 s .*stay in the queue"):
                await batch.force_flush(0.2)
            await batch.close()
        assert "1 rows of a batch wait for the database: member_stats" in caplog.text
        await until(lambda: batch.queue_size == 0)
    assert await xp_of(database) == {(GUILD, 1): 1}
    assert await dead_letters(database) == []


# --- what fails around it


async def test_forced_flush_does_not_wait_for_the_next_attempt(database: Pool, tmp_path: Path) -> None:
    policy = POLICY._replace(retry_seconds=3_600.0, retry_max_seconds=3_600.0)
    async with batch_process(database, tmp_path, policy=policy) as process:
        batch = await process.xp()
        async with outage(database):
            batch.add(row(1))
            for flush in (batch.flush, batch.force_flush):
                with pytest.raises(DatabaseUnavailable, match="they stay in the queue"):
                    await flush(0.3)
        batch.add(row(1))
        with pytest.raises(DatabaseUnavailable, match="they stay in the queue"):
            await batch.flush(0.1)
        assert await batch.force_flush() == 2
        assert await xp_of(database) == {(GUILD, 1): 2}


async def test_final_flush_waits_for_the_commit(database: Pool, tmp_path: Path) -> None:
    async with batch_process(database, tmp_path) as process:
        batch = await process.xp()
        batch.add(row(1))
        await batch.close()
        assert await xp_of(database) == {(GUILD, 1): 1}


async def test_rows_of_an_outage_are_written_by_the_next_process(
    database: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = await BatchProcess.start(database, tmp_path)
    batch = await process.xp()
    async with outage(database):
        for _ in range(3):
            batch.add(row(1))
        await batch.close()
        await process.stop(timeout=0.1)
    assert "3 rows of a batch were not written; they are in the spool: member_stats" in caplog.text
    async with batch_process(database, tmp_path):
        assert await xp_of(database) == {(GUILD, 1): 3}
    assert not os.listdir(tmp_path)
    assert await database.fetchval("SELECT count(*) FROM ops.positions") == 0


ADDING = """
import asyncio, sys
from pathlib import Path
from tests.mirror.batching import BatchProcess
from utils.database import Pool
from utils.database.address import parse_url

async def main():
    database = Pool(parse_url(sys.argv[1]))
    await database.connect()
    process = await BatchProcess.start(database, Path(sys.argv[2]), spool="always")
    batch = await process.xp(size=1_000_000)
    number = 0
    while True:
        for _ in range(7):
            batch.add({"guild_id": 1, "user_id": number % 5, "xp": 1})
            number += 1
            print(number, flush=True)
        if number % 3 == 0:
            await asyncio.sleep(0)

asyncio.run(main())
"""


@pytest.mark.slow
async def test_kill_loses_nothing_that_was_accepted(database: Pool, database_url: str, tmp_path: Path) -> None:
    for _ in range(2):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", ADDING, database_url, str(tmp_path), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        for _ in range(random.randrange(50, 3_000)):
            last = await process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        while (line := await process.stdout.readline()).endswith(b"\n"):
            last = line
        await process.wait()
        accepted = int(last)
        async with batch_process(database, tmp_path):
            assert accepted <= sum((await xp_of(database)).values()) <= accepted + 1
        await database.execute("TRUNCATE member_stats")


Steps = list[tuple[str, int, int]]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(("add", "add", "add", "add", "flush", "wait", "outage", "reopen", "restart", "kill", "cancel")),
        st.integers(0, 5),
        st.integers(-3, 9),
    ),
    max_size=40,
)


@settings(max_examples=50)
@given(steps=STEPS, spool=st.sampled_from(("outage", "always")))
async def test_sums_equal_what_was_added(steps: list[tuple[str, int, int]], spool: SpoolMode, database: Pool) -> None:
    await database.execute("TRUNCATE member_stats, ops.positions, ops.dead_letters")
    expected: Counter[tuple[int, int]] = Counter()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        async with contextlib.AsyncExitStack() as outages:
            await run_steps(database, directory, spool, steps, expected, outages)
        async with batch_process(database, directory):
            pass
    assert await xp_of(database) == dict(expected)
    assert await dead_letters(database) == []


async def run_steps(
    database: Pool,
    directory: Path,
    spool: SpoolMode,
    steps: Steps,
    expected: Counter[tuple[int, int]],
    outages: contextlib.AsyncExitStack,
) -> None:
    process = await BatchProcess.start(database, directory, spool=spool)
    batch = await process.xp(size=4, seconds=0.05)
    is_out = False
    for what, user, xp in steps:
        if what == "add":
            batch.add(row(user, xp))
            expected[GUILD, user] += xp
        elif what == "flush" and not is_out:
            await batch.flush()
            assert batch.queue_size == 0
        elif what == "wait":
            await asyncio.sleep(0.01)
        elif what == "reopen":
            await batch.close()
            batch = await process.xp(size=1 + user, seconds=0.05)
        elif what == "cancel":
            with contextlib.suppress(DatabaseUnavailable):
                await batch.force_flush(0.0001)
        elif what == "outage":
            await outages.aclose()
            is_out = not is_out
            if is_out:
                await outages.enter_async_context(outage(database))
        elif what in ("restart", "kill"):
            await process.stop(timeout=0.05) if what == "restart" or spool == "outage" else await process.kill()
            await outages.aclose()
            is_out = False
            process = await BatchProcess.start(database, directory, spool=spool)
            batch = await process.xp(size=4, seconds=0.05)
    await process.stop(timeout=0.05)


# --- encoding


def test_combines_rows_of_a_key_in_order() -> None:
    target = BatchTarget("t", ("id",), ("n",), "Cog")
    head = encode_head(target)
    given_rows: list[dict[str, Any]] = [
        {"id": 1, "n": 1, "a": "x"},
        {"id": 2, "n": 2.5},
        {"id": 1, "n": 2**62, "b": None},
        {"id": 1, "n": 2**62, "a": "y\0\ud800"},
    ]
    rows = [decode_row(BatchRow(stamp, encode_row(head, values, ("n",)))) for stamp, values in enumerate(given_rows)]
    first, second = group_rows(rows)
    assert first.combined == [{"id": 1, "n": str(2**63 + 1), "a": "y\ufffd\ufffd", "b": None}]
    assert (second.columns, second.combined) == (("n",), [{"id": 2, "n": 2.5}])
    assert [part.stamp for part in first.rows] == [0, 2, 3]


def test_tells_rows_from_events_of_the_mirror() -> None:
    assert is_batch_row(encode_row(encode_head(BatchTarget("t", ("id",), (), "Cog")), {"id": 1}, ()))
    assert not is_batch_row(encode_event(Message(1, 2, 3, 4)))
    with pytest.raises(ValidationError, match="invalid row of a batch"):
        decode_row(BatchRow(1, b'{"target": 5}'))
