"""The journal on disks that fail, hang and corrupt data, and compared with a list as its model."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import examples
from tests.mirror.spool.journals import (
    POLICY,
    TIMEOUT,
    adopt,
    append,
    close_and_reread,
    open_journal,
    read_stamps,
    segment_files,
    write,
)
from tests.waiting import until
from utils.exceptions import SpoolError
from utils.mirror.spool.journal import LOCK, DiskPolicy, Journal, is_dead
from utils.mirror.spool.segments import READ_BYTES, Damage, Segments

pytestmark = pytest.mark.slow


class FailingCall:
    """Replaces a function of `os`; its next `times` calls fail."""

    def __init__(self, name: str, number: int, monkeypatch: pytest.MonkeyPatch, *, times: int = 10**9) -> None:
        self.real: Callable[..., Any] = getattr(os, name)
        self.number = number
        self.times = times
        self.calls = 0
        monkeypatch.setattr(os, name, self)

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.times <= 0:
            return self.real(*arguments)
        self.times -= 1
        if self.real.__name__ == "write":  # a nearly full disk writes a part
            self.real(arguments[0], bytes(arguments[1])[:5])
        raise OSError(self.number, os.strerror(self.number))


@contextmanager
def gated(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Semaphore, list[int]]]:
    """Make calls of a function of `os` wait for a semaphore; the list collects the calling threads."""
    real, gate = getattr(os, name), threading.Semaphore(0)
    callers: list[int] = []

    def call(*arguments: Any) -> Any:
        callers.append(threading.get_ident())
        assert gate.acquire(timeout=TIMEOUT)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, call)
        try:
            yield gate, callers
        finally:
            gate.release(1_000)


# --- slow, full and failing disks


async def test_batches_records_in_another_thread_during_a_slow_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = await open_journal(tmp_path)
    with gated("fdatasync", monkeypatch) as (gate, callers):
        append(journal, 1)
        await until(lambda: callers)
        append(journal, *range(2, 1_001))
        assert journal.unwritten == 1_000
        assert journal.unwritten_bytes == sum(len(f"event {stamp}") for stamp in range(1, 1_001))
        gate.release(2)
        assert await journal.wait_written(TIMEOUT)
        assert len(callers) == 2
        assert threading.get_ident() not in callers
    assert (journal.unwritten, journal.unwritten_bytes) == (0, 0)
    assert await close_and_reread(journal) == [*range(1, 1_001)]


@pytest.mark.parametrize(
    ("name", "number"),
    [("write", errno.ENOSPC), ("fdatasync", errno.EIO), ("fsync", errno.EIO), ("open", errno.EACCES)],
)
async def test_keeps_and_retries_records_that_the_disk_refuses(
    name: str, number: int, journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="utils.mirror")
    await write(journal, *range(1, 16))
    with monkeypatch.context() as patch:
        failing = FailingCall(name, number, patch)
        append(journal, *range(16, 51))
        await until(lambda: failing.calls > 4)
        assert str(journal.failure) == os.strerror(number)
        assert not await journal.wait_written(0.01)
        assert 20 < journal.unwritten <= 35  # the open segment may have had room
        assert journal.records == 50
    assert await journal.wait_written(TIMEOUT)
    assert (journal.failure, journal.unwritten) == (None, 0)
    assert await read_stamps(journal) == [*range(1, 51)]
    assert len(segment_files(journal)) < 12, "retries leave no files behind"
    assert not journal.damage
    logged = [record for record in caplog.records if record.name == "utils.mirror.spool.journal"]
    assert [record.levelname for record in logged] == ["ERROR", "INFO"]
    assert os.strerror(number) in logged[0].getMessage()
    assert await close_and_reread(journal) == [*range(1, 51)]


async def test_reads_and_trims_records_in_memory(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    await write(journal, 1, 2, 3)
    FailingCall("write", errno.ENOSPC, monkeypatch)
    append(journal, 4, 5, 6)
    await until(lambda: journal.failure)
    assert await read_stamps(journal) == [1, 2, 3, 4, 5, 6]
    assert await read_stamps(journal, after=2, limit=3) == [3, 4, 5]
    await journal.trim(4)
    assert (await read_stamps(journal), journal.records) == ([5, 6], 2)
    await journal.trim(6)
    assert await journal.wait_written(TIMEOUT), "nothing is left to write"
    assert (await read_stamps(journal), journal.records, journal.unwritten_bytes) == ([], 0, 0)


async def test_trimming_during_a_write_removes_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = await open_journal(tmp_path)
    with gated("fdatasync", monkeypatch) as (gate, callers):
        append(journal, 1, 2, 3)
        await until(lambda: callers)
        append(journal, 4, 5)
        await journal.trim(2)
        gate.release(9)
        assert await journal.wait_written(TIMEOUT)
    assert (await read_stamps(journal), await close_and_reread(journal)) == ([3, 4, 5], [1, 2, 3, 4, 5])


@pytest.mark.parametrize("also", [(), ("ftruncate",), ("ftruncate", "unlink")])
@pytest.mark.parametrize("name", ["write", "fdatasync"])
async def test_a_failed_write_leaves_no_damage_and_no_duplicates(
    name: str, also: tuple[str, ...], journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write(journal, 1, 2)
    with monkeypatch.context() as patch:
        for undoing in also:
            FailingCall(undoing, errno.EIO, patch)
        failing = FailingCall(name, errno.EIO, patch, times=3)
        append(journal, 3, 4)
        await until(lambda: failing.calls > 3)
        assert await journal.wait_written(TIMEOUT)
    await write(journal, 5)
    assert await read_stamps(journal) == [1, 2, 3, 4, 5]
    # The same segment is used again only if the failed write could be truncated and was not being flushed.
    files = {"write": (1, 2, 2), "fdatasync": (2, 2, 4)}[name][len(also)]
    assert len(segment_files(journal)) == files
    assert await close_and_reread(journal) == [1, 2, 3, 4, 5]


async def test_an_unexpected_error_does_not_stop_writing(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Segments, "write", mock.Mock(side_effect=MemoryError("none left")))
        append(journal, 1)
        await until(lambda: journal.failure)
    assert await journal.wait_written(TIMEOUT)
    assert caplog.records[0].exc_info is not None
    assert await close_and_reread(journal) == [1]


async def test_close_gives_up_on_a_failing_disk(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await write(journal, 1)
    with monkeypatch.context() as patch:
        FailingCall("write", errno.ENOSPC, patch)
        append(journal, 2, 3)
        await journal.close(0.01)
    assert "2 events were not written to the spool: No space left on device" in caplog.text
    assert await close_and_reread(journal) == [1]


async def test_close_gives_up_on_a_hung_disk_and_keeps_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = await open_journal(tmp_path)
    with gated("fdatasync", monkeypatch) as (_, callers):
        append(journal, 1)
        await until(lambda: callers)
        await journal.close(0.01)
        assert not is_dead(tmp_path, "ours")


# --- damaged files


async def test_damage_ends_its_segment_and_is_logged_once(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    for stamp in range(1, 31):
        await write(journal, stamp)
    _, second, third, *_ = segment_files(journal)
    second.write_bytes(second.read_bytes()[:-3] + b"\0\0\0")
    third.write_bytes(b"x" + third.read_bytes()[1:])
    (journal.path / "00000000000000000999.tmp").write_bytes(b"half a header")
    (journal.path / "00000000000000000999.journal").touch()
    await journal.close(1.0)
    other = await adopt(journal.path)
    for _ in range(3):
        read = await read_stamps(other)
        assert len(read) < 30
    assert [(damage.segment, damage.why) for damage in other.damage] == [
        (second, "checksum mismatch"),
        (third, "invalid segment header"),
    ]
    assert other.damage[1].bytes_lost == third.stat().st_size
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert f"last {other.damage[0].bytes_lost} bytes are lost" in caplog.text
    assert (other.records, other.last) == (len(read), 30)
    await other.remove()


async def test_a_read_error_of_the_system_loses_nothing(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await write(journal, *range(1, 31))
    assert await read_stamps(journal, limit=5) == [1, 2, 3, 4, 5]
    too_many = mock.Mock(side_effect=OSError(errno.EMFILE, "Too many open files"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", too_many)
        with pytest.raises(SpoolError, match="Too many open files"):
            await journal.read(5, 10)
        await journal.close(1.0)
        assert await Journal.adopt(journal.path) is None
    assert "Too many open files" in caplog.text
    assert await close_and_reread(journal) == [*range(1, 31)]


async def test_a_repeated_stamp_is_damage(tmp_path: Path) -> None:
    write_journal(tmp_path / "theirs", [9, 9], 1_000)
    with (tmp_path / "theirs" / "00000000000000000001.journal").open("r+b") as file:
        content = file.read()
        file.write(content[-25:])  # the last record once more
    read, damage = await read_all(tmp_path / "theirs", 10)
    assert read == [1, 2]
    assert damage == [(mock.ANY, 25, "a record is older than its predecessor")]


class WrittenRecord(NamedTuple):
    """A record and its position."""

    stamp: int
    segment: int
    start: int
    end: int


def write_journal(directory: Path, sizes: list[int], segment_bytes: int) -> list[WrittenRecord]:
    """Write a journal with payloads of these sizes, as a killed process leaves it."""
    directory.mkdir()
    (directory / LOCK).touch()
    store = Segments(directory, segment_bytes)
    records: list[WrittenRecord] = []
    with mock.patch("os.fdatasync"), mock.patch("os.fsync"):
        for stamp, size in enumerate(sizes, 1):
            store.write([(stamp, bytes(size))])
            names = sorted(os.listdir(directory))[:-1]
            end = os.path.getsize(directory / names[-1])
            records.append(WrittenRecord(stamp, len(names) - 1, end - size - 16, end))
    store.close()
    return records


async def read_all(path: Path, limit: int, policy: DiskPolicy = POLICY) -> tuple[list[int], list[Damage]]:
    """Read an abandoned journal in steps; return the stamps and the damage found."""
    journal = await adopt(path, policy)
    stamps: list[int] = []
    while records := await journal.read(stamps[-1] if stamps else 0, limit):
        stamps += [stamp for stamp, _ in records]
    assert journal.records == len(stamps)
    assert [stamp for stamp, _ in await journal.read(0, 10_000)] == stamps
    damage = list(journal.damage)
    await journal.close(1.0)
    return stamps, damage


@examples(100)
@given(
    sizes=st.lists(st.integers(0, 90), min_size=6, max_size=25),
    segment_bytes=st.integers(100, 400),
    where=st.floats(0, 1, exclude_max=True),
    which=st.floats(0, 1, exclude_max=True),
    mask=st.integers(0, 255),
    limit=st.integers(1, 30),
    read_bytes=st.sampled_from([16, 50, READ_BYTES]),
)
def test_any_damage_loses_only_the_rest_of_its_segment(
    sizes: list[int], segment_bytes: int, where: float, which: float, mask: int, limit: int, read_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "theirs"
        records = write_journal(path, sizes, segment_bytes)
        paths = sorted(path.glob("*.journal"))
        broken = int(which * len(paths))
        content = bytearray(paths[broken].read_bytes())
        size = len(content)
        at = int(where * size)
        if mask:
            content[at] ^= mask
        else:
            del content[at:]
        paths[broken].write_bytes(content)
        intact = [record.stamp for record in records if record.segment != broken or record.end <= at]
        assert len(intact) < len(records)

        stamps, damage = asyncio.run(read_all(path, limit, POLICY._replace(read_bytes=read_bytes)))

        assert stamps == intact
        here = [record for record in records if record.segment == broken]
        good = max(end for end in (0, here[0].start, *(record.end for record in here)) if end <= at)
        if not mask and broken == len(paths) - 1:
            # A cut at the end of the last segment shows only if it is in the middle of a record.
            size = at
        assert damage == ([] if size == good else [(paths[broken], size - good, mock.ANY)])


#: Functions of `os` that fail; the first two start a failure.
FAILING = ("write", "fdatasync", "ftruncate", "unlink")
KINDS = ["append", "append", "append", "settle", "read", "trim", "yield", *FAILING[:2]]
STEPS = st.tuples(st.sampled_from(KINDS), st.integers(0, 60), st.integers(1, 40))
Steps = list[tuple[str, int, int]]


@examples(60)
@given(steps=st.lists(STEPS, max_size=40), rest=st.lists(STEPS, max_size=8), segment_bytes=st.integers(100, 600))
def test_behaves_like_a_list_under_any_operations(steps: Steps, rest: Steps, segment_bytes: int) -> None:
    async def follow(journal: Journal, steps: Steps, model: dict[int, bytes], failures: dict[str, FailingCall]) -> None:
        for what, number, limit in steps:
            if what == "append" and failures:
                for stamp in range(journal.last + 1, journal.last + 1 + limit):
                    model[stamp] = os.urandom(number)
                    journal.append(stamp, model[stamp])
            elif what == "settle":
                assert await journal.wait_written(TIMEOUT)
                assert (journal.unwritten, journal.unwritten_bytes) == (0, 0)
            elif what == "read":
                after = journal.last - number
                assert await journal.read(after, limit) == [item for item in model.items() if item[0] > after][:limit]
            elif what == "trim":
                upto = min(model, default=0) + number
                await journal.trim(upto)
                for stamp in [stamp for stamp in model if stamp <= upto]:
                    del model[stamp]
            elif what == "yield":
                await asyncio.sleep(0)
            elif what in failures:
                failures[what].times = limit % 4
                failures["ftruncate"].times = failures["unlink"].times = limit % 3
            assert journal.records == len(model)

    async def run(directory: Path, patch: pytest.MonkeyPatch) -> None:
        model: dict[int, bytes] = {}
        journal = await open_journal(directory, max_bytes=2**30, segment_bytes=segment_bytes)
        failures = {name: FailingCall(name, errno.EIO, patch, times=0) for name in FAILING}
        await follow(journal, steps, model, failures)
        assert await journal.read(0, 10_000) == list(model.items())
        assert await journal.wait_written(TIMEOUT)
        patch.undo()
        await journal.close(TIMEOUT)
        assert not journal.damage
        assert os.listdir(directory) == (["ours"] if model else [])
        if not model:
            return
        other = await adopt(journal.path)
        # Positions are stored elsewhere: records trimmed but still on disk are read again.
        await other.trim(min(model) - 1)
        await follow(other, rest, model, {})
        assert await other.read(0, 10_000) == list(model.items())
        await other.remove()
        assert not os.listdir(directory)

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        asyncio.run(run(Path(name), patch))
