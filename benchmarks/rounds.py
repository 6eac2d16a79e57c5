"""Rounds: every way once a round, in an order that rotates, with the time and the processor time of each."""

from __future__ import annotations

import gc
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import psutil

from utils.database import Pool


@dataclass(frozen=True, slots=True)
class Sample:
    """What one way took in one round, in seconds."""

    seconds: float
    #: Processor time of this process and of the database server together.
    cpu: float


@dataclass(slots=True)
class Samples:
    """The samples of one way, one a round."""

    all: list[Sample]

    @property
    def seconds(self) -> list[float]:
        """Elapsed time of each round."""
        return [sample.seconds for sample in self.all]

    @property
    def cpu(self) -> list[float]:
        """Processor time of each round."""
        return [sample.cpu for sample in self.all]


class ServerClock:
    """Reads the processor time that a local server and all its backends have used, those that ended included."""

    def __init__(self, postmaster: psutil.Process) -> None:
        self._postmaster = postmaster

    @classmethod
    async def of(cls, pool: Pool) -> ServerClock:
        """Find the server behind a pool; it must run on this machine."""
        backend = psutil.Process(await pool.fetchval("SELECT pg_backend_pid()"))
        postmaster = backend.parent()
        assert postmaster is not None
        return cls(postmaster)

    def seconds(self) -> float:
        """Return the processor time so far."""
        own = self._postmaster.cpu_times()
        total = own.user + own.system + own.children_user + own.children_system
        for child in self._postmaster.children(recursive=True):
            try:
                times = child.cpu_times()
            except psutil.NoSuchProcess:  # it ended since: the next reading has it among the postmaster's children
                continue
            total += times.user + times.system
        return float(total)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to do the work: `work` is timed, `prepare` and `check`, which run around it, are not."""

    work: Callable[[], Awaitable[object]]
    prepare: Callable[[], Awaitable[object]] | None = None
    check: Callable[[], Awaitable[object]] | None = None


async def interleave(
    ways: Mapping[str, Way], clock: ServerClock | None, *, rounds: int, warm_up: int = 1
) -> dict[str, Samples]:
    """Run every way once a round and return the samples by name; the first `warm_up` rounds do not count."""
    names = list(ways)
    samples: dict[str, Samples] = {name: Samples([]) for name in names}
    for turn in range(warm_up + rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            way = ways[name]
            if way.prepare is not None:
                await way.prepare()
            sample = await timed(way.work, clock)
            if way.check is not None:
                await way.check()
            if turn >= warm_up:
                samples[name].all.append(sample)
    return samples


async def timed(work: Callable[[], Awaitable[object]], clock: ServerClock | None) -> Sample:
    """Run the work once and return what it took."""
    gc.collect()
    server = 0.0 if clock is None else clock.seconds()
    cpu, started = time.process_time(), time.perf_counter()
    await work()
    seconds = time.perf_counter() - started
    spent = time.process_time() - cpu
    return Sample(seconds, spent + (0.0 if clock is None else clock.seconds() - server))
