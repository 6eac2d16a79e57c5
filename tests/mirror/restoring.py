"""Histories in which the database is set back to snapshots, emptied, and dropped and created anew."""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import pytest

from tests.conftest import admin_execute, cloned
from tests.mirror.driver import STEPS, Driver, Step
from tests.mirror.harness import Mirrored, mirrored
from tests.waiting import until
from utils.database import Pool
from utils.database.embedded import EmbeddedServer
from utils.exceptions import DatabaseError
from utils.mirror.records.rows import COUNTER_BITS
from utils.mirror.spool.journal import is_dead, newest_first_stamp
from utils.operations import migrations
from utils.retrying import retrying
from utils.service.lease import Lease, LeaseTimings, has_table, holder

#: Renews often: a snapshot is older than one renewal, as it is in practice.
TIMINGS = LeaseTimings(renew_every=0.02, poll=0.01)
#: Attempts to replace the rows while a mirror writes them.
ATTEMPTS = 20
#: Steps that a random history has more of than of the others.
OFTEN = (
    *("event", "events", "renick", "grant", "leave", "rejoin", "kill", "start"),
    *("snapshot", "snapshot", "go_back", "go_back", "drop"),
)
_TABLES = """
SELECT n.nspname AS schema, c.relname AS name, format('%I.%I', n.nspname, c.relname) AS qualified,
    array_agg(a.attname::text ORDER BY a.attnum) FILTER (WHERE a.attgenerated = '') AS columns
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE n.nspname IN ('public', 'ops') AND c.relkind = 'r' AND c.relname <> 'guildbook_version'
GROUP BY 1, 2
"""


@dataclass(frozen=True, slots=True)
class Droppable:
    """A database that can be dropped and created anew while it is in use."""

    server: EmbeddedServer
    template: str
    pool: Pool

    async def recreate(self, *, template: str | None = None) -> None:
        """Drop it, also under its clients, and create it as a copy of a database (None: the migrated one)."""
        name = self.pool.target.database
        await admin_execute(self.server, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await admin_execute(
            self.server, f"CREATE DATABASE {name} TEMPLATE {template or self.template} STRATEGY file_copy"
        )


@asynccontextmanager
async def droppable(server: EmbeddedServer, template: str) -> AsyncIterator[Droppable]:
    """Yield a database of its own, which is dropped at the end."""
    async with cloned(server, template) as target:
        pool = Pool(target, pool_max=8, connect_timeout=10, acquire_timeout=10)
        await pool.connect()
        try:
            yield Droppable(server, template, pool)
        finally:
            await pool.close()


@dataclass(frozen=True, slots=True)
class History:
    """A world and what happens to it."""

    seed: int
    guilds: int
    steps: list[Step]


def random_history(rng: random.Random) -> History:
    """Return a history of 10 to 60 steps."""
    steps = [
        (rng.choice(OFTEN if rng.random() < 0.5 else STEPS), rng.randrange(10_000), rng.randrange(4))
        for _ in range(rng.randint(10, 60))
    ]
    return History(rng.randint(1, 1_000_000), rng.randint(1, 4), steps)


async def find_differences(database: Droppable, history: History) -> list[str]:
    """Run a history on an empty database, and return what is not as in the world afterwards."""
    await database.recreate()
    with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as spool:
        return await RestoringDriver(database, monkeypatch, history, Path(spool)).run(history.steps)


class RestoringDriver(Driver):
    """A driver whose database is set back, emptied and dropped; its bot runs under a lease and with a spool."""

    def __init__(self, database: Droppable, monkeypatch: pytest.MonkeyPatch, history: History, spool: Path) -> None:
        super().__init__(database.pool, monkeypatch, history.seed, history.guilds)
        self._droppable = database
        self._spool = spool
        self.has_lost_events = True
        self._lease: Lease | None = None
        self._epoch = 0
        #: What the bot waited for when the time was up.
        self._state = ""
        #: The rows of each table, by the table's name, in the binary format of COPY.
        self._snapshots: list[dict[str, bytes]] = []

    async def snapshot(self, n: int) -> None:
        """Copy every table, and wait until the lease has been renewed since."""
        self._snapshots.append(await self._read_rows())
        lease = self._lease
        if lease is not None:
            former = lease._expires_at
            await until(lambda: lease._expires_at != former or self._has_lost(lease))

    @retrying()  # the connection may be one that a step before has ended
    async def _read_rows(self) -> dict[str, bytes]:
        rows = {}
        async with self.database.transaction(isolation="repeatable_read") as connection:
            for table in await connection.fetch(_TABLES):
                output = BytesIO()
                await connection.copy_from_table(
                    table["name"], schema_name=table["schema"], columns=table["columns"], output=output, format="binary"
                )
                rows[table["qualified"]] = output.getvalue()
        return rows

    async def go_back(self, n: int) -> None:
        """Set every table back to a snapshot, or empty it, whatever the bot is doing."""
        snapshot = [*self._snapshots, None][n % (len(self._snapshots) + 1)]
        if not await has_table(self.database):
            await self._droppable.recreate()
        for _ in range(ATTEMPTS):
            with contextlib.suppress(DatabaseError):  # locked by what the bot is doing
                return await self._replace_rows(snapshot or {})
            await asyncio.sleep(0.05)
        pytest.fail("the rows could not be replaced")

    async def drop(self, n: int) -> None:
        """Drop the database and create it anew: with empty tables, or with none."""
        await self._droppable.recreate(template=None if n % 2 else "template1")

    async def _replace_rows(self, snapshot: dict[str, bytes]) -> None:
        async with self.database.transaction(isolation="read_committed") as connection:
            # A transaction of the bot may hold a lock while its task waits for another one: give way and try again.
            await connection.execute("SET LOCAL lock_timeout = '300ms'")
            await connection.execute("LOCK TABLE ops.leases IN ACCESS EXCLUSIVE MODE")
            tables = await connection.fetch(_TABLES)
            await connection.execute("TRUNCATE " + ", ".join(table["qualified"] for table in tables))
            for table in tables:
                if rows := snapshot.get(table["qualified"]):
                    await connection.copy_to_table(
                        table["name"], schema_name=table["schema"], columns=table["columns"],
                        source=BytesIO(rows), format="binary",
                    )  # fmt: skip

    async def _pause(self, kind: int) -> None:
        await super()._pause(kind)
        await self._restart_if_lost()

    async def run(self, steps: list[Step]) -> list[str]:
        try:
            return await super().run(steps)
        except TimeoutError as error:
            error.add_note(self._state or "before its last step")
            raise

    async def _verdict(self) -> list[str]:
        try:
            return await self._verdict_of_the_holder()
        except (TimeoutError, asyncio.CancelledError):
            self._state = self._describe()
            raise

    def _describe(self) -> str:
        """Return what the bot waits for."""
        bot, lease = self.bot, self._lease
        if bot is None:
            return "the bot does not run"
        mirror = bot.mirror
        state = {
            "received all": bot.has_received_all(), **mirror.is_ready()[1], "archived": mirror.archived.guilds_waiting,
            "written": mirror.writer.is_idle, "lease": lease and lease.describe(),
            "table missing": lease and lease.table_missing.is_set(), "queued": len(mirror.writer.queue),
            "refused": mirror.writer.delay(),
        }  # fmt: skip
        return ", ".join(f"{name}: {value}" for name, value in state.items())

    async def _verdict_of_the_holder(self) -> list[str]:
        for _ in range(3):  # the loss is noticed with the next renewal
            await asyncio.sleep(2 * TIMINGS.renew_every)
            await self._restart_if_lost()
        if self._lease is not None:
            lease, former = self._lease, self._lease._expires_at
            await until(lambda: lease._expires_at != former or self._has_lost(lease))
            await self._restart_if_lost()
        return await super()._verdict()

    def _has_lost(self, lease: Lease) -> bool:
        return lease.lost.is_set() or lease.table_missing.is_set()

    async def _restart_if_lost(self) -> None:
        """Do what the process does once its lease is lost."""
        if self._lease is not None and self._has_lost(self._lease):
            self._lease.give_up()
            await self._down(kill=False)
            await self.start(0)

    def _mirrored(self) -> contextlib.AbstractAsyncContextManager[Mirrored]:
        return self._leased()

    @asynccontextmanager
    async def _leased(self) -> AsyncIterator[Mirrored]:
        if not await has_table(self.database):
            await migrations.upgrade(self.database)
            await self.database.renew()
        lease = Lease(
            self.database.target,
            holder(),
            is_dead=partial(is_dead, self._spool),
            newest_epoch=lambda: max(self._epoch, newest_first_stamp(self._spool) >> COUNTER_BITS),
            timings=TIMINGS,
        )
        self._epoch = (await lease.wait()).epoch
        self._lease = lease
        try:
            async with mirrored(
                self.database, self.simulator, self.monkeypatch,
                page_timeout=0.4, member_cache=True, spool=self._spool, held=lease,
            ) as bot:  # fmt: skip
                yield bot
        finally:
            self._lease = None
            await lease.release(5)


def count_steps(history: History) -> dict[str, int]:
    """Return how many snapshots, restores, drops and restarts a history has."""
    names = [name for name, _, _ in history.steps]
    return {
        "snapshots": names.count("snapshot"),
        "restores": names.count("go_back"),
        "drops": names.count("drop"),
        "restarts": names.count("kill") + names.count("stop"),
    }
