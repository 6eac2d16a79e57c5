"""The journal: what it was given comes out, in order and once, whatever ended the process or befell the disk."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.waiting import until
from utils.exceptions import SpoolError
from utils.mirror.spool import journal as module
from utils.mirror.spool.journal import LOCK, Journal, is_dead, list_journals  # _dead
from utils.mirror.spool.segments import LONGEST

ROOT = Path(__file__).parents[3]
#: Seconds after which something that has to happen has not.
SOON = 20.0
#: Bytes of a segment in these tests: a few records.
SMALL = 200
#: Imports the journal, and not the mirror around it.
IMPORTS = """
import asyncio, os, resource, sys, types
from pathlib import Path
package = types.ModuleType("utils.mirror")
package.__path__ = ["utils/mirror"]
sys.modules["utils.mirror"] = package
from utils.mirror.spool.journal import Journal
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten what the journal waits for."""
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(module, "RETRY_SECONDS_MAX", 0.01)
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.05)


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    journal = await Journal.open(tmp_path, "ours", max_bytes=2**20, segment_bytes=SMALL)
    yield journal
    await journal.close(1.0)


def payload(stamp: int) -> bytes:
    return b"event %d" % stamp


def fill(journal: Journal, *stamps: int) -> None:
    for stamp in stamps:
        journal.append(stamp, payload(stamp))


async def write(journal: Journal, *stamps: int) -> None:
    fill(journal, *stamps)
    assert await journal.wait_written(SOON), journal.failure


async def stamps(journal: Journal, after: int = 0, limit: int = 10_000) -> list[int]:
    """Return the stamps that come out, having checked what comes with them."""
    records = await journal.read(after, limit)
    assert records == [(stamp, payload(stamp)) for stamp, _ in records]
    return [stamp for stamp, _ in records]


async def adopted(path: Path) -> Journal:
    journal = await Journal.adopt(path)
    assert journal is not None, "nobody holds its lock"
    return journal


async def left(journal: Journal) -> list[int]:
    """Close a journal, and return the stamps that another process finds, which also finds nothing broken."""
    await journal.close(1.0)
    other = await adopted(journal.path)
    try:
        assert not other.damage
        assert other.records == len(await stamps(other))
        return await stamps(other)
    finally:
        await other.remove()


def segments(journal: Journal) -> list[Path]:
    return sorted(journal.path.glob("*.journal"))


# --- the queue


async def test_what_was_appended_comes_out_oldest_first(journal: Journal) -> None:
    await write(journal, *range(1, 51))
    fill(journal, 60, 70)
    assert await stamps(journal) == [*range(1, 51), 60, 70]
    assert await stamps(journal, after=48) == [49, 50, 60, 70]
    assert await stamps(journal, after=10, limit=3) == [11, 12, 13]
    assert await stamps(journal, after=13, limit=2) == [14, 15]
    assert await stamps(journal, after=2, limit=2) == [3, 4]  # back again
    assert await stamps(journal, after=70) == []
    assert (journal.last, journal.records) == (70, 52)


async def test_what_was_read_over_can_be_read_afterwards(journal: Journal) -> None:
    await write(journal, *range(1, 31))
    assert await stamps(journal, after=30) == []
    assert await stamps(journal, after=12) == [*range(13, 31)]


async def test_a_journal_grows_by_segments_and_forgets_by_segments(journal: Journal) -> None:
    for stamp in range(1, 41):
        await write(journal, stamp)
    files = segments(journal)
    assert len(files) > 4
    assert journal.size == sum(file.stat().st_size for file in files)
    await journal.trim(1)
    assert segments(journal) == files
    assert journal.records == 39
    assert await stamps(journal, limit=1) == [2]
    await journal.trim(30)
    assert segments(journal) == files[-len(segments(journal)) :]
    assert 1 < len(segments(journal)) <= 3
    assert journal.size == sum(file.stat().st_size for file in segments(journal))
    assert journal.records == 10
    assert await stamps(journal) == [*range(31, 41)]
    await journal.trim(99)
    assert (journal.records, journal.size, segments(journal)) == (0, 0, [])
    await write(journal, 50)
    assert await stamps(journal) == [50]
    assert not journal.damage


async def test_what_is_closed_empty_leaves_nothing_and_what_is_not_is_there_for_others(tmp_path: Path) -> None:
    empty = await Journal.open(tmp_path, "empty", max_bytes=2**20)
    await write(empty, 1, 2)
    await empty.trim(2)
    assert len(segments(empty)) == 1, "a file that has hardly begun goes on"
    await empty.close(1.0)
    ours = await Journal.open(tmp_path, "ours", max_bytes=2**20)
    fill(ours, 1, 2, 3)
    await ours.close(SOON)
    assert os.listdir(tmp_path) == ["ours"]
    other = await adopted(tmp_path / "ours")
    assert (other.id, other.last, other.records, other.unwritten, await stamps(other)) == ("ours", 3, 3, 0, [1, 2, 3])
    await other.trim(2)
    assert (other.records, await stamps(other)) == (1, [3])
    await other.remove()
    assert not os.listdir(tmp_path)


async def test_an_adopted_journal_that_is_not_removed_is_there_again(journal: Journal) -> None:
    await write(journal, *range(1, 31))
    await journal.close(1.0)
    for _ in range(2):
        other = await adopted(journal.path)
        assert await stamps(other) == [*range(1, 31)]
        with pytest.raises(SpoolError, match="another process's"):
            other.append(31, b"")
        await other.close(1.0)


async def test_what_no_reader_could_take_is_refused_at_once(journal: Journal) -> None:
    fill(journal, 5)
    for stamp, content in ((5, b""), (4, b""), (6, bytes(LONGEST + 1))):
        with pytest.raises(ValueError, match=str(stamp)):
            journal.append(stamp, content)
    journal.append(7, bytes(LONGEST))
    assert await journal.wait_written(SOON)
    assert await journal.read(0, 9) == [(5, payload(5)), (7, bytes(LONGEST))]
    await journal.close(1.0)
    with pytest.raises(SpoolError, match="closed"):
        fill(journal, 8)


async def test_a_full_spool_keeps_events_in_memory_until_something_is_forgotten(tmp_path: Path) -> None:
    journal = await Journal.open(tmp_path, "ours", max_bytes=500, segment_bytes=200)
    fill(journal, *range(1, 101))
    await until(lambda: journal.failure)
    assert journal.is_full
    assert "SPOOL_MAX_MB" in str(journal.failure)
    written = 100 - journal.unwritten
    assert 10 < written < 40
    assert not await journal.wait_written(0.01)
    assert await stamps(journal) == [*range(1, 101)]
    await journal.trim(written - 5)
    await until(lambda: journal.unwritten < 100 - written)
    assert await stamps(journal) == [*range(written - 4, 101)]
    await journal.trim(100)
    await until(lambda: journal.failure is None)
    await write(journal, 101)
    assert await left(journal) == [101]


async def test_a_spool_smaller_than_a_segment_takes_events_again_when_it_is_empty(tmp_path: Path) -> None:
    journal = await Journal.open(tmp_path, "ours", max_bytes=300)
    fill(journal, *range(1, 101))
    assert await journal.wait_written(SOON)
    assert journal.is_full
    await journal.trim(100)
    await write(journal, 101)
    assert await left(journal) == [101]


# --- whose it is


async def test_a_journal_that_is_there_is_not_written_over(journal: Journal, tmp_path: Path) -> None:
    await write(journal, 1, 2, 3)
    for _ in range(2):
        with pytest.raises(SpoolError, match="belongs to another process"):
            await Journal.open(tmp_path, "ours", max_bytes=2**20)
        await journal.close(1.0)
    assert os.listdir(tmp_path) == ["ours"]
    assert await left(journal) == [1, 2, 3]


async def test_where_nothing_can_be_written_people_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpoolError, match=r"under .*file: Not a directory.*DATA_DIR"):
        await Journal.open(tmp_path / "file", "ours", max_bytes=2**20)


async def test_a_journal_is_nobody_elses_as_long_as_its_process_has_it(journal: Journal, tmp_path: Path) -> None:
    assert await Journal.adopt(journal.path) is None
    assert not is_dead(tmp_path, "ours")
    assert await Journal.adopt(journal.path) is None  # having looked has not let go of it
    await write(journal, 1)
    await journal.close(1.0)
    assert is_dead(tmp_path, "ours")
    other = await adopted(journal.path)
    assert not is_dead(tmp_path, "ours")
    await other.remove()
    assert not is_dead(tmp_path, "ours")
    assert await Journal.adopt(journal.path) is None


async def test_a_journal_in_the_making_does_not_look_like_one_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        seen.extend([list_journals(tmp_path), is_dead(tmp_path, "ours")])
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    journal = await Journal.open(tmp_path, "ours", max_bytes=2**20)
    assert seen == [[], False]
    assert list_journals(tmp_path) == [journal.path]
    await journal.close(1.0)


async def test_a_file_of_another_journal_is_not_read(journal: Journal, tmp_path: Path) -> None:
    await write(journal, 1, 2, 3)
    other = await Journal.open(tmp_path, "other", max_bytes=2**20)
    await write(other, 4, 5, 6)
    segments(other)[0].rename(journal.path / "00000000000000000999.journal")
    await other.remove()
    await journal.close(1.0)
    again = await adopted(journal.path)
    assert (await stamps(again), len(again.damage)) == ([1, 2, 3], 1)
    await again.remove()


def test_journals_are_found_those_made_first_first(tmp_path: Path) -> None:
    assert list_journals(tmp_path / "missing") == []
    for number, name in enumerate(("c", "a", "d", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / LOCK).touch()
        os.utime(tmp_path / name / LOCK, (number // 2, number // 2))
    (tmp_path / "no journal").mkdir()
    (tmp_path / "file").touch()
    assert [path.name for path in list_journals(tmp_path)] == ["a", "c", "b", "d"]
    assert [path.name for path in list_journals(tmp_path, except_id="c")] == ["a", "b", "d"]
    assert is_dead(tmp_path, "a")
    for name in ("", ".", "../" + tmp_path.name + "/a", "file", "missing", "no journal"):
        assert not is_dead(tmp_path, name), name


async def test_a_journal_that_cannot_be_deleted_is_not_said_to_be(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write(journal, 1, 2)
    await journal.close(1.0)
    other = await adopted(journal.path)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        with pytest.raises(SpoolError, match="Read-only"):
            await other.remove()
    await other.close(1.0)
    assert await left(journal) == [1, 2]


# --- processes that end


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
async def test_what_was_confirmed_survives_a_kill_at_any_moment(lines: int, tmp_path: Path) -> None:
    with child(WRITES, tmp_path) as process:
        assert process.stdout is not None
        for _ in range(lines):
            confirmed = int(process.stdout.readline())
        assert await Journal.adopt(tmp_path / "theirs") is None
        process.kill()
        confirmed = int(([str(confirmed), *process.communicate()[0].split("\n")[:-1]])[-1])
    other = await adopted(tmp_path / "theirs")
    read = await stamps(other, limit=10**6)
    assert read == [*range(1, len(read) + 1)]
    assert len(read) >= confirmed
    await other.remove()


def test_a_process_is_dead_when_it_is_killed_and_not_when_it_is_stopped(tmp_path: Path) -> None:
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


async def test_a_file_that_may_not_grow_costs_nothing(tmp_path: Path) -> None:
    with child(LIMITED, tmp_path) as process:
        said = process.communicate(timeout=SOON)[0]
    assert said == "File too large True\nTrue None 0\n"
    other = await adopted(tmp_path / "theirs")
    assert await stamps(other) == [*range(1, 301)]
    assert not other.damage
    await other.remove()
