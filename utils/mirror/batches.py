"""Write-behind batches for cogs: rows wait in a queue of their table, spooled like the mirror's events."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from models import Base
from utils.database import Pool
from utils.exceptions import (
    DatabaseError,
    DatabaseUnavailable,
    GuildbookError,
    LeaseLost,
    SpoolError,
    ValidationError,
)
from utils.mirror.records.batch_rows import (
    BatchRow,
    BatchTarget,
    encode_head,
    encode_row,
    payload_of,
)
from utils.mirror.records.rows import Stamps
from utils.mirror.spool.journal import Journal
from utils.mirror.spool.queue import EventQueue, SpooledQueue, SpoolMode
from utils.mirror.spool.segments import MAX_RECORD_BYTES
from utils.mirror.write import events
from utils.mirror.write.batch_rows import write_batch_rows
from utils.mirror.write.writer import SPOOL_SECONDS, FlushPolicy
from utils.service import metrics
from utils.service.lease import Fence
from utils.tasks import cancel_and_wait

_log = logging.getLogger(__name__)

#: Rows that wait before they are written, and the seconds after which they are written at the latest.
SIZE, SECONDS = 100, 5.0
#: How long `flush` waits for the commit, in seconds.
FLUSH_SECONDS = 10.0
#: How long the last flush of a batch waits for the commit, in seconds, while the database works.
CLOSE_SECONDS = 5.0
#: Seconds for closing a journal, and for deleting the position of one that is empty.
JOURNAL_SECONDS = 2.0


class Batch:
    """Rows of one table that are written together, later: `BaseCog.batch` returns one.

    `add` takes a row at once and returns. What was added is written when `size` rows wait or `seconds` after the first
    of them, whichever comes first, in one transaction with the position of the journal: once, whatever fails. Rows with
    the same primary key are combined: columns named by `increments` are added up, of the others the last value wins. A
    row whose key is not in the table is inserted; columns that it lacks get their defaults.

    Rows wait in memory and, as SPOOL says, on disk. An outage of the database loses none. With `SPOOL=always` a row
    survives a kill -9 as soon as `add` has returned and the journal is open, which `verify` and loading the cog wait
    for; otherwise a kill -9 loses those that wait. Rows outlive the batch and its cog: they are written later, even by
    another process. A row that its table refuses becomes a row of `ops.dead_letters`.

    Example::

        async def start(self) -> None:
            self.xp = self.batch("levels", increments=("xp",))

        @commands.Cog.listener()
        async def on_message(self, message: discord.Message) -> None:
            self.xp.add({"guild_id": message.guild.id, "user_id": message.author.id, "xp": 5})
    """

    def __init__(
        self, writer: TableWriter, target: BatchTarget, columns: Iterable[str], size: int, seconds: float
    ) -> None:
        """Use `BaseCog.batch` instead."""
        #: The table's name.
        self.table: str = target.table
        #: How many rows wait before they are written.
        self.size: int = size
        #: How long a row waits at most, in seconds.
        self.seconds: float = seconds
        self._writer = writer
        self._target = target
        self._columns = frozenset(columns)
        self._head = encode_head(target)
        #: The columns of the rows added so far, which are valid.
        self._shapes: set[tuple[str, ...]] = set()
        self._is_open = True

    def __repr__(self) -> str:
        return f"<Batch {self.table} queue_size={self.queue_size}>"

    @property
    def queue_size(self) -> int:
        """How many rows were added to the table's batches and are not in the database yet."""
        return len(self._writer.queue)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row: values by column, the primary key included.

        Raises `ValidationError` for a column that does not exist, a key that is missing, and a value that cannot be
        stored; `DatabaseUnavailable` when neither memory (BUFFER_MAX_ROWS) nor the spool has room; `SpoolError` when
        SPOOL=always and the disk refuses the row; `GuildbookError` after the cog was unloaded. The row was not added
        then.
        """
        values = row if type(row) is dict else dict(row)
        if (shape := tuple(values)) not in self._shapes:
            self._check_shape(shape)
        if not self._is_open:
            raise GuildbookError(f"the batch of {self.table} is closed: its cog was unloaded")
        self._writer.add(encode_row(self._head, values, self._target.increments))

    async def flush(self, timeout: float = FLUSH_SECONDS) -> int:
        """Write what waits now, and return how many rows waited, once they are in the database.

        If that takes longer than `timeout` seconds it raises `DatabaseUnavailable`; the rows stay in the queue.
        """
        return await self._writer.flush(timeout)

    async def force_flush(self, timeout: float = FLUSH_SECONDS) -> int:
        """Like `flush`, and during an outage try the database at once instead of waiting for the next attempt."""
        return await self._writer.flush(timeout, at_once=True)

    async def close(self) -> None:
        """Accept no more rows and write what waits; unloading the cog does that. Never raises.

        During an outage it does not wait: the rows are written later.
        """
        if not self._is_open:
            return
        self._is_open = False
        await self._writer.release(self)

    async def verify(self) -> None:
        """Raise `ValidationError` if the database lacks the table or one of its columns.

        Loading the cog does that for the batches that exist by then. It also waits until the journal is open. During
        an outage nothing is compared.
        """
        await self._writer.opened.wait()
        try:
            found = await self._writer.columns()
        except DatabaseUnavailable as error:
            _log.warning("could not compare the batch of %s with the database: %s", self.table, error)
            return
        if not found:
            raise ValidationError(
                f"batch of {self.table}: the database has no such table: run python bot.py db upgrade"
            )
        if missing := sorted(self._columns - found):
            raise ValidationError(
                f"batch of {self.table}: the database has no column {', '.join(missing)}: run python bot.py db upgrade"
            )

    def _check_shape(self, shape: tuple[str, ...]) -> None:
        if unknown := [name for name in shape if name not in self._columns]:
            raise ValidationError(
                f"batch of {self.table}: it has no column {unknown[0]!r:.60}: expected some of"
                f" {', '.join(sorted(self._columns))}"
            )
        if missing := [name for name in self._target.keys if name not in shape]:
            raise ValidationError(f"batch of {self.table}: the row has no {missing[0]}, which is part of the key")
        self._shapes.add(shape)


class TableWriter:
    """The queue of one table's batches, its journal, and the task that writes it. It outlives the cog."""

    def __init__(self, batches: Batches, table: str, journal: str) -> None:
        self.table: str = table
        self.queue: SpooledQueue[BatchRow] = SpooledQueue(
            None, payload_of, BatchRow, spool=batches.spool,
            max_rows=batches.max_rows,
        )  # fmt: skip
        self._all = batches
        self._policy = batches.policy
        self._journal_id = journal
        self._stamps = Stamps(batches.fence.epoch)
        self._open: set[Batch] = set()
        #: A flush is due when this many rows wait, or this many seconds after the first of them.
        self._size, self._seconds = SIZE, SECONDS
        #: Set once the journal is open, or cannot be.
        self.opened: asyncio.Event = asyncio.Event()
        self._has_rows = asyncio.Event()
        self._due = asyncio.Event()
        #: Held while rows are written.
        self._write_lock = asyncio.Lock()
        #: Attempts of `flush` that do not wait for the next one of the loop.
        self._attempts: set[asyncio.Task[None]] = set()
        #: Set while the database refuses rows.
        self._failed = asyncio.Event()
        self._error: Exception | None = None
        self._spool_error: SpoolError | None = None
        #: `time.monotonic()` of the last commit.
        self._written = 0.0
        #: Futures of `flush`, with the stamp that must be committed.
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []
        self._stopping = False
        self._task = asyncio.create_task(self._run(), name=f"batch of {table}")

    # --- what batches call

    def add(self, payload: bytes) -> None:
        """Accept an encoded row."""
        queue = self.queue
        if self._stopping:
            raise GuildbookError(f"the batch of {self.table} is closed: the bot stops")
        if self._spool_error is not None:
            raise self._spool_error
        if len(payload) > MAX_RECORD_BYTES:
            raise ValidationError(f"batch of {self.table}: the row has {len(payload):,} bytes, of {MAX_RECORD_BYTES:,}")
        if queue.is_full:
            raise DatabaseUnavailable(
                f"batch of {self.table}: {len(queue):,} rows wait for the database, and there is no room for more"
                f" (BUFFER_MAX_ROWS, SPOOL, SPOOL_MAX_MB): {self._error or 'they come faster than they are written'}"
            )
        queue.add(BatchRow(self._stamps.next(), payload))
        waiting = len(queue)
        if waiting == 1:
            self._has_rows.set()
        if waiting >= self._size:
            self._due.set()

    def keep(self, batch: Batch) -> None:
        """Use the size and the seconds of a batch."""
        self._open.add(batch)
        self._set_limits()

    async def release(self, batch: Batch) -> None:
        """Write what waits, for a batch that ends. Does not wait for a database that refuses rows."""
        self._open.discard(batch)
        self._set_limits()
        flush = asyncio.ensure_future(self.flush(CLOSE_SECONDS))
        failed = asyncio.ensure_future(self._failed.wait())
        try:
            await asyncio.wait((flush, failed), return_when=asyncio.FIRST_COMPLETED)
            if flush.done() and not flush.cancelled() and flush.exception() is None:
                return
            _log.warning("%s rows of a batch wait for the database: %s", len(self.queue), self.table)
        finally:
            await cancel_and_wait((flush, failed))

    def _set_limits(self) -> None:
        self._size = min((batch.size for batch in self._open), default=SIZE)
        self._seconds = min((batch.seconds for batch in self._open), default=SECONDS)

    async def flush(self, timeout: float, *, at_once: bool = False) -> int:
        """Write what waits now, see `Batch.flush`."""
        waiting = len(self.queue)
        if not waiting:
            return 0
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = (self.queue.last, done)
        self._waiters.append(waiter)
        self._due.set()
        if at_once and self._failed.is_set() and not self._attempts:
            attempt = asyncio.create_task(self._attempt_at_once(), name=f"batch of {self.table}, at once")
            self._attempts.add(attempt)
            attempt.add_done_callback(self._attempts.discard)
        try:
            async with asyncio.timeout(timeout):
                await done
        except TimeoutError as error:
            raise DatabaseUnavailable(
                f"batch of {self.table}: {len(self.queue):,} rows were not written within {timeout:g} s"
                f" ({self._error or 'the database is slow'}); they stay in the queue"
            ) from error
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
        return waiting

    async def columns(self) -> set[str]:
        """Return the names of the table's columns in the database; empty if it has no such table."""
        return {name for (name,) in await self._all.pool.fetch(_SELECT_COLUMNS, self.table)}

    # --- the loop

    async def _run(self) -> None:
        try:
            await self._open_journal()
        finally:
            self.opened.set()
        try:
            while not (self._stopping and not len(self.queue)):
                await self._wait_until_due()
                await self._write_with_retries()
        except LeaseLost as error:
            _log.error("%s; rows of batches stay in the spool: %s", error, self.table)
            self._failed.set()
            self._all.on_lost()

    async def _open_journal(self) -> None:
        batches = self._all
        if batches.directory is None:
            return
        try:
            journal = await Journal.open(
                batches.directory, self._journal_id, max_bytes=batches.max_bytes, has_tail=batches.spool == "always"
            )
            self.queue.attach(journal)
        except SpoolError as error:
            _log.error("a batch has no spool: %s: %s", self.table, error)
            if batches.spool == "always":
                self._spool_error = error

    async def _wait_until_due(self) -> None:
        if not len(self.queue):
            self._has_rows.clear()
            await self._has_rows.wait()
        seconds = 0.0 if self._stopping or not self._open else max(0.0, self._seconds - self.queue.age)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._due.wait()
        wait = self._written + self._policy.spacing_seconds - time.monotonic()
        if wait > 0 and not (self._stopping or self._waiters):
            await asyncio.sleep(wait)
        self._due.clear()

    async def _write_with_retries(self) -> None:
        async for attempt in self._policy.attempts(self._should_retry):
            with attempt:
                await self._attempt()

    async def _attempt(self) -> None:
        async with self._write_lock:
            await self._write()
        if self._error is not None:
            _log.info("the database accepts rows of batches again: %s", self.table)
            self._error = None
            self._failed.clear()

    async def _attempt_at_once(self) -> None:
        """Write what waits while the loop pauses after an error; the loop retries if this fails, too."""
        try:
            await self._attempt()
        except Exception as error:
            self._should_retry(error)

    def _should_retry(self, error: BaseException) -> bool:
        if not isinstance(error, Exception) or isinstance(error, LeaseLost):
            return False
        if isinstance(error, DatabaseUnavailable):
            self.queue.spill()
        self._error = error
        self._failed.set()
        _log.warning("could not write a batch of %s; %s rows wait: %s", self.table, len(self.queue), error,
                     exc_info=None if isinstance(error, GuildbookError) else error)  # fmt: skip
        metrics.flush_failures.inc()
        return True

    async def _write(self) -> None:
        """Write what waits, in transactions of a bounded number of rows."""
        queue, newest = self.queue, self.queue.last
        while len(queue):
            oldest = await queue.peek(self._policy.transaction_events)
            if not oldest.upto:
                return
            tables = await write_batch_rows(
                self._all.pool, self._all.fence, self._journal_id, oldest.events, oldest.upto
            )
            await queue.discard(oldest.upto)
            self._written = time.monotonic()
            self._all.on_written(frozenset(tables))
            for waiter in [waiter for waiter in self._waiters if waiter[0] <= oldest.upto]:
                self._waiters.remove(waiter)
                if not waiter[1].done():
                    waiter[1].set_result(None)
            if oldest.upto >= newest:
                return

    # --- the end

    async def stop(self, timeout: float, *, flush: bool) -> None:
        """Write what waits, for at most `timeout` seconds, and leave the rest to the spool."""
        self._stopping = True
        self._has_rows.set()
        self._due.set()
        if flush:
            await asyncio.wait({self._task}, timeout=timeout)
        await cancel_and_wait((self._task, *self._attempts), JOURNAL_SECONDS)
        journal, waiting = self.queue.journal, len(self.queue)
        if waiting:
            lost, reason = await self.queue.spill_at_stop(SPOOL_SECONDS)
            if lost:
                _log.error("%s of %s unwritten rows of a batch are lost: %s: %s", lost, waiting, self.table, reason)
            else:
                _log.warning("%s rows of a batch were not written; they are in the spool: %s", waiting, self.table)
        if journal is not None:
            await journal.close(JOURNAL_SECONDS)
        if not waiting and flush:
            with contextlib.suppress(DatabaseError, TimeoutError):
                async with asyncio.timeout(JOURNAL_SECONDS):
                    await self._all.pool.execute(events.DELETE_POSITION, self._journal_id)


_SELECT_COLUMNS = """
SELECT attname FROM pg_attribute
WHERE attrelid = to_regclass(quote_ident($1)) AND attnum > 0 AND NOT attisdropped
"""


class Batches:
    """The batches of all cogs: one queue for each table."""

    def __init__(
        self,
        pool: Pool,
        fence: Fence,
        queue: EventQueue,
        policy: FlushPolicy,
        *,
        directory: Path | None,
        on_lost: Callable[[], None],
        on_written: Callable[[frozenset[str]], None],
    ) -> None:
        """`queue` is the mirror's: the bounds are the same. `directory` is where journals are; None without a spool."""
        self.pool = pool
        self.fence = fence
        self.policy = policy
        self.directory = None if queue.journal is None else directory
        self.spool: SpoolMode = queue.spool
        self.max_rows: int = queue.max_rows
        self.max_bytes: int = 0 if queue.journal is None else queue.journal.max_bytes
        self.on_lost = on_lost
        self.on_written = on_written
        self._writers: dict[str, TableWriter] = {}

    @property
    def waiting(self) -> dict[str, int]:
        """How many rows wait, by table."""
        return {table: len(writer.queue) for table, writer in self._writers.items()}

    def open(
        self, table: str | type[Base], cog: str, module: str, *, size: int, seconds: float, increments: Sequence[str]
    ) -> Batch:
        """Return a batch for a table of the cog that `module` defines. Raises `ValidationError`, see `BaseCog`."""
        target, columns = resolve_target(table, cog, module, increments)
        if size < 1 or not 0 < seconds <= 3_600:
            raise ValidationError(
                f"batch of {target.table}: size is {size} and seconds are {seconds}: expected at least 1 row, and more"
                " than 0 up to 3600 seconds"
            )
        writer = self._writers.get(target.table)
        if writer is None:
            journal = f"{self.fence.holder}_batch_{len(self._writers)}"
            writer = self._writers[target.table] = TableWriter(self, target.table, journal)
        batch = Batch(writer, target, columns, size, seconds)
        writer.keep(batch)
        return batch

    async def stop(self, timeout: float, *, flush: bool = True) -> None:
        """Write what waits, for at most `timeout` seconds, and leave the rest to the spool."""
        await asyncio.gather(*(writer.stop(timeout, flush=flush) for writer in self._writers.values()))
        self._writers.clear()


# --- whose table it is


#: Guildbook's own table that cogs may add to: its column xp is theirs.
_SHARED = ("member_stats",)
#: The modules of Guildbook's own tables.
_OWN_MODULES = frozenset(f"models.{name}" for name in ("base", "documents", "guilds", "history", "ops", "people"))


def resolve_target(
    table: str | type[Base], cog: str, module: str, increments: Sequence[str]
) -> tuple[BatchTarget, frozenset[str]]:
    """Return where a batch writes, and the columns that its rows may have.

    Raises `ValidationError` if there is no such table, if it is not the cog's, or if it lacks a column.
    """
    if isinstance(increments, str):
        raise ValidationError(f"increments: expected a sequence of names such as ({increments!r},), got a string")
    name = table if isinstance(table, str) else table.__tablename__
    if name not in Base.metadata.tables:
        _import_model(name, module)
    described = Base.metadata.tables.get(name)
    mapper = next((mapper for mapper in Base.registry.mappers if mapper.local_table is described), None)
    if described is None or mapper is None or described.schema is not None:
        raise ValidationError(f"batch of {name!r:.60}: no model declares this table in the main schema")
    owner = mapper.class_.__module__
    if not _belongs_to(owner, module) and name not in _SHARED:
        owner = "Guildbook" if owner in _OWN_MODULES else owner
        raise ValidationError(f"batch of {name}: the table belongs to {owner}, not to {module}: write it with self.db")
    keys = tuple(column.name for column in described.primary_key)
    columns = frozenset(column.name for column in described.columns if column.computed is None)
    for column in increments:
        if column not in columns or column in keys:
            raise ValidationError(
                f"batch of {name}: increments names {column!r:.60}, which is no column beside the key: expected some of"
                f" {', '.join(sorted(columns.difference(keys)))}"
            )
    return BatchTarget(name, keys, tuple(increments), cog), columns


def _import_model(table: str, module: str) -> None:
    """Import the model of a table if nothing has: from `models/` or from the package of the cog's pack.

    Raises `ValidationError` if that fails.
    """
    declares = re.compile(rf"__tablename__\b[^=\n]*=\s*[\"']{re.escape(table)}[\"']")
    for package in sorted({"models", module.partition(".")[0]} - {"cogs"}):
        for root in getattr(sys.modules.get(package), "__path__", ()):
            for path in sorted(Path(root).rglob("*.py")):
                if not declares.search(path.read_text(encoding="utf-8", errors="replace")):
                    continue
                try:
                    importlib.import_module(".".join((package, *path.relative_to(root).with_suffix("").parts)))
                except Exception as error:
                    raise ValidationError(
                        f"batch of {table}: cannot import its model from {path}: {error!r}"
                    ) from error


def _belongs_to(model: str, cog: str) -> bool:
    """Return whether a model's module belongs to a cog's: the same file, the same pack, or a file of its own."""
    if model in _OWN_MODULES:
        return False
    package = model.partition(".")[0]
    if package == "models":
        return True
    depth = 2 if package == "cogs" else 1
    return model.split(".")[:depth] == cog.split(".")[:depth]
