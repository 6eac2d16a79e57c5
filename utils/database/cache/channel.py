"""What the processes on one database tell one another about their writes, by LISTEN and NOTIFY."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import uuid
from collections.abc import Iterable

import asyncpg
import orjson

from utils.database.cache.store import QueryCache
from utils.database.pool import Connection, Pool
from utils.database.target import ConnectTarget
from utils.exceptions import DatabaseError, translate

_log = logging.getLogger(__name__)

CHANNEL = "guildbook_cache"
_NOTIFY = "SELECT pg_notify($1, $2)"
#: Seconds between two messages: NOTIFY takes a lock on the whole server at its commit.
_COALESCE_SECONDS = 0.1
_BEAT_SECONDS = 0.25
#: Seconds after which a message that came back, or that another process sent, proves nothing any more: one second is
#: what a write may stay unseen, of which its process may wait `_COALESCE_SECONDS` and its message takes some time.
_PROOF_SECONDS = 0.85
#: PostgreSQL's limit for a payload, in bytes (manual, NOTIFY): it must be shorter.
_PAYLOAD_BYTES = 8_000
_CONNECT_SECONDS = 5.0
_SEND_SECONDS = 1.0
_START_SECONDS = 5.0
#: Seconds without an answer after which the connection is made anew.
_DEAF_SECONDS = 3.0
_BACKOFF_SECONDS = 0.1, 3.0

_DRIVERS_OWN = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)


class Channel:
    """One process's ear and voice.

    Each process says four times a second which tables it wrote, even when there are none. The cache is bypassed unless
    its own message has come back within a second and every other process was heard within one: a process that falls
    silent without a farewell may have written something that it did not tell.
    """

    def __init__(self, cache: QueryCache, direct: ConnectTarget, database: Pool) -> None:
        """`direct` is an address around any pooler; when it is pooled nothing can be heard, and the TTL must do."""
        self.cache: QueryCache = cache
        self.direct: ConnectTarget = direct
        self.database: Pool = database
        self.sender: str = uuid.uuid4().hex[:16]
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._proven: asyncio.Event = asyncio.Event()
        #: When messages under way were sent, by their number.
        self._sent: dict[int, float] = {}
        self._number: int = 0
        self._answered: float = -math.inf
        #: When each of the other processes was last heard.
        self._peers: dict[str, float] = {}
        #: None: all.
        self._written: set[str] | None = set()
        self._distrusted: set[str] | None = set()

    def __repr__(self) -> str:
        return f"<Channel {self.sender} listening={self.is_listening} peers={len(self._peers)}>"

    @property
    def is_listening(self) -> bool:
        """Whether there is a connection on which others are heard."""
        return self._connection is not None and not self._connection.is_closed()

    async def start(self) -> None:
        """Begin to listen; returns once the first message came back, or after 5 s and goes on trying."""
        if self._tasks:
            return
        self.cache.announce = self._announce
        self._tasks.append(asyncio.create_task(self._speak(), name="query cache: speak"))
        if self.direct.pooled:
            _log.warning(
                "no direct connection: what other processes write is seen after up to %g s; set DATABASE_UNPOOLED_URL",
                self.cache.ttl,
            )
            return
        self.cache.trust(-math.inf)
        self._tasks.append(asyncio.create_task(self._listen(), name="query cache: listen"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START_SECONDS):
                await self._proven.wait()

    async def stop(self) -> None:
        """Say what is still to be said and farewell, within seconds; the cache is bypassed from now on."""
        if not self._tasks:
            return
        self.cache.trust(-math.inf)
        tasks, self._tasks = self._tasks, []
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        self.cache.announce = None
        if not await self._send(is_last=True):
            _log.warning("the other processes could not be told of the last writes: they find out by themselves")
        for task in tasks[1:]:
            task.cancel()
        if tasks[1:]:
            await asyncio.wait(tasks[1:])

    def _announce(self, tables: frozenset[str] | None, is_distrusted: bool) -> None:
        if is_distrusted:
            self._distrusted = _united(self._distrusted, tables)
        else:
            self._written = _united(self._written, tables)

    async def _listen(self) -> None:
        delay, most = _BACKOFF_SECONDS
        is_lost = False
        while True:
            try:
                async with asyncio.timeout(_CONNECT_SECONDS):
                    connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(
                        **self.direct.connect_kwargs(), timeout=_CONNECT_SECONDS, command_timeout=_SEND_SECONDS
                    )
                try:
                    ended = asyncio.Event()
                    connection.add_termination_listener(lambda *_, ended=ended: ended.set())
                    await connection.add_listener(CHANNEL, self._heard)
                    # What was written while nobody listened is not known; what is written from now on will be heard.
                    self._sent.clear()
                    self.cache.flush()
                    self._connection = connection
                    delay = _BACKOFF_SECONDS[0]
                    if is_lost:
                        _log.info("other processes' writes are heard again")
                        is_lost = False
                    await self._watch(connection, ended)
                finally:
                    self._connection = None
                    self._answered = -math.inf
                    self._judge()
                    connection.terminate()
            except _DRIVERS_OWN as exc:
                if not is_lost:
                    _log.warning("other processes' writes cannot be heard, nothing is cached: %s", translate(exc))
            is_lost = True
            await asyncio.sleep(delay)
            delay = min(delay * 2, most)

    async def _watch(self, connection: asyncpg.Connection[asyncpg.Record], ended: asyncio.Event) -> None:
        """Raise when the connection has ended, or when nothing has come back on it for too long."""
        since = self.cache.clock()
        while not connection.is_closed():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SEND_SECONDS):
                    await ended.wait()
            if self.cache.clock() - max(self._answered, since) > _DEAF_SECONDS:
                raise TimeoutError
        raise ConnectionResetError("the connection was ended")

    async def _speak(self) -> None:
        said = -math.inf
        while True:
            now = self.cache.clock()
            if self._written != set() or self._distrusted != set() or now - said >= _BEAT_SECONDS:
                await self._send()
                said = now
            self._forget_silent(now)
            await asyncio.sleep(_COALESCE_SECONDS)

    async def _send(self, *, is_last: bool = False) -> bool:
        """Say what was written since the last time; when that fails it is said the next time."""
        written, self._written = self._written, set()
        distrusted, self._distrusted = self._distrusted, set()
        self._number += 1
        self._sent[self._number] = self.cache.clock()
        while len(self._sent) > 100:
            del self._sent[next(iter(self._sent))]
        payload = _encode(self.sender, self._number, is_last, written, distrusted)
        try:
            connection = self._connection
            if connection is not None:
                with contextlib.suppress(*_DRIVERS_OWN):
                    await connection.execute(_NOTIFY, CHANNEL, payload, timeout=_SEND_SECONDS)
                    return True
            async with asyncio.timeout(2 * _SEND_SECONDS):
                await self.database.execute(_NOTIFY, CHANNEL, payload, timeout=_SEND_SECONDS)
        except (TimeoutError, DatabaseError) as exc:
            _log.debug("other processes could not be told of writes: %s", exc)
            self._take_back(written, distrusted)
            return False
        except BaseException:
            self._take_back(written, distrusted)
            raise
        return True

    def _take_back(self, written: set[str] | None, distrusted: set[str] | None) -> None:
        self._written = _united(self._written, written)
        self._distrusted = _united(self._distrusted, distrusted)

    def _heard(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        now = self.cache.clock()
        try:
            sender, number, is_last, written, distrusted = orjson.loads(str(payload))
            tables = [None if names is None else frozenset(map(str, names)) for names in (written, distrusted)]
        except (ValueError, TypeError):
            _log.warning("a message that is none of ours came on %s: everything is dropped", CHANNEL)
            self.cache.flush()
            return
        if sender == self.sender:
            self._answered = max(self._answered, self._sent.pop(number, -math.inf))
        else:
            for names, is_distrusted in zip(tables, (False, True), strict=True):
                if names != frozenset():
                    self.cache.heard(names, is_distrusted=is_distrusted)
            if is_last:
                self._peers.pop(sender, None)
            else:
                self._peers[sender] = now
        self._judge()

    def _judge(self) -> None:
        """Tell the cache how long what was heard until now is proof that it knows all writes."""
        if self.direct.pooled:
            return
        oldest = min((self._answered, *self._peers.values()))
        self.cache.trust(oldest + _PROOF_SECONDS)
        if self.cache.clock() < oldest + _PROOF_SECONDS:
            self._proven.set()

    def _forget_silent(self, now: float) -> None:
        """Give up on processes that ended without a farewell: what they wrote last was told to nobody."""
        if now - self._answered > _PROOF_SECONDS:
            return  # it is us who hear nothing
        silent = [sender for sender, heard in self._peers.items() if now - heard > 1.0]
        for sender in silent:
            del self._peers[sender]
            _log.info("another process fell silent: what is cached is dropped", extra={"sender": sender})
            self.cache.flush(distrust=True)
        if silent:
            self._judge()


async def announce(connection: Connection, tables: Iterable[str]) -> None:
    """Tell every process when this transaction commits that it wrote these tables ("schema.table").

    For statements that run outside `Database`, on a connection of their own.
    """
    await connection.execute(_NOTIFY, CHANNEL, _encode("", 0, True, set(tables), set()))


def _encode(sender: str, number: int, is_last: bool, written: set[str] | None, distrusted: set[str] | None) -> str:
    def encode(*tables: set[str] | list[str] | None) -> bytes:
        return orjson.dumps([sender, number, is_last, *tables], default=sorted)

    payload = encode(written, distrusted)
    if len(payload) >= _PAYLOAD_BYTES:
        payload = encode(None, None if distrusted != set() else [])
    return payload.decode()


def _united(tables: set[str] | None, more: Iterable[str] | None) -> set[str] | None:
    return None if tables is None or more is None else tables | set(more)
