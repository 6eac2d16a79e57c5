"""The one write path: what waits in the buffer and what listings proved, committed together, one batch at a time."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import stamina

from utils.database import Database
from utils.errors import DatabaseError
from utils.mirror.apply import Batch, Run, Written, apply
from utils.mirror.buffer import Buffer
from utils.mirror.rows import Absence, Entry, Group, Key, Row
from utils.mirror.touched import Touched
from utils.service import metrics

_log = logging.getLogger(__name__)

#: Records of listings in one transaction.
BATCH_RECORDS = 4_000


@dataclass(eq=False, slots=True)
class Observation:
    """What Discord showed of one guild at one moment: rows, and what is gone if it is not among them."""

    guild_id: int
    stamp: int
    groups: list[Group]
    absences: list[Absence] = field(default_factory=list)
    run: Run | None = None
    #: Guilds that the bot is in, by READY: (shard id, number of shards, ids).
    ready: tuple[int, int, set[int]] | None = None
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def size(self) -> int:
        """Records in it."""
        return sum(len(group.records) for group in self.groups)


class MirrorWriter:
    """Owns the buffer and writes it, together with small listings, in order and never twice at a time."""

    def __init__(self, database: Database, *, flush_rows: int, flush_seconds: float) -> None:
        self.database: Database = database
        self.buffer: Buffer = Buffer(flush_rows=flush_rows, flush_seconds=flush_seconds)
        self.touched: Touched = Touched()
        #: Held by whoever is in a transaction that writes mirrored tables.
        self.writing: asyncio.Lock = asyncio.Lock()
        #: Held by whoever is in a transaction that writes users; taken last, and for that transaction alone.
        self.users_writing: asyncio.Lock = asyncio.Lock()
        self._held: set[int] = set()
        self._observations: deque[Observation] = deque()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    def start(self) -> None:
        """Start to write."""
        self._task = asyncio.create_task(self._run(), name="mirror-writer")

    async def stop(self, timeout: float) -> None:
        """Write what still waits, for at most `timeout` seconds, and stop."""
        self._stopping = True
        self._held.clear()
        self.buffer.wake()
        if self._task is not None:
            try:
                await asyncio.wait_for(self._task, timeout)
            except TimeoutError:
                _log.error("%s rows could not be written within %s s before the stop", len(self.buffer), timeout)
        for observation in self._observations:
            observation.done.cancel()
            self.touched.close(observation)

    def put(self, row: Row, stamp: int) -> None:
        """Take a live observation."""
        self.buffer.put(row, stamp)
        self.touched.add(row, stamp)

    def submit(self, observation: Observation) -> asyncio.Future[None]:
        """Take an observation to be written; the future ends with the commit, or with why there was none.

        What comes live from now on beats it.
        """
        self.touched.open(observation)
        self._observations.append(observation)
        self.buffer.wake()
        return observation.done

    def hold(self, guild_id: int) -> None:
        """Keep live member rows of the guild in the buffer until `release`."""
        self._held.add(guild_id)

    def release(self, guild_id: int) -> None:
        """Let live member rows of the guild flow again."""
        self._held.discard(guild_id)

    async def flush(self) -> None:
        """Write what waits in the buffer now; raises `DatabaseError` when it cannot be written."""
        async with self.writing:
            await self._commit([])

    async def flush_before(self) -> None:
        """Write what waits in the buffer; the caller holds `writing`."""
        await self._commit([])

    def again(self, guild_id: int, stamp: int) -> None:
        """Say again what live events after `stamp` said of rows that a listing has only now brought."""
        self.buffer.give_back(dict(self.touched.again(guild_id, stamp)))

    async def _run(self) -> None:
        while not (self._stopping and not len(self.buffer) and not self._observations):
            if not self._stopping and not self._observations:
                await self.buffer.due()
            if not len(self.buffer) and not self._observations:
                continue
            async for attempt in stamina.retry_context(
                on=self._worth_another_try, attempts=None, timeout=None, wait_initial=0.2, wait_max=10.0
            ):
                with attempt:
                    await self._write_next(attempt.num)

    def _worth_another_try(self, error: BaseException) -> bool:
        if not isinstance(error, Exception):  # a cancellation: the writer is to end
            return False
        _log.warning("%s rows wait, the database cannot take them: %s", len(self.buffer), error)
        metrics.flush_failures.inc()
        return True

    async def _write_next(self, attempt: int) -> None:
        observations = self._next_observations()
        try:
            await self._write(observations)
        except Exception as error:
            if not _is_about_rows(error):
                # No row is at fault (an outage, a missing table, a right withdrawn): all is held until that is mended.
                self._observations.extendleft(reversed(observations))
                raise
            await self._isolate(self.buffer.take(hold=frozenset(self._held)))
            while observations:
                await self._write_alone(observations)
        if attempt > 1:
            _log.info("the database takes rows again")

    async def _write(self, observations: list[Observation]) -> None:
        async with self.writing:
            await self._commit(observations)
        for observation in observations:
            self._end(observation, None)

    async def _write_alone(self, observations: list[Observation]) -> None:
        """Write the first of the observations, or give it up when its rows are refused."""
        try:
            await self._write(observations[:1])
        except Exception as error:
            if not _is_about_rows(error):
                self._observations.extendleft(reversed(observations))
                raise
            self._end(observations[0], error)
        del observations[0]

    def _next_observations(self) -> list[Observation]:
        taken: list[Observation] = []
        size = 0
        while self._observations and size < BATCH_RECORDS:
            taken.append(self._observations.popleft())
            size += taken[-1].size
        return taken

    def _end(self, observation: Observation, error: Exception | None) -> None:
        if error is None:
            self.again(observation.guild_id, observation.stamp)
        self.touched.close(observation)
        if observation.done.done():
            return
        if error is None:
            observation.done.set_result(None)
        else:
            observation.done.set_exception(error)

    async def _commit(self, observations: list[Observation]) -> None:
        entries = self.buffer.take(hold=frozenset(self._held))
        batch = Batch(entries=entries)
        for observation in observations:
            batch.groups += self._older_than_live(observation)
            batch.absences += self._sparing_live(observation)
            if observation.run is not None:
                batch.runs.append(observation.run)
            if observation.ready is not None:
                batch.ready.append((*observation.ready, observation.stamp))
        try:
            with metrics.flush_seconds.time():
                written = await apply(self.database, batch, self.users_writing)
        except BaseException:
            self.buffer.give_back(entries)
            raise
        _count(written)

    def _older_than_live(self, observation: Observation) -> Iterator[Group]:
        """Split an observation's groups: of rows touched live since, only what nobody spoke of may be written."""
        for group in observation.groups:
            scope = 0 if group.table == "users" else observation.guild_id
            yield from self.touched.behind(group, scope, observation.stamp)

    def _sparing_live(self, observation: Observation) -> list[Absence]:
        return [
            absence._replace(
                present={*absence.present, *self.touched.since(absence.table, absence.guild_id, absence.stamp)}
            )
            for absence in observation.absences
        ]

    async def _isolate(self, entries: Mapping[tuple[str, Key], Entry]) -> None:
        """Halve a batch that the database refuses until the bad row stands alone; write the rest."""
        parts = [dict(entries)]
        while parts:
            part = parts.pop()
            try:
                async with self.writing:
                    written = await apply(self.database, Batch(entries=part), self.users_writing)
            except BaseException as error:
                if not _is_about_rows(error):
                    for unwritten in (part, *parts):
                        self.buffer.give_back(unwritten)
                    raise
                slots = list(part)
                if len(slots) == 1:
                    (table, key), entry = slots[0], part[slots[0]]
                    _log.error("%s %s is refused by the database and left out: %s", table, key, error)
                    _log.debug("the refused row: %s", entry)
                    continue
                half = len(slots) // 2
                parts += [{slot: part[slot] for slot in slots[half:]}, {slot: part[slot] for slot in slots[:half]}]
            else:
                _count(written)


def _is_about_rows(error: BaseException) -> bool:
    """Return whether a row itself is at fault: classes 22 and 23 (PostgreSQL documentation, "Error Codes")."""
    return isinstance(error, DatabaseError) and (error.sqlstate or "")[:2] in ("22", "23")


def _count(written: Written) -> None:
    for counter in (written.inserted, written.updated, written.removed):
        for table, rows in counter.items():
            metrics.rows_written.labels(table).inc(rows)
