"""The journal: what it has taken is there again, whoever was killed, and what is damaged costs no more than it must."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.errors import SpoolError
from utils.mirror.journal import Journal, found, is_dead
from utils.mirror.segments import MAGIC, Record, Segments

ROOT = Path(__file__).parents[2]
BOUND = 20.0


@contextlib.asynccontextmanager
async def opened(directory: Path, id: str = "ours", *, segment: int = 200) -> AsyncIterator[Journal]:
    journal = await Journal.open(directory, id, max_bytes=2**20, segment_bytes=segment)
    try:
        yield journal
    finally:
        await journal.close(BOUND)


def records(first: int, last: int) -> list[Record]:
    return [(stamp, f"payload of {stamp}".encode()) for stamp in range(first, last + 1)]


async def fill(journal: Journal, first: int, last: int) -> list[Record]:
    told = records(first, last)
    for record in told:
        journal.append(*record)
        if record[0] % 5 == 0:  # what is written at once goes to one segment
            assert await journal.settled(BOUND)
    assert await journal.settled(BOUND)
    return told


async def adopted(path: Path) -> Journal:
    journal = await Journal.adopt(path)
    assert journal is not None
    return journal


async def test_records_come_out_in_order_from_any_stamp_on(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        told = await fill(journal, 1, 50)
        assert len(list(journal.path.glob("*.journal"))) > 3
        assert await journal.read(0, 100) == told
        assert await journal.read(20, 10) == told[20:30]
        assert await journal.read(30, 10) == told[30:40]
        assert await journal.read(5, 3) == told[5:8]


async def test_what_the_disk_has_not_taken_yet_is_read_all_the_same(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        told = await fill(journal, 1, 3)
        for record in records(4, 6):
            journal.append(*record)
        assert journal.unwritten == 3
        assert await journal.read(0, 5) == (told + records(4, 6))[:5]
        assert await journal.read(2, 9) == records(3, 6)


async def test_what_is_forgotten_leaves_the_disk_and_an_empty_journal_leaves_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await fill(journal, 1, 50)
        size = journal.size
        await journal.trim(40)
        assert (journal.records, journal.size < size / 2) == (10, True)
        assert await journal.read(40, 100) == records(41, 50)
        await journal.trim(50)
        assert journal.records == 0
    assert os.listdir(tmp_path) == []


async def test_the_next_process_reads_what_was_left_and_removes_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        told = await fill(journal, 1, 30)
        await journal.trim(10)
    assert found(tmp_path) == [tmp_path / "ours"]
    left = await adopted(tmp_path / "ours")
    assert (await left.read(0, 100))[-20:] == told[-20:]
    assert await left.read(10, 100) == told[10:]
    await left.remove()
    assert found(tmp_path) == []
    assert os.listdir(tmp_path) == []


async def test_an_adopted_journal_that_is_let_go_of_is_still_there(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await fill(journal, 1, 3)
    first = await adopted(tmp_path / "ours")
    await first.close(BOUND)
    again = await adopted(tmp_path / "ours")
    assert await again.read(0, 9) == records(1, 3)
    await again.close(BOUND)


async def test_a_journal_belongs_to_one_process_as_long_as_that_runs(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await fill(journal, 1, 1)
        assert await Journal.adopt(journal.path) is None
        assert not is_dead(tmp_path, "ours")
        with pytest.raises(SpoolError, match="belongs to another process"):
            await Journal.open(tmp_path, "ours", max_bytes=1)
    assert is_dead(tmp_path, "ours")


@pytest.mark.parametrize("id", ["nobody", "..", "../ours", "a/b", ""])
async def test_nobody_is_called_dead_without_proof(tmp_path: Path, id: str) -> None:
    async with opened(tmp_path) as journal:
        await fill(journal, 1, 1)
    assert not is_dead(tmp_path / "ours", id)


async def test_a_directory_that_cannot_be_had_is_told_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError, match="DATA_DIR"):
        await Journal.open(tmp_path / "file", "ours", max_bytes=1)


async def test_files_are_touched_in_another_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set[int]()
    for name in ("write", "fdatasync", "fsync"):
        original = getattr(os, name)

        def watched(*arguments: object, original: object = original) -> object:
            threads.add(threading.get_ident())
            return original(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(os, name, watched)
    async with opened(tmp_path) as journal:
        await fill(journal, 1, 30)
    assert threads
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("refused", ["write", "fdatasync", "open"])
async def test_a_full_disk_costs_nothing_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refused: str
) -> None:
    original, calls = getattr(os, refused), [0]

    def full(*arguments: object, **others: object) -> object:
        calls[0] += 1
        if refused == "write" and calls[0] % 2:  # half a record, then none
            return original(arguments[0], bytes(arguments[1])[:7])  # type: ignore[call-overload]
        if refused == "open" and not str(arguments[0]).endswith(".tmp"):
            return original(*arguments, **others)
        raise OSError(errno.ENOSPC, "No space left on device")

    async with opened(tmp_path) as journal:
        told = await fill(journal, 1, 10)
        with monkeypatch.context() as patch:
            patch.setattr(os, refused, full)
            for record in records(11, 40):
                journal.append(*record)
            assert not await journal.settled(0.5)
            assert journal.trouble == "No space left on device"
            assert (journal.unwritten, journal.records) == (30, 40)
            assert await journal.read(0, 100) == told + records(11, 40)
        assert await journal.settled(BOUND)
        assert journal.trouble is None
        assert await journal.read(0, 100) == records(1, 40)
        assert journal.damage == []
    left = await adopted(tmp_path / "ours")
    assert await left.read(0, 100) == records(1, 40)
    assert left.damage == []
    await left.close(BOUND)
    assert caplog.text.count("the spool takes nothing") == 1


async def test_a_full_spool_keeps_in_memory_what_comes_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    journal = await Journal.open(tmp_path, "ours", max_bytes=300, segment_bytes=100)
    await fill(journal, 1, 10)
    assert journal.is_full
    for record in records(11, 20):
        journal.append(*record)
    assert not await journal.settled(0.1)
    assert await journal.read(0, 100) == records(1, 20)
    await journal.trim(10)
    assert await journal.settled(BOUND)
    assert await journal.read(10, 100) == records(11, 20)
    await journal.close(BOUND)


# --- damage


@settings(max_examples=300)
@given(data=st.data())
def test_damage_costs_the_rest_of_its_segment_and_nothing_else(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        written = Segments(directory, segment_bytes=150)
        told: dict[Path, list[Record]] = {}
        for stamp in range(1, 25):
            record = (stamp, bytes([stamp]) * data.draw(st.integers(0, 30), label="length"))
            written.write([record])
            told.setdefault(written._segments[-1].path, []).append(record)
        written.close()
        path = data.draw(st.sampled_from(sorted(told)), label="segment")
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1), label="place")
        if data.draw(st.booleans(), label="truncated"):
            del content[place:]
        else:
            content[place] ^= 1 << data.draw(st.integers(0, 7), label="bit")
        path.write_bytes(content)

        segments = Segments.found(directory)
        out: list[Record] = []
        while batch := segments.read(out[-1][0] if out else 0, data.draw(st.integers(1, 9), label="limit")):
            out += batch
        others = [record for other in told if other != path for record in told[other]]
        left = [record for record in out if record in told[path]]
        assert [record for record in out if record not in told[path]] == others
        assert left == told[path][: len(left)]
        whole = sum(16 + len(payload) for _, payload in left) + len(MAGIC)
        assert whole <= max(place, len(MAGIC)) or len(left) == 0
        if len(left) < len(told[path]) and len(content) > whole:
            (damage,) = segments.damage
            assert (damage.segment, damage.bytes_lost > 0) == (path, True)


@settings(max_examples=60)
@given(
    steps=st.lists(st.sampled_from(["append", "append", "settle", "read", "trim", "restart"]), max_size=40),
    data=st.data(),
)
async def test_it_is_a_queue_whatever_is_done_with_it(steps: list[str], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory, expected, stamp, restarts = Path(name), list[Record](), 0, 0
        journal = await Journal.open(directory, "0", max_bytes=2**20, segment_bytes=120)
        for step in steps:
            if step == "append":
                stamp += data.draw(st.integers(1, 5), label="apart")
                expected.append((stamp, data.draw(st.binary(max_size=40), label="payload")))
                journal.append(*expected[-1])
            elif step == "settle":
                assert await journal.settled(BOUND)
                assert journal.unwritten == 0
            elif step == "read":
                after = data.draw(st.integers(0, stamp + 1), label="after")
                limit = data.draw(st.integers(1, 9), label="limit")
                kept = [record for record in expected if record[0] > after]
                if kept == [record for record in expected if record[0] > max(after, 0)]:
                    got = [record for record in await journal.read(after, 100) if record in expected]
                    assert got == kept
                assert len(await journal.read(after, limit)) <= limit
            elif step == "trim":
                upto = data.draw(st.integers(0, stamp), label="upto")
                await journal.trim(upto)
                expected = [record for record in expected if record[0] > upto]
            else:
                await journal.close(BOUND)
                left = await Journal.adopt(directory / str(restarts))
                assert (left is None) == (not expected)
                if left is not None:
                    after = expected[0][0] - 1
                    assert await left.read(after, 100) == expected
                    await left.remove()
                expected, restarts = [], restarts + 1
                journal = await Journal.open(directory, str(restarts), max_bytes=2**20, segment_bytes=120)
            assert journal.records == len(expected)
        await journal.close(BOUND)


# --- kill -9

WRITER = """
import asyncio, sys
from pathlib import Path
from utils.mirror.journal import Journal

async def main():
    journal = await Journal.open(Path(sys.argv[1]), "theirs", max_bytes=2**30, segment_bytes=2_000)
    for stamp in range(1, 1_000_000):
        journal.append(stamp, b"payload of %d" % stamp)
        if stamp % 7 == 0:
            await journal.settled(60)
            print(stamp, flush=True)

asyncio.run(main())
"""


async def test_what_was_confirmed_outlives_a_kill_at_any_moment(tmp_path: Path) -> None:
    chance = random.Random(7)
    for turn in range(4):
        directory = tmp_path / str(turn)
        process = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-c", WRITER, str(directory)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            confirmed = 0
            for _ in range(chance.randint(1, 60)):
                confirmed = int(await asyncio.to_thread(process.stdout.readline))
            assert not is_dead(directory, "theirs")
            process.send_signal(signal.SIGSTOP)
            assert not is_dead(directory, "theirs")
            assert await Journal.adopt(directory / "theirs") is None
        finally:
            process.kill()
            confirmed = max([confirmed, *map(int, process.communicate()[0].split())])
        assert is_dead(directory, "theirs")
        left = await adopted(directory / "theirs")
        got = await left.read(0, 1_000_000)
        assert got == records(1, len(got))
        assert len(got) >= confirmed
        await left.remove()
