"""The journal returns its records in order and once, whatever ended the process that wrote them."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mirror.spool.journals import (
    SEGMENT_BYTES,
    TIMEOUT,
    adopt,
    append,
    close_and_reread,
    open_journal,
    payload,
    read_stamps,
    segment_files,
    write,
)
from tests.waiting import until
from utils.exceptions import SpoolError
from utils.mirror.spool.journal import LOCK, Journal, is_dead, list_journals, newest_first_stamp
from utils.mirror.spool.segments import MAX_RECORD_BYTES, TAILS, Tail, _intact_records
from utils.tasks import cancel_and_wait

ROOT = Path(__file__).parents[3]
#: Imports the journal without the rest of the mirror: the child processes start faster.
IMPORTS = """
import asyncio, os, resource, sys, types
from pathlib import Path
package = types.ModuleType("utils.mirror")
package.__path__ = ["utils/mirror"]
sys.modules["utils.mirror"] = package
from utils.mirror.spool.journal import Journal
"""


# --- the queue


async def test_reads_records_oldest_first(journal: Journal) -> None:
    await write(journal, *range(1, 51))
    append(journal, 60, 70)
    assert await read_stamps(journal) == [*range(1, 51), 60, 70]
    assert await read_stamps(journal, after=48) == [49, 50, 60, 70]
    assert await read_stamps(journal, after=10, limit=3) == [11, 12, 13]
    assert await read_stamps(journal, after=13, limit=2) == [14, 15]
    assert await read_stamps(journal, after=2, limit=2) == [3, 4]  # backwards
    assert await read_stamps(journal, after=70) == []
    assert (journal.last, journal.records) == (70, 52)


async def test_reads_records_skipped_by_an_earlier_read(journal: Journal) -> None:
    await write(journal, *range(1, 31))
    assert await read_stamps(journal, after=30) == []
    assert await read_stamps(journal, after=12) == [*range(13, 31)]


async def test_trims_whole_segments(journal: Journal) -> None:
    for stamp in range(1, 41):
        await write(journal, stamp)
    files = segment_files(journal)
    assert len(files) > 4
    assert journal.size == sum(file.stat().st_size for file in files)
    await journal.trim(1)
    assert segment_files(journal) == files
    assert journal.records == 39
    assert await read_stamps(journal, limit=1) == [2]
    await journal.trim(30)
    assert segment_files(journal) == files[-len(segment_files(journal)) :]
    assert 1 < len(segment_files(journal)) <= 3
    assert journal.size == sum(file.stat().st_size for file in segment_files(journal))
    assert journal.records == 10
    assert await read_stamps(journal) == [*range(31, 41)]
    await journal.trim(99)
    assert (journal.records, journal.size, segment_files(journal)) == (0, 0, [])
    await write(journal, 50)
    assert await read_stamps(journal) == [50]
    assert not journal.damage


async def test_deletes_an_empty_journal_when_closed_and_keeps_others(tmp_path: Path) -> None:
    empty = await open_journal(tmp_path, "empty")
    await write(empty, 1, 2)
    await empty.trim(2)
    assert len(segment_files(empty)) == 1, "a segment that is nearly empty is kept"
    await empty.close(1.0)
    ours = await open_journal(tmp_path)
    append(ours, 1, 2, 3)
    await ours.close(TIMEOUT)
    assert os.listdir(tmp_path) == ["ours"]
    other = await adopt(tmp_path / "ours")
    assert (other.id, other.last, other.records, other.unwritten, await read_stamps(other)) == (
        "ours",
        3,
        3,
        0,
        [1, 2, 3],
    )
    await other.trim(2)
    assert (other.records, await read_stamps(other)) == (1, [3])
    await other.remove()
    assert not os.listdir(tmp_path)


async def test_an_adopted_journal_stays_until_removed(journal: Journal) -> None:
    await write(journal, *range(1, 31))
    await journal.close(1.0)
    for _ in range(2):
        other = await adopt(journal.path)
        assert await read_stamps(other) == [*range(1, 31)]
        with pytest.raises(SpoolError, match="belongs to another process"):
            other.append(31, b"")
        await other.close(1.0)


async def test_rejects_invalid_records(journal: Journal) -> None:
    append(journal, 5)
    for stamp, content in ((5, b""), (4, b""), (6, bytes(MAX_RECORD_BYTES + 1))):
        with pytest.raises(ValueError, match=str(stamp)):
            journal.append(stamp, content)
    journal.append(7, bytes(MAX_RECORD_BYTES))
    assert await journal.wait_written(TIMEOUT)
    assert await journal.read(0, 9) == [(5, payload(5)), (7, bytes(MAX_RECORD_BYTES))]
    await journal.close(1.0)
    with pytest.raises(SpoolError, match="closed"):
        append(journal, 8)


async def test_a_full_journal_keeps_records_in_memory_until_trimmed(tmp_path: Path) -> None:
    journal = await open_journal(tmp_path, max_bytes=500, segment_bytes=SEGMENT_BYTES)
    append(journal, *range(1, 101))
    await until(lambda: journal.failure)
    assert journal.is_full
    assert "SPOOL_MAX_MB" in str(journal.failure)
    written = 100 - journal.unwritten
    assert 10 < written < 40
    assert not await journal.wait_written(0.01)
    assert await read_stamps(journal) == [*range(1, 101)]
    await journal.trim(written - 5)
    await until(lambda: journal.unwritten < 100 - written)
    assert await read_stamps(journal) == [*range(written - 4, 101)]
    await journal.trim(100)
    await until(lambda: journal.failure is None)
    await write(journal, 101)
    assert await close_and_reread(journal) == [101]


async def test_a_limit_below_the_segment_size_recovers_when_empty(tmp_path: Path) -> None:
    journal = await open_journal(tmp_path, max_bytes=300)
    append(journal, *range(1, 101))
    assert await journal.wait_written(TIMEOUT)
    assert journal.is_full
    await journal.trim(100)
    await write(journal, 101)
    assert await close_and_reread(journal) == [101]


# --- ownership


async def test_does_not_overwrite_an_existing_journal(journal: Journal, tmp_path: Path) -> None:
    await write(journal, 1, 2, 3)
    for _ in range(2):
        with pytest.raises(SpoolError, match="belongs to another process"):
            await open_journal(tmp_path)
        await journal.close(1.0)
    assert os.listdir(tmp_path) == ["ours"]
    assert await close_and_reread(journal) == [1, 2, 3]


async def test_reports_a_directory_that_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpoolError, match=r"under .*file: Not a directory.*DATA_DIR"):
        await open_journal(tmp_path / "file")


async def test_cannot_adopt_the_journal_of_a_running_process(journal: Journal, tmp_path: Path) -> None:
    assert await Journal.adopt(journal.path) is None
    assert not is_dead(tmp_path, "ours")
    assert await Journal.adopt(journal.path) is None  # the attempt has not released the lock
    await write(journal, 1)
    await journal.close(1.0)
    assert is_dead(tmp_path, "ours")
    other = await adopt(journal.path)
    assert not is_dead(tmp_path, "ours")
    await other.remove()
    assert not is_dead(tmp_path, "ours")
    assert await Journal.adopt(journal.path) is None


async def test_a_new_journal_never_looks_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        seen.extend([list_journals(tmp_path), is_dead(tmp_path, "ours")])
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    journal = await open_journal(tmp_path)
    assert seen == [[], False]
    assert list_journals(tmp_path) == [journal.path]
    await journal.close(1.0)


async def test_ignores_segments_of_another_journal(journal: Journal, tmp_path: Path) -> None:
    await write(journal, 1, 2, 3)
    other = await open_journal(tmp_path, "other")
    await write(other, 4, 5, 6)
    segment_files(other)[0].rename(journal.path / "00000000000000000999.journal")
    await other.remove()
    await journal.close(1.0)
    again = await adopt(journal.path)
    assert (await read_stamps(again), len(again.damage)) == ([1, 2, 3], 1)
    await again.remove()


def test_lists_journals_oldest_first(tmp_path: Path) -> None:
    assert list_journals(tmp_path / "missing") == []
    for number, name in enumerate(("c", "a", "d", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / LOCK).touch()
        os.utime(tmp_path / name / LOCK, (number // 2, number // 2))
    (tmp_path / "not a journal").mkdir()
    (tmp_path / "file").touch()
    assert [path.name for path in list_journals(tmp_path)] == ["a", "c", "b", "d"]
    assert [path.name for path in list_journals(tmp_path, except_id="c")] == ["a", "b", "d"]
    assert is_dead(tmp_path, "a")
    for name in ("", ".", "../" + tmp_path.name + "/a", "file", "missing", "not a journal"):
        assert not is_dead(tmp_path, name), name


async def test_reports_a_failed_removal(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    await write(journal, 1, 2)
    await journal.close(1.0)
    other = await adopt(journal.path)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        with pytest.raises(SpoolError, match="Read-only"):
            await other.remove()
    await other.close(1.0)
    assert await close_and_reread(journal) == [1, 2]


# --- crashes


@contextmanager
def child(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTS + script, *map(str, arguments)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


WRITES = """
async def main():
    journal = await Journal.open(Path(sys.argv[1]), "theirs", max_bytes=2**30, segment_bytes=4_000)
    stamp = 0
    while True:
        for _ in range(1 + stamp % 37):
            stamp += 1
            journal.append(stamp, b"event %d" % stamp)
        if stamp % 3 == 0:
            await asyncio.sleep(0)
        if stamp % 2:
            assert await journal.wait_written(20)
            print(stamp, flush=True)
asyncio.run(main())
"""


@pytest.mark.parametrize("lines", [1, 2, 7, 40, 150, 400])
async def test_confirmed_records_survive_sigkill(lines: int, tmp_path: Path) -> None:
    with child(WRITES, tmp_path) as process:
        assert process.stdout is not None
        for _ in range(lines):
            confirmed = int(process.stdout.readline())
        assert await Journal.adopt(tmp_path / "theirs") is None
        process.kill()
        confirmed = int(([str(confirmed), *process.communicate()[0].split("\n")[:-1]])[-1])
    other = await adopt(tmp_path / "theirs")
    read = await read_stamps(other, limit=10**6)
    assert read == [*range(1, len(read) + 1)]
    assert len(read) >= confirmed
    await other.remove()


def test_a_stopped_process_is_not_dead_a_killed_one_is(tmp_path: Path) -> None:
    with child(WRITES, tmp_path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert not is_dead(tmp_path, "theirs")
        process.send_signal(signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        assert not is_dead(tmp_path, "theirs")
        process.kill()
        process.wait()
        assert is_dead(tmp_path, "theirs")


LIMITED = """
async def main():
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, resource.RLIM_INFINITY))
    journal = await Journal.open(Path(sys.argv[1]), "theirs", max_bytes=2**30)
    for stamp in range(1, 301):
        journal.append(stamp, b"event %d" % stamp)
        if stamp % 50 == 0:
            await journal.wait_written(0.05)
    print(journal.failure, journal.unwritten > 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(await journal.wait_written(20), journal.failure, journal.unwritten)
asyncio.run(main())
"""


async def test_a_file_size_limit_loses_no_records(tmp_path: Path) -> None:
    with child(LIMITED, tmp_path) as process:
        output = process.communicate(timeout=TIMEOUT)[0]
    assert output == "File too large True\nTrue None 0\n"
    other = await adopt(tmp_path / "theirs")
    assert await read_stamps(other) == [*range(1, 301)]
    assert not other.damage
    await other.remove()


async def test_finds_the_newest_stamp_in_a_spool(tmp_path: Path) -> None:
    assert newest_first_stamp(tmp_path) == 0
    for id, stamp in (("dead", 50), ("alive", 90), ("empty", 0)):
        journal = await open_journal(tmp_path, id, segment_bytes=SEGMENT_BYTES)
        if stamp:
            await write(journal, *range(stamp, stamp + 30))
        if id == "dead":
            await journal.close(1.0)
    await journal.close(1.0)
    assert newest_first_stamp(tmp_path) == 90
    first = min((tmp_path / "alive").glob("*.journal"))
    first.write_bytes(first.read_bytes()[:-40] + bytes(40))
    assert newest_first_stamp(tmp_path) >= 90, "a damaged segment is skipped"


# --- the tail: records that survive a kill from the moment they are appended


async def kill(journal: Journal) -> None:
    """End as a killed process does: the thread is gone, and the lock is free."""
    assert journal._writing is not None
    await cancel_and_wait((journal._writing,))
    journal._thread.shutdown(wait=True)
    journal._release()


@settings(max_examples=60)
@given(
    steps=st.lists(st.sampled_from(("append", "append", "append", "write", "trim", "yield")), max_size=60),
    torn=st.integers(0, 40),
)
async def test_tail_keeps_what_a_kill_interrupts(steps: list[str], torn: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        journal = await open_journal(Path(name), segment_bytes=SEGMENT_BYTES, has_tail=True, tail_bytes=100)
        stamp = trimmed = 0
        for step in steps:
            if step == "append":
                stamp += 1
                append(journal, stamp)
            elif step == "write":
                assert await journal.wait_written(TIMEOUT)
            elif step == "trim":
                trimmed = stamp
                await journal.trim(stamp)
            else:
                await asyncio.sleep(0)
        await kill(journal)
        for tail in TAILS:  # the kill may cut a record off
            with (journal.path / tail).open("ab") as file:
                file.write(b"\0\0\0\x09" + bytes(torn))
        left = await adopt(journal.path)
        assert await read_stamps(left, after=trimmed) == list(range(trimmed + 1, stamp + 1))
        assert left.last == stamp or trimmed == stamp
        await left.remove()
        assert not os.listdir(name)


async def test_tail_stays_small(tmp_path: Path) -> None:
    journal = await open_journal(tmp_path, has_tail=True, tail_bytes=1_000)
    for stamp in range(1, 1_001):
        append(journal, stamp)
        if stamp % 10 == 0:
            assert await journal.wait_written(TIMEOUT)
    assert sum((journal.path / tail).stat().st_size for tail in TAILS) < 3_000
    await journal.remove()


def test_tail_is_emptied_only_once_segments_have_all_of_it(tmp_path: Path) -> None:
    tail = Tail(tmp_path, 100)
    for stamp in range(1, 9):
        tail.append(stamp, payload(stamp))

    def stamps() -> list[int]:
        return [stamp for stamp, _ in Tail.read(tmp_path, 0)]

    first, second = (sum(1 for _ in _intact_records((tmp_path / name).read_bytes())) for name in TAILS)
    assert (first > 0, second > 0, first + second) == (True, True, 8)
    tail.trim(first - 1)
    assert stamps() == list(range(1, 9))
    tail.trim(first)
    assert stamps() == list(range(first + 1, 9))
    assert [stamp for stamp, _ in Tail.read(tmp_path, 7)] == [8]
    tail.close()
