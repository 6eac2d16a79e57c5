"""How the processes on one database tell each other what they wrote, by LISTEN and NOTIFY."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import uuid
from collections.abc import Iterable
from typing import TypeAlias

import asyncpg
import orjson
import stamina

from utils.database.cache.store import QueryCache
from utils.database.placement import placement_on
from utils.database.pool import Connection, Pool
from utils.database.target import ConnectTarget
from utils.exceptions import DRIVER_ERRORS, DatabaseError, translate
from utils.tasks import cancel_and_wait

_log = logging.getLogger(__name__)
Listener: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

CHANNEL = "guildbook_cache"
_NOTIFY = "SELECT pg_notify($1, $2)"
#: Seconds between two messages: the commit of a NOTIFY takes a lock on the whole server.
COALESCE_SECONDS = 0.1
#: Seconds between two messages of a process that wrote nothing.
BEAT_SECONDS = 0.25
#: Seconds for which a message proves that its sender's writes are known. A write may stay unseen for one second, of
#: which its process waits up to `COALESCE_SECONDS` and the message takes some time.
PROOF_SECONDS = 0.85
#: Seconds after which a peer that sends nothing is given up.
PEER_SECONDS = 1.0
#: PostgreSQL's limit for a payload, in bytes (manual, NOTIFY): it must be shorter.
PAYLOAD_BYTES = 8_000
CONNECT_SECONDS = 5.0
SEND_SECONDS = 1.0
START_SECONDS = 5.0
#: Seconds without an answer after which the connection is replaced.
DEAF_SECONDS = 3.0
#: Seconds before the first and longest between later attempts to connect.
RECONNECT_SECONDS = 0.1, 3.0


async def announce(connection: Connection, tables: Iterable[str]) -> None:
    """Tell every process, when this transaction commits, that it wrote these tables, named as in SQL.

    For statements that run outside `Database`, on a connection of their own.
    """
    placement = placement_on(connection)
    split = [table.rpartition(".") for table in tables]
    names = {f"{placement.resolve(schema or None)}.{table}" for schema, _, table in split}
    await connection.execute(_NOTIFY, placement.channel(CHANNEL), _encode("", 0, True, names, set()))


class Channel:
    """Announces the writes of this process, and applies those of others to its cache.

    Each process says four times a second which tables it wrote, even when there are none. The cache is bypassed unless
    the process has received its own message within a second and one of every peer within a second: a peer that
    disappears without saying so may have written something that it did not announce.
    """

    def __init__(self, cache: QueryCache, direct: ConnectTarget, pool: Pool) -> None:
        """`direct` bypasses any pooler. If it is pooled nothing can be received, and only the TTL bounds staleness."""
        self.cache: QueryCache = cache
        self.direct: ConnectTarget = direct
        self.pool: Pool = pool
        #: The notification channel, which several Guildbooks in one database do not share.
        self.name: str = pool.placement.channel(CHANNEL)
        self.sender: str = uuid.uuid4().hex[:16]
        self._connection: Listener | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._proven: asyncio.Event = asyncio.Event()
        #: When the messages under way were sent, by their number.
        self._sent: dict[int, float] = {}
        self._number: int = 0
        #: When the newest message that came back was sent.
        self._answered: float = -math.inf
        #: When each peer was last heard.
        self._peers: dict[str, float] = {}
        #: Tables to announce; None: all.
        self._written: set[str] | None = set()
        self._distrusted: set[str] | None = set()

    def __repr__(self) -> str:
        return f"<Channel {self.sender} listening={self.is_listening} peers={len(self._peers)}>"

    @property
    def is_listening(self) -> bool:
        """Whether there is a connection on which messages are received."""
        return self._connection is not None and not self._connection.is_closed()

    async def start(self) -> None:
        """Start listening. Returns when the first message has come back, or after 5 s while it goes on trying."""
        if self._tasks:
            return
        self.cache.on_write = self._collect
        self._tasks.append(asyncio.create_task(self._keep_sending(), name="query cache: send"))
        if self.direct.pooled:
            _log.warning(
                "no direct connection: writes of other processes are seen after up to %g s; set DATABASE_UNPOOLED_URL",
                self.cache.ttl,
            )
            return
        self.cache.trust_until(-math.inf)
        self._tasks.append(asyncio.create_task(self._keep_listening(), name="query cache: listen"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                await self._proven.wait()

    async def stop(self) -> None:
        """Announce the last writes and leave, within seconds. The cache is bypassed from now on."""
        if not self._tasks:
            return
        self.cache.trust_until(-math.inf)
        tasks, self._tasks = self._tasks, []
        await cancel_and_wait(tasks[:1])
        self.cache.on_write = None
        if not await self._send(is_last=True):
            _log.warning("the last writes were not announced: other processes flush their caches")
        await cancel_and_wait(tasks[1:])

    # --- sending

    def _collect(self, tables: frozenset[str] | None, is_distrusted: bool) -> None:
        if is_distrusted:
            self._distrusted = _union(self._distrusted, tables)
        else:
            self._written = _union(self._written, tables)

    async def _keep_sending(self) -> None:
        sent_at = -math.inf
        while True:
            now = self.cache.clock()
            if self._written != set() or self._distrusted != set() or now - sent_at >= BEAT_SECONDS:
                await self._send()
                sent_at = now
            self._drop_silent_peers(now)
            await asyncio.sleep(COALESCE_SECONDS)

    async def _send(self, *, is_last: bool = False) -> bool:
        """Announce what was written since the last message; after a failure it is part of the next one."""
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
                with contextlib.suppress(*DRIVER_ERRORS):
                    await connection.execute(_NOTIFY, self.name, payload, timeout=SEND_SECONDS)
                    return True
            async with asyncio.timeout(2 * SEND_SECONDS):
                await self.pool.execute(_NOTIFY, self.name, payload, timeout=SEND_SECONDS)
        except (TimeoutError, DatabaseError) as exc:
            _log.debug("writes were not announced: %s", exc)
            self._put_back(written, distrusted)
            return False
        except BaseException:
            self._put_back(written, distrusted)
            raise
        return True

    def _put_back(self, written: set[str] | None, distrusted: set[str] | None) -> None:
        self._written = _union(self._written, written)
        self._distrusted = _union(self._distrusted, distrusted)

    # --- receiving

    async def _keep_listening(self) -> None:
        is_first = True
        while True:
            connection = await self._connect(is_first=is_first)
            try:
                await self._watch(connection)
            except DRIVER_ERRORS as exc:
                _log.warning("writes of other processes cannot be received, nothing is cached: %s", translate(exc))
            finally:
                self._connection = None
                self._answered = -math.inf
                self._update_trust()
                connection.terminate()
            is_first = False
            await asyncio.sleep(RECONNECT_SECONDS[0])

    async def _connect(self, *, is_first: bool) -> Listener:
        """Return a listening connection, however long that takes."""
        first, longest = RECONNECT_SECONDS
        async for attempt in stamina.retry_context(
            on=DRIVER_ERRORS, attempts=None, timeout=None, wait_initial=first, wait_max=longest, wait_jitter=first
        ):
            with attempt:
                try:
                    connection = await self._listen()
                except DRIVER_ERRORS as exc:
                    if is_first and attempt.num == 1:
                        _log.warning(
                            "writes of other processes cannot be received, nothing is cached: %s", translate(exc)
                        )
                    raise
                if not is_first or attempt.num > 1:
                    _log.info("writes of other processes are received again")
                return connection
        raise AssertionError("unreachable: there is no last attempt")

    async def _listen(self) -> Listener:
        async with asyncio.timeout(CONNECT_SECONDS):
            connection: Listener = await asyncpg.connect(
                **self.direct.connect_kwargs(), timeout=CONNECT_SECONDS, command_timeout=SEND_SECONDS
            )
        try:
            await connection.add_listener(self.name, self._on_message)
        except BaseException:
            connection.terminate()
            raise
        # Writes so far may have been missed; those from now on will be received.
        self._sent.clear()
        self.cache.flush()
        self._connection = connection
        return connection

    async def _watch(self, connection: Listener) -> None:
        """Raise when the connection is closed, or when no message has come back on it for too long."""
        ended = asyncio.Event()
        connection.add_termination_listener(lambda *_: ended.set())
        since = self.cache.clock()
        while not connection.is_closed():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SEND_SECONDS):
                    await ended.wait()
            if self.cache.clock() - max(self._answered, since) > DEAF_SECONDS:
                raise TimeoutError
        raise ConnectionResetError("the connection was closed")

    def _on_message(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        now = self.cache.clock()
        try:
            sender, number, is_last, written, distrusted = orjson.loads(str(payload))
            tables = [None if names is None else frozenset(map(str, names)) for names in (written, distrusted)]
        except (ValueError, TypeError):
            _log.warning("unknown message on %s: flushing the cache", self.name)
            self.cache.flush()
            return
        if sender == self.sender:
            self._answered = max(self._answered, self._sent.pop(number, -math.inf))
        else:
            for names, is_distrusted in zip(tables, (False, True), strict=True):
                if names != frozenset():
                    self.cache.apply(names, is_distrusted=is_distrusted)
            if is_last:
                self._peers.pop(sender, None)
            else:
                self._peers[sender] = now
        self._update_trust()

    def _update_trust(self) -> None:
        """Trust the cache for as long as the messages so far prove that it knows all writes."""
        if self.direct.pooled:
            return
        oldest = min((self._answered, *self._peers.values()))
        self.cache.trust_until(oldest + PROOF_SECONDS)
        if self.cache.clock() < oldest + PROOF_SECONDS:
            self._proven.set()

    def _drop_silent_peers(self, now: float) -> None:
        """Give up on peers that ended without saying so: their last writes were not announced."""
        if now - self._answered > PROOF_SECONDS:
            return  # it is this process that receives nothing
        silent = [sender for sender, heard_at in self._peers.items() if now - heard_at > PEER_SECONDS]
        for sender in silent:
            del self._peers[sender]
            _log.info("a peer disappeared: flushing the cache", extra={"sender": sender})
            self.cache.flush(distrust=True)
        if silent:
            self._update_trust()


def _encode(sender: str, number: int, is_last: bool, written: set[str] | None, distrusted: set[str] | None) -> str:
    """Return a message; one that is too long names no tables, which means all."""

    def encode(*tables: set[str] | list[str] | None) -> bytes:
        return orjson.dumps([sender, number, is_last, *tables], default=sorted)

    payload = encode(written, distrusted)
    if len(payload) >= PAYLOAD_BYTES:
        payload = encode(None, None if distrusted != set() else [])
    return payload.decode()


def _union(tables: set[str] | None, more: Iterable[str] | None) -> set[str] | None:
    return None if tables is None or more is None else tables | set(more)
