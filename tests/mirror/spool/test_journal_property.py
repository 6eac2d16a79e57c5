"""The journal on disks that refuse, hang and rot, and against a list that does the same without any disk."""

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
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mirror.spool.test_journal import SOON, adopted, fill, impatient, journal, left, segments, stamps, write
from tests.waiting import until
from utils.exceptions import SpoolError
from utils.mirror.spool import segments as files
from utils.mirror.spool.journal import LOCK, Journal, is_dead
from utils.mirror.spool.segments import Damage, Segments

__all__ = ["impatient", "journal"]  # fixtures


class Refusal:
    """Stands in for a function of `os`; the next `times` calls fail with an error."""

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
        if self.real.__name__ == "write":  # what a disk that is nearly full does
            self.real(arguments[0], bytes(arguments[1])[:5])
        raise OSError(self.number, os.strerror(self.number))


@contextmanager
def gated(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Semaphore, list[int]]]:
    """Let calls of a function of `os` through only as the semaphore allows; the list has the threads that called."""
    real, gate = getattr(os, name), threading.Semaphore(0)
    callers: list[int] = []

    def call(*arguments: Any) -> Any:
        callers.append(threading.get_ident())
        assert gate.acquire(timeout=SOON)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, call)
        try:
            yield gate, callers
        finally:
            gate.release(1_000)


# --- disks that are slow, full or broken


async def test_what_comes_while_the_disk_works_is_written_at_once_afterwards_by_another_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = await Journal.open(tmp_path, "ours", max_bytes=2**20)
    with gated("fdatasync", monkeypatch) as (gate, callers):
        fill(journal, 1)
        await until(lambda: callers)
        fill(journal, *range(2, 1_001))
        assert journal.unwritten == 1_000
        assert journal.unwritten_bytes == sum(len(f"event {stamp}") for stamp in range(1, 1_001))
        gate.release(2)
        assert await journal.wait_written(SOON)
        assert len(callers) == 2
        assert threading.get_ident() not in callers
    assert (journal.unwritten, journal.unwritten_bytes) == (0, 0)
    assert await left(journal) == [*range(1, 1_001)]


@pytest.mark.parametrize(
    ("name", "number"),
    [("write", errno.ENOSPC), ("fdatasync", errno.EIO), ("fsync", errno.EIO), ("open", errno.EACCES)],
)
async def test_what_the_disk_refuses_waits_in_memory_and_is_tried_again(
    name: str, number: int, journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="utils.mirror")
    await write(journal, *range(1, 16))
    with monkeypatch.context() as patch:
        refusal = Refusal(name, number, patch)
        fill(journal, *range(16, 51))
        await until(lambda: refusal.calls > 4)
        assert str(journal.failure) == os.strerror(number)
        assert not await journal.wait_written(0.01)
        assert 20 < journal.unwritten <= 35  # an open segment may have had room
        assert journal.records == 50
    assert await journal.wait_written(SOON)
    assert (journal.failure, journal.unwritten) == (None, 0)
    assert await stamps(journal) == [*range(1, 51)]
    assert len(segments(journal)) < 12, "no try leaves a file behind"
    assert not journal.damage
    said = [record for record in caplog.records if "the spool takes" in record.getMessage()]
    assert [record.levelname for record in said] == ["ERROR", "INFO"]
    assert os.strerror(number) in said[0].getMessage()
    assert await left(journal) == [*range(1, 51)]


async def test_what_waits_in_memory_is_read_and_forgotten_like_the_rest(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write(journal, 1, 2, 3)
    Refusal("write", errno.ENOSPC, monkeypatch)
    fill(journal, 4, 5, 6)
    await until(lambda: journal.failure)
    assert await stamps(journal) == [1, 2, 3, 4, 5, 6]
    assert await stamps(journal, after=2, limit=3) == [3, 4, 5]
    await journal.trim(4)
    assert (await stamps(journal), journal.records) == ([5, 6], 2)
    await journal.trim(6)
    assert await journal.wait_written(SOON), "there is nothing left to write"
    assert (await stamps(journal), journal.records, journal.unwritten_bytes) == ([], 0, 0)


async def test_what_is_forgotten_while_it_is_written_takes_nothing_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = await Journal.open(tmp_path, "ours", max_bytes=2**20)
    with gated("fdatasync", monkeypatch) as (gate, callers):
        fill(journal, 1, 2, 3)
        await until(lambda: callers)
        fill(journal, 4, 5)
        await journal.trim(2)
        gate.release(9)
        assert await journal.wait_written(SOON)
    assert (await stamps(journal), await left(journal)) == ([3, 4, 5], [1, 2, 3, 4, 5])


@pytest.mark.parametrize("also", [(), ("ftruncate",), ("ftruncate", "unlink")])
@pytest.mark.parametrize("name", ["write", "fdatasync"])
async def test_what_a_failed_write_left_behind_is_neither_damage_nor_doubled(
    name: str, also: tuple[str, ...], journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write(journal, 1, 2)
    with monkeypatch.context() as patch:
        for undoing in also:
            Refusal(undoing, errno.EIO, patch)
        refusal = Refusal(name, errno.EIO, patch, times=3)
        fill(journal, 3, 4)
        await until(lambda: refusal.calls > 3)
        assert await journal.wait_written(SOON)
    await write(journal, 5)
    assert await stamps(journal) == [1, 2, 3, 4, 5]
    # Goes on in its file only what could be cut off and was not to be forced to disk.
    files = {"write": (1, 2, 2), "fdatasync": (2, 2, 4)}[name][len(also)]
    assert len(segments(journal)) == files
    assert await left(journal) == [1, 2, 3, 4, 5]


async def test_an_error_that_nobody_thought_of_does_not_end_the_writing(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Segments, "write", mock.Mock(side_effect=MemoryError("none left")))
        fill(journal, 1)
        await until(lambda: journal.failure)
    assert await journal.wait_written(SOON)
    assert caplog.records[0].exc_info is not None
    assert await left(journal) == [1]


async def test_closing_gives_up_on_a_disk_that_refuses(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await write(journal, 1)
    with monkeypatch.context() as patch:
        Refusal("write", errno.ENOSPC, patch)
        fill(journal, 2, 3)
        await journal.close(0.01)
    assert "2 events were not written to the spool: No space left on device" in caplog.text
    assert await left(journal) == [1]


async def test_closing_gives_up_on_a_disk_that_hangs_and_stays_the_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = await Journal.open(tmp_path, "ours", max_bytes=2**20)
    with gated("fdatasync", monkeypatch) as (_, callers):
        fill(journal, 1)
        await until(lambda: callers)
        await journal.close(0.01)
        assert not is_dead(tmp_path, "ours")


# --- files that are broken


async def test_damage_costs_the_rest_of_its_segment_and_is_told_once(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    for stamp in range(1, 31):
        await write(journal, stamp)
    _, second, third, *_ = segments(journal)
    second.write_bytes(second.read_bytes()[:-3] + b"\0\0\0")
    third.write_bytes(b"x" + third.read_bytes()[1:])
    (journal.path / "00000000000000000999.tmp").write_bytes(b"half a header")
    (journal.path / "00000000000000000999.journal").touch()
    await journal.close(1.0)
    other = await adopted(journal.path)
    for _ in range(3):
        read = await stamps(other)
        assert len(read) < 30
    assert [(damage.segment, damage.why) for damage in other.damage] == [
        (second, "a record's checksum is wrong"),
        (third, "it does not begin as a segment of this journal does"),
    ]
    assert other.damage[1].bytes_lost == third.stat().st_size
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert f"last {other.damage[0].bytes_lost} bytes are lost" in caplog.text
    assert (other.records, other.last) == (len(read), 30)
    await other.remove()


async def test_what_the_system_refuses_to_read_is_not_lost(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await write(journal, *range(1, 31))
    assert await stamps(journal, limit=5) == [1, 2, 3, 4, 5]
    too_many = mock.Mock(side_effect=OSError(errno.EMFILE, "Too many open files"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", too_many)
        with pytest.raises(SpoolError, match="Too many open files"):
            await journal.read(5, 10)
        await journal.close(1.0)
        assert await Journal.adopt(journal.path) is None
    assert "Too many open files" in caplog.text
    assert await left(journal) == [*range(1, 31)]


async def test_a_stamp_that_does_not_grow_is_damage(tmp_path: Path) -> None:
    written(tmp_path / "theirs", [9, 9], 1_000)
    with (tmp_path / "theirs" / "00000000000000000001.journal").open("r+b") as file:
        content = file.read()
        file.write(content[-25:])  # the last record once more
    read, damage = await every(tmp_path / "theirs", 10)
    assert read == [1, 2]
    assert damage == [(mock.ANY, 25, "a record is older than the one before it")]


class Written(NamedTuple):
    """A record, and where it stands."""

    stamp: int
    segment: int
    start: int
    end: int


def written(directory: Path, sizes: list[int], segment_bytes: int) -> list[Written]:
    """Write a journal with payloads of these sizes, and leave it as a process does that is killed."""
    directory.mkdir()
    (directory / LOCK).touch()
    store = Segments(directory, segment_bytes)
    records: list[Written] = []
    with mock.patch("os.fdatasync"), mock.patch("os.fsync"):
        for stamp, size in enumerate(sizes, 1):
            store.write([(stamp, bytes(size))])
            names = sorted(os.listdir(directory))[:-1]
            end = os.path.getsize(directory / names[-1])
            records.append(Written(stamp, len(names) - 1, end - size - 16, end))
    store.close()
    return records


async def every(path: Path, limit: int) -> tuple[list[int], list[Damage]]:
    """Return the stamps that come out of a journal in steps, and what was found broken."""
    journal = await adopted(path)
    stamps: list[int] = []
    while records := await journal.read(stamps[-1] if stamps else 0, limit):
        stamps += [stamp for stamp, _ in records]
    assert journal.records == len(stamps)
    assert [stamp for stamp, _ in await journal.read(0, 10_000)] == stamps
    damage = list(journal.damage)
    await journal.close(1.0)
    return stamps, damage


@settings(max_examples=200)
@given(
    sizes=st.lists(st.integers(0, 90), min_size=6, max_size=25),
    segment_bytes=st.integers(100, 400),
    where=st.floats(0, 1, exclude_max=True),
    which=st.floats(0, 1, exclude_max=True),
    mask=st.integers(0, 255),
    limit=st.integers(1, 30),
    chunk=st.sampled_from([16, 50, files.CHUNK]),
)
def test_any_broken_byte_and_any_cut_cost_only_the_rest_of_their_segment(
    sizes: list[int], segment_bytes: int, where: float, which: float, mask: int, limit: int, chunk: int
) -> None:
    with tempfile.TemporaryDirectory() as name, mock.patch.object(files, "CHUNK", chunk):
        path = Path(name) / "theirs"
        records = written(path, sizes, segment_bytes)
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
        whole = [record.stamp for record in records if record.segment != broken or record.end <= at]
        assert len(whole) < len(records)

        stamps, damage = asyncio.run(every(path, limit))

        assert stamps == whole
        here = [record for record in records if record.segment == broken]
        good = max(end for end in (0, here[0].start, *(record.end for record in here)) if end <= at)
        if not mask and broken == len(paths) - 1:
            # Nothing tells that a last segment once went on, unless it ends in the middle of something.
            size = at
        assert damage == ([] if size == good else [(paths[broken], size - good, mock.ANY)])


#: Functions of `os` that fail on broken disks; of them those whose failure begins it.
REFUSING = ("write", "fdatasync", "ftruncate", "unlink")
KINDS = ["append", "append", "append", "settle", "read", "trim", "yield", *REFUSING[:2]]
STEPS = st.tuples(st.sampled_from(KINDS), st.integers(0, 60), st.integers(1, 40))
Steps = list[tuple[str, int, int]]


@settings(max_examples=100)
@given(steps=st.lists(STEPS, max_size=40), rest=st.lists(STEPS, max_size=8), segment_bytes=st.integers(100, 600))
def test_whatever_is_done_in_whatever_order_it_is_a_list(steps: Steps, rest: Steps, segment_bytes: int) -> None:
    async def follow(journal: Journal, steps: Steps, model: dict[int, bytes], refusals: dict[str, Refusal]) -> None:
        for what, number, limit in steps:
            if what == "append" and refusals:
                for stamp in range(journal.last + 1, journal.last + 1 + limit):
                    model[stamp] = os.urandom(number)
                    journal.append(stamp, model[stamp])
            elif what == "settle":
                assert await journal.wait_written(SOON)
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
            elif what in refusals:
                refusals[what].times = limit % 4
                refusals["ftruncate"].times = refusals["unlink"].times = limit % 3
            assert journal.records == len(model)

    async def run(directory: Path, patch: pytest.MonkeyPatch) -> None:
        model: dict[int, bytes] = {}
        journal = await Journal.open(directory, "ours", max_bytes=2**30, segment_bytes=segment_bytes)
        refusals = {name: Refusal(name, errno.EIO, patch, times=0) for name in REFUSING}
        await follow(journal, steps, model, refusals)
        assert await journal.read(0, 10_000) == list(model.items())
        assert await journal.wait_written(SOON)
        patch.undo()
        await journal.close(SOON)
        assert not journal.damage
        assert os.listdir(directory) == (["ours"] if model else [])
        if not model:
            return
        other = await adopted(journal.path)
        # Positions are kept elsewhere: what was forgotten, but is on disk, comes again.
        await other.trim(min(model) - 1)
        await follow(other, rest, model, {})
        assert await other.read(0, 10_000) == list(model.items())
        await other.remove()
        assert not os.listdir(directory)

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        asyncio.run(run(Path(name), patch))
