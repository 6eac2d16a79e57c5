"""A gateway session: filters events, queues them, and replays them after a RESUME."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from typing import Any, Protocol

from .chunks import MemberRequest
from .entities import Json
from .faults import FaultInjector
from .ledger import Delivery
from .payloads import guild_create_payload, to_bytes
from .state import Emission, Intent, WorldState

OUTBOX_EVENTS = 100_000
OUTBOX_BYTES = 64 << 20
MAX_REQUESTS = 10_000
REPLAY_EVENTS = 20_000
REPLAY_BYTES = 48 << 20
_MAX_LATENESS_S = 0.1
_NEVER_DUPLICATED = frozenset({"READY", "RESUMED", "GUILD_MEMBERS_CHUNK"})


class Socket(Protocol):
    """The connection a session sends through."""

    async def send(self, message: bytes) -> None: ...
    def abort(self) -> None: ...
    def send_soon(self, payload: Json) -> None: ...


class Session:
    """One session of one shard, which survives its sockets until it is invalidated or discarded."""

    def __init__(
        self,
        world: WorldState,
        faults: FaultInjector,
        session_id: str,
        intents: int,
        shard: tuple[int, int],
        pace: float | None,
        large_threshold: int,
    ) -> None:
        self.id = session_id
        self.intents = intents
        self.shard = shard
        self.socket: Socket | None = None
        self.sequence = 0
        self.dead = False
        self.disconnected_at = time.monotonic()
        self._world = world
        self._faults = faults
        self._pace = pace
        self._large_threshold = large_threshold
        self._next_page_at = 0.0
        self._wake = asyncio.Event()
        self._outbox: deque[tuple[str, bytes]] = deque()
        self._outbox_bytes = 0
        self._replay: deque[tuple[int, bytes]] = deque()
        self._replay_bytes = 0
        self.delivery = world.ledger.deliveries[session_id] = Delivery()
        # Guilds whose GUILD_CREATE has not been sent yet, and whether the bot newly joined them.
        self._backlog: dict[int, bool] = {}
        self._requests: deque[MemberRequest] = deque()
        self._duplicates: list[tuple[int, bytes]] = []

    def __repr__(self) -> str:
        return f"<Session {self.id} shard={self.shard} sequence={self.sequence} connected={self.socket is not None}>"

    @property
    def buffered_bytes(self) -> int:
        """Number of bytes queued and kept for replay."""
        return self._outbox_bytes + self._replay_bytes

    @property
    def pending_dispatches(self) -> int:
        """Number of queued dispatches."""
        return len(self._outbox)

    @property
    def has_sent_all(self) -> bool:
        """Whether nothing is queued, apart from injected duplicates that wait for further events."""
        return not (self._outbox or self._backlog or self._requests)

    def owns(self, guild_id: int | None) -> bool:
        """Return whether a guild belongs to this session's shard; None belongs to all."""
        return guild_id is None or (guild_id >> 22) % self.shard[1] == self.shard[0]

    def queue_ready(self, ready: Json) -> None:
        """Queue READY, then GUILD_CREATE for each available guild."""
        self.enqueue("READY", to_bytes(ready))
        if self.intents & Intent.GUILDS:
            for guild in self._world.guilds.values():
                if not guild.present or not self.owns(guild.id):
                    continue
                if guild.available:
                    self._backlog[guild.id] = False
                else:
                    # https://docs.discord.com/developers/events/gateway-events#guild-create
                    self.enqueue("GUILD_DELETE", to_bytes({"id": str(guild.id), "unavailable": True}))

    def receive(self, emission: Emission) -> None:
        """Queue one of the world's events if the shard and the intents allow it."""
        if not self.owns(emission.guild_id) or (emission.intent and not emission.intent & self.intents):
            return
        if emission.is_direct and self.shard[0] != 0:
            return
        if emission.name == "GUILD_CREATE" and emission.guild_id is not None:
            self._backlog[emission.guild_id] = emission.newly_joined
            self._wake.set()
            return
        if emission.guild_id in self._backlog:
            # GUILD_CREATE has not been sent yet and will contain this change.
            if emission.name != "GUILD_DELETE":
                return
            del self._backlog[emission.guild_id]
        has_content = bool(self.intents & Intent.MESSAGE_CONTENT) or emission.redacted is None
        self.enqueue(emission.name, emission.body if has_content else emission.redacted or emission.body)

    def enqueue(self, name: str, body: bytes) -> None:
        """Queue a dispatch; a client that falls too far behind loses its session."""
        if self.dead:
            return
        self._outbox.append((name, body))
        self._outbox_bytes += len(body)
        if len(self._outbox) > OUTBOX_EVENTS or self._outbox_bytes > OUTBOX_BYTES:
            self.discard()
            self.drop_socket()
        self._wake.set()

    def request_members(self, request: MemberRequest) -> None:
        """Queue a full member request; concurrent requests are served page by page in turn."""
        self._requests.append(request)
        if len(self._requests) > MAX_REQUESTS:
            self.discard()
            self.drop_socket()
        self._wake.set()

    def discard(self) -> None:
        """End the session: it cannot be resumed, and its queues are dropped."""
        self.dead = True
        self._wake.set()
        for queue in (self._outbox, self._replay, self._backlog, self._requests, self._duplicates):
            queue.clear()
        self._outbox_bytes = self._replay_bytes = 0

    def can_resume(self, sequence: int) -> bool:
        """Return whether every event after `sequence` can be replayed."""
        oldest = self._replay[0][0] if self._replay else self.sequence + 1
        return not self.dead and oldest - 1 <= sequence <= self.sequence

    async def replay(self, socket: Socket, sequence: int) -> None:
        """Resend what was dispatched after `sequence`, then RESUMED."""
        missed = [message for number, message in self._replay if number > sequence]
        for message in missed:
            await socket.send(message)
        resumed = b'{"_trace":[]}'
        self._outbox.appendleft(("RESUMED", resumed))
        self._outbox_bytes += len(resumed)

    async def pump(self, socket: Socket) -> None:
        """Send queued items through a socket until it fails: events first, then guilds, then member pages."""
        while not self.dead:
            self._wake.clear()
            item = self._next()
            if item is None:
                await self._wait_for_work()
                continue
            name, body, request = item
            if name == "":
                await socket.send(body)
                continue
            self.sequence += 1
            message = b'{"t":"%s","s":%d,"op":0,"d":%s}' % (name.encode(), self.sequence, body)
            self._keep_for_replay(message)
            self.delivery.record(name, self.sequence, body)
            await socket.send(message)
            await self._send_duplicates(socket, name, message)
            is_dropped = self._faults.take_drop_after_event()
            if request is not None and self._faults.take_drop_after_page(request.guild.id):
                is_dropped = True
            if is_dropped:
                socket.abort()
                return
            # `send` does not suspend while the socket accepts more: yield to other sessions and requests.
            await asyncio.sleep(0)

    # Fault injection.

    def drop_socket(self) -> bool:
        """Reset the socket without a close handshake."""
        if self.socket is None:
            return False
        self.socket.abort()
        return True

    def invalidate(self, *, resumable: bool) -> bool:
        """Send op 9; end the session unless it is resumable."""
        if self.socket is None:
            return False
        self.socket.send_soon({"op": 9, "d": resumable})
        if not resumable:
            self.discard()
        return True

    def inject(self, message: bytes | dict[str, Any]) -> None:
        """Queue an event that did not happen in the world; bytes are sent verbatim."""
        if isinstance(message, bytes):
            self.enqueue("", message)
        else:
            self.enqueue(str(message["t"]), json.dumps(message["d"]).encode("ascii"))

    def _next(self) -> tuple[str, bytes, MemberRequest | None] | None:
        if self._outbox:
            name, body = self._outbox.popleft()
            self._outbox_bytes -= len(body)
            return name, body, None
        if self._backlog:
            guild = self._world.guilds[next(iter(self._backlog))]
            newly_joined = self._backlog.pop(guild.id)
            # With the presences intent, a guild up to the client's threshold is sent with all members.
            all_members = bool(self.intents & Intent.GUILD_PRESENCES) and len(guild.members) <= self._large_threshold
            payload = guild_create_payload(
                guild, self._world.bot.id, newly_joined=newly_joined, all_members=all_members
            )
            return "GUILD_CREATE", to_bytes(payload), None
        while self._requests:
            request = self._requests[0]
            if request.finished or not (request.guild.available and request.guild.present):
                self._requests.popleft()
                continue
            if self._pace is not None:
                now = time.monotonic()
                if now < self._next_page_at:
                    return None
                # A slightly late timer must not reduce the rate, and a pause must not cause a burst.
                late = now - self._next_page_at
                self._next_page_at = (self._next_page_at if late < _MAX_LATENESS_S else now) + 1.0 / self._pace
            self._requests.rotate(-1)
            return "GUILD_MEMBERS_CHUNK", request.take_page(), request
        return None

    async def _wait_for_work(self) -> None:
        wait = max(0.0, self._next_page_at - time.monotonic()) if self._requests else 30.0
        try:
            async with asyncio.timeout(wait):
                await self._wake.wait()
        except TimeoutError:
            return

    def _keep_for_replay(self, message: bytes) -> None:
        self._replay.append((self.sequence, message))
        self._replay_bytes += len(message)
        while len(self._replay) > REPLAY_EVENTS or self._replay_bytes > REPLAY_BYTES:
            self._replay_bytes -= len(self._replay.popleft()[1])

    async def _send_duplicates(self, socket: Socket, name: str, message: bytes) -> None:
        due = [duplicate for left, duplicate in self._duplicates if left <= 1]
        self._duplicates = [(left - 1, duplicate) for left, duplicate in self._duplicates if left > 1]
        for duplicate in due:
            await socket.send(duplicate)
        delay = None if name in _NEVER_DUPLICATED else self._faults.take_duplicate_delay()
        if delay == 0:
            await socket.send(message)
        elif delay is not None:
            self._duplicates.append((delay, message))
