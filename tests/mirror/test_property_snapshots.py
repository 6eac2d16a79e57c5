"""A database set back to any snapshot, at any moment of any history, equals the world after a reconcile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from hypothesis import example, given, note, settings
from hypothesis import strategies as st

from tests.conftest import cloned
from tests.mirror.driver import STEPS, Driver, Step, empty
from tests.mirror.harness import Mirrored, mirrored
from tests.waiting import until
from utils.database import Pool
from utils.database.embedded import EmbeddedServer
from utils.exceptions import DatabaseError
from utils.mirror.records.rows import COUNTER_BITS
from utils.mirror.spool.journal import is_dead, newest_first_stamp
from utils.service.lease import Lease, LeaseTimings, holder

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("GUILDBOOK_PROPERTY_EXAMPLES", "10"))
#: Renews often: a snapshot is older than one renewal, as it is in practice.
TIMINGS = LeaseTimings(renew_every=0.02, poll=0.01)
#: Attempts to replace the rows while a mirror writes them.
ATTEMPTS = 20
_TABLES = """
SELECT format('%I.%I', n.nspname, c.relname) AS name, n.nspname || '_' || c.relname AS copy,
    string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) FILTER (WHERE a.attgenerated = '') AS columns
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE n.nspname IN ('public', 'ops') AND c.relkind = 'r'
    AND c.relname NOT IN ('alembic_version', 'guildbook_version')
GROUP BY 1, 2
"""

_often = st.sampled_from(
    ["event", "events", "renick", "grant", "leave", "rejoin", "snapshot", "go_back", "kill", "start"]
)
_step = st.tuples(_often | st.sampled_from(STEPS), st.integers(0, 9_999), st.integers(0, 3))


class RestoringDriver(Driver):
    """A driver whose database is set back to snapshots; its bot runs under a lease and with a spool."""

    def __init__(self, database: Pool, monkeypatch: pytest.MonkeyPatch, seed: int, guilds: int, spool: Path) -> None:
        super().__init__(database, monkeypatch, seed, guilds)
        self._spool = spool
        self._lease: Lease | None = None
        self._epoch = 0
        self._snapshots: list[str] = []
        self._restarting: asyncio.Task[None] | None = None

    async def snapshot(self, n: int) -> None:
        """Copy every table, and wait until the lease has been renewed since."""
        name = f"snapshot_{len(self._snapshots)}"
        async with self.database.transaction(isolation="repeatable_read") as connection:
            await connection.execute(f"CREATE SCHEMA {name}")
            for table in await connection.fetch(_TABLES):
                await connection.execute(f"CREATE TABLE {name}.{table['copy']} AS TABLE {table['name']}")
        self._snapshots.append(name)
        lease = self._lease
        if lease is not None:
            former = lease._expires_at
            await until(lambda: lease._expires_at != former or lease.lost.is_set())

    async def go_back(self, n: int) -> None:
        """Set every table back to a snapshot, or empty it, whatever the bot is doing."""
        name = [*self._snapshots, None][n % (len(self._snapshots) + 1)]
        for _ in range(ATTEMPTS):
            with contextlib.suppress(DatabaseError):  # locked by what the bot is doing
                return await self._replace_rows(name)
            await asyncio.sleep(0.05)
        pytest.fail("the rows could not be replaced")

    async def _replace_rows(self, name: str | None) -> None:
        async with self.database.transaction(isolation="read_committed") as connection:
            # A transaction of the bot may hold a lock while its task waits for another one: give way and try again.
            await connection.execute("SET LOCAL lock_timeout = '300ms'")
            await connection.execute("LOCK TABLE ops.leases IN ACCESS EXCLUSIVE MODE")
            tables = await connection.fetch(_TABLES)
            await connection.execute("TRUNCATE " + ", ".join(table["name"] for table in tables))
            for table in tables if name is not None else []:
                columns = table["columns"]
                await connection.execute(
                    f"INSERT INTO {table['name']} ({columns}) OVERRIDING SYSTEM VALUE"  # noqa: S608 - from the catalog
                    f" SELECT {columns} FROM {name}.{table['copy']}"
                )

    async def run(self, steps: list[Step]) -> list[str]:
        try:
            return await super().run(steps)
        finally:
            for name in self._snapshots:
                await self.database.execute(f"DROP SCHEMA {name} CASCADE")

    async def _pause(self, kind: int) -> None:
        await super()._pause(kind)
        await self._restart_if_lost()

    async def _verdict(self) -> list[str]:
        for _ in range(3):  # the loss is noticed with the next renewal
            await asyncio.sleep(2 * TIMINGS.renew_every)
            await self._restart_if_lost()
        if self._lease is not None:
            lease, former = self._lease, self._lease._expires_at
            await until(lambda: lease._expires_at != former or lease.lost.is_set())
            await self._restart_if_lost()
        return await super()._verdict()

    async def _restart_if_lost(self) -> None:
        """Do what the process does once its lease is lost."""
        if self._lease is not None and self._lease.lost.is_set():
            await self._down(kill=False)
            await self.start(0)

    def _mirrored(self) -> contextlib.AbstractAsyncContextManager[Mirrored]:
        return self._leased()

    @asynccontextmanager
    async def _leased(self) -> AsyncIterator[Mirrored]:
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
                self.database, self.simulator, self.monkeypatch, page_timeout=0.4, spool=self._spool, held=lease
            ) as bot:
                yield bot
        finally:
            self._lease = None
            await lease.release(5)


@pytest.fixture
def runner(server: EmbeddedServer, template: str) -> Iterator[tuple[asyncio.Runner, Pool]]:
    """One event loop and one database for all examples."""
    with asyncio.Runner() as loop:
        lent = cloned(server, template)
        database = Pool(loop.run(lent.__aenter__()), pool_max=8, connect_timeout=10, acquire_timeout=10)
        loop.run(database.connect())
        yield loop, database
        loop.run(database.close())
        loop.run(lent.__aexit__(None, None, None))


def wrong_after(runner: tuple[asyncio.Runner, Pool], seed: int, guilds: int, steps: list[Step]) -> list[str]:
    loop, database = runner

    async def run() -> list[str]:
        await empty(database)
        with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as spool:
            return await RestoringDriver(database, monkeypatch, seed, guilds, Path(spool)).run(steps)

    return loop.run(run())


#: The bot runs on, events are spooled, and the database forgets all of it.
_WHILE_RUNNING: list[Step] = [
    ("snapshot", 0, 3),
    ("rejoin", 1, 3),
    ("leave", 2, 3),
    ("go_back", 0, 3),
    ("renick", 3, 3),
]
_AFTER_A_KILL: list[Step] = [
    ("snapshot", 0, 3), ("rejoin", 5, 0), ("leave", 7, 0), ("kill", 0, 0), ("go_back", 0, 0), ("start", 0, 3),
    ("renick", 3, 3),
]  # fmt: skip
_EMPTIED: list[Step] = [("rejoin", 1, 0), ("leave", 2, 0), ("kill", 0, 0), ("go_back", 0, 0), ("start", 0, 3)]


@pytest.mark.timeout(60 + 20 * EXAMPLES)
@settings(max_examples=EXAMPLES)
@example(seed=1, guilds=2, steps=_WHILE_RUNNING)
@example(seed=1, guilds=2, steps=_AFTER_A_KILL)
@example(seed=1, guilds=2, steps=_EMPTIED)
@given(seed=st.integers(1, 1_000), guilds=st.integers(1, 3), steps=st.lists(_step, min_size=5, max_size=30))
def test_any_restored_snapshot_ends_equal_to_the_world(
    runner: tuple[asyncio.Runner, Pool], seed: int, guilds: int, steps: list[Step]
) -> None:
    wrong = wrong_after(runner, seed, guilds, steps)
    note(f"wrong afterwards: {wrong}")
    assert wrong == []


@pytest.mark.exhaustive
@pytest.mark.timeout(7_200)
@settings(max_examples=500)
@given(seed=st.integers(1, 1_000), guilds=st.integers(1, 4), steps=st.lists(_step, min_size=10, max_size=60))
def test_500_histories_of_restored_snapshots(
    runner: tuple[asyncio.Runner, Pool], seed: int, guilds: int, steps: list[Step]
) -> None:
    assert wrong_after(runner, seed, guilds, steps) == []
