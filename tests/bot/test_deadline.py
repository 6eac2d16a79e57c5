"""What a command writes is not saved after its user was told that it failed: of a frozen or a locked database."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator

import asyncpg
import psutil
import pytest

from simulator import InteractionResult, Simulator
from tests.bot.cogs import saving
from tests.bot.running import running_bot
from tests.waiting import until
from utils.bot import command_errors
from utils.bot.client import Guildbook
from utils.database import ConnectTarget, Pool, deadline
from utils.database.deadline import Deadline
from utils.database.embedded import EmbeddedServer
from utils.exceptions import CommandTimedOut, CommitUnknown, DatabaseError, is_transient

pytestmark = [pytest.mark.guilds(10), pytest.mark.direct("the server is stopped, or locked by a session")]

BOUND = 1.0
#: How many sessions of the database wait for a lock.
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
TIMED_OUT = command_errors.timed_out(BOUND).removesuffix(".")


def hurry(bot: Guildbook) -> None:
    """Shorten the times."""
    bot.invocations.defer_after, bot.invocations.bound = 0.3, BOUND


@pytest.fixture
async def bot(database: Pool, simulator: Simulator) -> AsyncIterator[Guildbook]:
    """A bot with the cog, whose table is there."""
    await database.execute("CREATE TABLE numbers (number int)")
    async with running_bot(
        database, simulator, extensions=[saving.__name__], configure=hurry, cache_max_results=0
    ) as bot:
        yield bot


@contextlib.contextmanager
def frozen(server: EmbeddedServer) -> Iterator[None]:
    """Stop every process of the server for the block, as a suspended machine does."""
    postmaster = psutil.Process(int((server.cluster / "postmaster.pid").read_text().splitlines()[0]))
    processes = [postmaster, *postmaster.children(recursive=True)]
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGCONT)


async def run(simulator: Simulator, name: str, **options: str) -> InteractionResult:
    """Run a command as the owner of the guild."""
    guild = next(iter(simulator.world.guilds.values()))
    return await simulator.run_command(name, user_id=guild.owner_id, guild_id=guild.id, options=dict(options))


async def answer_of(result: InteractionResult) -> str:
    """Return the last text that the user was shown."""
    await result.wait_done(20, until=lambda result: bool(result.texts))
    return result.texts[-1]


async def test_a_frozen_database_saves_nothing_afterwards(
    bot: Guildbook, simulator: Simulator, server: EmbeddedServer, database: Pool
) -> None:
    for way in saving.WAYS:
        assert await answer_of(await run(simulator, "save", way=way)) == "saved"
    await database.execute("TRUNCATE numbers")
    with frozen(server):
        results = {way: await run(simulator, "save", way=way) for way in saving.WAYS}
        for way, result in results.items():
            assert (await answer_of(result)).startswith(TIMED_OUT), way
            assert result.deferred, way
    await until(lambda: not len(bot.invocations))
    assert await database.fetch("SELECT * FROM numbers") == []
    assert await answer_of(await run(simulator, "save", way="plain")) == "saved"


async def test_a_locked_table_is_waited_for_no_longer_than_the_bound(
    bot: Guildbook, simulator: Simulator, target: ConnectTarget, database: Pool
) -> None:
    locker = await asyncpg.connect(**target.connect_kwargs())
    try:
        async with locker.transaction():
            await locker.execute("LOCK TABLE numbers")
            results = {way: await run(simulator, "save", way=way) for way in saving.WAYS}
            for way, result in results.items():
                assert (await answer_of(result)).startswith(TIMED_OUT), way
            await until(lambda: _is_zero(locker, WAITING))  # the server has cancelled the statements
    finally:
        await locker.close()
    await until(lambda: not len(bot.invocations))
    assert await database.fetch("SELECT * FROM numbers") == []
    assert bot.db.get_stats()["transactions"] == []


async def _is_zero(connection: asyncpg.Connection[asyncpg.Record], sql: str) -> bool:
    return bool(await connection.fetchval(sql) == 0)


async def test_a_background_task_of_a_command_is_not_given_up(
    bot: Guildbook, simulator: Simulator, database: Pool
) -> None:
    assert (await answer_of(await run(simulator, "spawn_later"))).startswith(TIMED_OUT)
    cog = bot.cogs["Saving"]
    cog.released.set()  # type: ignore[attr-defined]
    await cog.later  # type: ignore[attr-defined]
    assert [row["number"] for row in await database.fetch("SELECT * FROM numbers")] == [9]


class Answerless:
    """A connection whose COMMIT gets no answer, or an error of the server."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def execute(self, sql: str, timeout: float | None = None) -> str:
        assert sql == "COMMIT"
        raise self.error


async def test_an_unanswered_commit_is_unknown_and_not_repeated() -> None:
    for error in (ConnectionResetError(), TimeoutError(), asyncpg.AdminShutdownError("x")):
        with pytest.raises(CommitUnknown) as raised:
            await deadline.commit(Answerless(error))
        assert not is_transient(raised.value)
        assert command_errors.explain(raised.value).text == command_errors.COMMIT_UNKNOWN
    with pytest.raises(asyncpg.SerializationError):
        await deadline.commit(Answerless(asyncpg.SerializationError("x")))


async def test_statements_that_cannot_be_in_a_transaction_still_run_in_commands(database: Pool) -> None:
    token = deadline.current.set(Deadline())
    try:
        await database.execute("CREATE TABLE numbers (number int)")
        await database.execute("VACUUM numbers")
        await database.execute("-- one\n/* two */ INSERT INTO numbers VALUES (1)")
        await database.execute("CREATE INDEX CONCURRENTLY ON numbers (number)")
        with pytest.raises(DatabaseError):
            await database.execute("INSERT INTO numbers VALUES (1 / 0)")
        assert await database.fetchval("SELECT count(*) FROM numbers") == 1
    finally:
        deadline.current.reset(token)


async def test_a_given_up_command_is_refused(database: Pool) -> None:
    given_up = Deadline()
    given_up.task, given_up.is_over = asyncio.current_task(), True
    token = deadline.current.set(given_up)
    try:
        with pytest.raises(CommandTimedOut):
            await database.execute("CREATE TABLE numbers (number int)")
    finally:
        deadline.current.reset(token)
