"""The gateway: the websocket endpoint, its handshake and its opcodes."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aiohttp import WSMsgType, web

from .chunks import MemberRequest, clean_nonce, query_page, user_ids_page
from .entities import Json
from .limits import SlidingWindow
from .payloads import own_user_payload, to_bytes
from .session import Session
from .state import PRIVILEGED, Emission, Intent
from .transport import Transport, open_transport

if TYPE_CHECKING:
    from .server import Simulator

# How long a disconnected session can be resumed, and the maximum number of sessions.
RESUME_WINDOW_S = 180.0
_MAX_SESSIONS = 64
_MAX_COMMAND_BYTES = 4096


class CloseGateway(Exception):
    """Close the connection with this gateway close code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Connection:
    """One websocket with its compression stream. Compressing and writing a message is not interrupted by an await."""

    def __init__(self, gateway: Gateway, ws: web.WebSocketResponse, transport: Transport, request: web.Request) -> None:
        self._gateway = gateway
        self._ws = ws
        self._transport = transport
        self._tcp = request.transport
        # A client that connected through a proxy must also resume through it.
        self.url = f"ws://{request.host}/gateway"
        self._background_sends: set[asyncio.Task[None]] = set()
        self.last_heartbeat = time.monotonic()
        self.session: Session | None = None
        self.pump: asyncio.Task[None] | None = None
        self.commands = SlidingWindow(gateway.limits.gateway_commands, gateway.limits.gateway_window)

    async def send(self, message: bytes) -> None:
        """Send a message and wait until the socket accepts more."""
        running = self._gateway.faults.running
        if not running.is_set():
            await running.wait()
        data = self._transport.encode(message)
        if self._transport.binary:
            await self._ws.send_bytes(data)
        else:
            await self._ws.send_str(data.decode("utf-8", "replace"))

    async def send_json(self, payload: Json) -> None:
        """Send a payload other than a dispatch."""
        with suppress(ConnectionError, RuntimeError):
            await self.send(to_bytes(payload))

    def send_soon(self, payload: Json) -> None:
        """Send a payload in the background."""
        task = asyncio.get_running_loop().create_task(self.send_json(payload))
        self._background_sends.add(task)
        task.add_done_callback(self._background_sends.discard)

    async def close(self, code: int, reason: str) -> None:
        """Close with a handshake, waiting at most a second for the client."""
        with suppress(TimeoutError, ConnectionError, RuntimeError):
            async with asyncio.timeout(1.0):
                await self._ws.close(code=code, message=reason.encode())
        self.abort()

    def abort(self) -> None:
        """Reset the TCP connection."""
        if self._tcp is not None:
            self._tcp.abort()

    def release(self) -> None:
        """Stop sending and detach from the session, which can be resumed later."""
        for task in (self.pump, *self._background_sends):
            if task is not None:
                task.cancel()
        if self.session is not None and self.session.socket is self:
            self.session.socket = None
            self.session.disconnected_at = self.session.delivery.disconnected_at = time.monotonic()


class Gateway:
    """Accepts connections, manages sessions, and passes them the world's events."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self.world = simulator.world
        self.limits = simulator.limits
        self.faults = simulator.faults
        self.sessions: dict[str, Session] = {}
        self.connections: set[Connection] = set()
        self.identifies = 0
        self.resumes = 0
        self.member_requests: list[int] = []
        self._last_full: dict[int, float] = {}
        self._session_number = 0

    @property
    def pending_dispatches(self) -> int:
        """The largest number of dispatches queued for a connected client."""
        return max(
            (s.pending_dispatches for s in self.sessions.values() if s.socket is not None and not s.dead), default=0
        )

    @property
    def has_sent_all(self) -> bool:
        """Whether every connected client has been sent everything."""
        return all(s.has_sent_all for s in self.sessions.values() if s.socket is not None and not s.dead)

    def receive(self, emission: Emission) -> None:
        """Pass an event of the world to every session, which filters it."""
        for session in list(self.sessions.values()):
            session.receive(emission)

    def dispatch(self, guild_id: int | None, name: str, payload: Json) -> int:
        """Dispatch an event that is not a mutation (to shard 0 without a guild); return the number of sessions."""
        body = to_bytes(payload)
        alive = [session for session in self.sessions.values() if not session.dead]
        recipients = [s for s in alive if (s.owns(guild_id) if guild_id is not None else s.shard[0] == 0)]
        for session in recipients:
            session.enqueue(name, body)
        return len(recipients)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Serve one websocket from HELLO until it closes."""
        try:
            transport = open_transport(request.query.get("compress"))
        except ValueError as exc:
            raise web.HTTPBadRequest(text=str(exc)) from None
        ws = web.WebSocketResponse(compress=False, max_msg_size=0, autoping=True)
        try:
            await ws.prepare(request)
        except ConnectionError:  # the client has disconnected
            raise web.HTTPServiceUnavailable from None
        connection = Connection(self, ws, transport, request)
        self.connections.add(connection)
        interval = self._simulator.heartbeat_interval
        watch = asyncio.create_task(self._watch(connection, interval))
        try:
            await connection.send_json({"op": 10, "d": {"heartbeat_interval": int(interval * 1000), "_trace": []}})
            async for message in ws:
                await self._command(connection, message.data if message.type is WSMsgType.TEXT else "")
        except CloseGateway as exc:
            await connection.close(exc.code, exc.reason)
        except (ConnectionError, RuntimeError):
            connection.abort()
        finally:
            watch.cancel()
            connection.release()
            self.connections.discard(connection)
        return ws

    async def _watch(self, connection: Connection, interval: float) -> None:
        while True:
            silent = time.monotonic() - connection.last_heartbeat
            if silent > 1.5 * interval:
                await connection.close(4009, "Session timed out.")
                return
            await asyncio.sleep(1.5 * interval - silent + 0.01)

    async def _command(self, connection: Connection, text: str) -> None:
        if len(text) > _MAX_COMMAND_BYTES:
            raise CloseGateway(4002, "Error while decoding payload.")
        if connection.commands.take():
            raise CloseGateway(4008, "You are being rate limited.")
        try:
            payload = json.loads(text)
            opcode, data = payload["op"], payload.get("d")
        except (ValueError, KeyError, TypeError):
            raise CloseGateway(4002, "Error while decoding payload.") from None
        if opcode == 1:
            connection.last_heartbeat = time.monotonic()
            if connection.session is not None:
                connection.session.delivery.acknowledge(data)
            if self.faults.running.is_set():
                connection.send_soon({"op": 11})
        elif opcode == 2:
            await self._identify(connection, data)
        elif opcode == 6:
            await self._resume(connection, data)
        elif connection.session is None:
            raise CloseGateway(4003, "Not authenticated.")
        elif opcode == 8:
            self._request_members(connection.session, data)
        elif opcode not in (3, 4, 31):
            raise CloseGateway(4001, "Unknown opcode.")

    async def _identify(self, connection: Connection, data: Json) -> None:
        if connection.session is not None and not connection.session.dead:
            raise CloseGateway(4005, "Already authenticated.")
        if not isinstance(data, dict) or data.get("token") != self._simulator.token:
            raise CloseGateway(4004, "Authentication failed.")
        intents = data.get("intents")
        if not isinstance(intents, int) or intents < 0 or intents >> 32:
            raise CloseGateway(4013, "Invalid intent(s).")
        if intents & PRIVILEGED & ~self._simulator.privileged_intents:
            raise CloseGateway(4014, "Disallowed intent(s).")
        shard_id, shard_count = data.get("shard") or (0, 1)
        if not 0 <= shard_id < shard_count:
            raise CloseGateway(4010, "Invalid shard.")
        self._discard_old_sessions()
        self.identifies += 1
        self._session_number += 1
        session_id = f"{self.world.seed:08x}{self._session_number:024x}"
        pace = self.limits.pages_per_second
        threshold = min(250, max(50, int(data.get("large_threshold") or 50)))
        session = Session(self.world, self.faults, session_id, intents, (shard_id, shard_count), pace, threshold)
        session.queue_ready(self._ready(session, connection.url, sharded="shard" in data))
        self.sessions[session_id] = session
        self._attach(connection, session)

    def _ready(self, session: Session, url: str, *, sharded: bool) -> Json:
        world = self.world
        guilds = [g.id for g in world.guilds.values() if g.present and session.owns(g.id)]
        ready: Json = {
            "v": 10,
            "user": own_user_payload(world.bot),
            "guilds": [{"id": str(guild_id), "unavailable": True} for guild_id in guilds],
            "session_id": session.id,
            "session_type": "normal",
            "resume_gateway_url": url,
            "application": {"id": str(world.application_id), "flags": self._simulator.application_flags},
            "private_channels": [],
            "relationships": [],
            "presences": [],
            "user_settings": {},
            "geo_ordered_rtc_regions": [],
            "auth": {},
            "_trace": [],
        }
        return ready | ({"shard": list(session.shard)} if sharded else {})

    async def _resume(self, connection: Connection, data: Json) -> None:
        if not isinstance(data, dict) or data.get("token") != self._simulator.token:
            raise CloseGateway(4004, "Authentication failed.")
        session = self.sessions.get(str(data.get("session_id")))
        sequence = data.get("seq")
        is_refused = self.faults.take_refused_resume()
        if session is None or is_refused or not isinstance(sequence, int) or not session.can_resume(sequence):
            if session is not None:
                session.discard()
            await connection.send_json({"op": 9, "d": False})
            return
        for other in self.connections:
            if other.session is session:
                # The old connection would take events that the client no longer reads.
                other.release()
                other.abort()
        self.resumes += 1
        self._attach(connection, session, replay_after=sequence)

    def _attach(self, connection: Connection, session: Session, replay_after: int | None = None) -> None:
        connection.session = session
        session.socket = connection
        session.delivery.disconnected_at = None
        if replay_after is not None:
            session.delivery.acknowledge(replay_after)

        async def serve() -> None:
            try:
                if replay_after is not None:
                    await session.replay(connection, replay_after)
                await session.pump(connection)
            except (ConnectionError, RuntimeError):
                connection.abort()

        connection.pump = asyncio.create_task(serve())

    def _discard_old_sessions(self) -> None:
        now = time.monotonic()
        for session in list(self.sessions.values()):
            stale = session.socket is None and now - session.disconnected_at > RESUME_WINDOW_S
            if session.dead or stale or len(self.sessions) >= _MAX_SESSIONS:
                session.discard()
                del self.sessions[session.id]

    def _request_members(self, session: Session, data: Json) -> None:
        if not isinstance(data, dict):
            raise CloseGateway(4002, "Error while decoding payload.")
        try:
            guild = self.world.guilds.get(int(data["guild_id"]))
            user_ids = data.get("user_ids")
            listed: list[Any] = user_ids if isinstance(user_ids, list) else [user_ids]
            requested = None if user_ids is None else [int(user_id) for user_id in listed]
            query, limit = data.get("query"), int(data.get("limit") or 0)
        except (KeyError, TypeError, ValueError):
            raise CloseGateway(4002, "Error while decoding payload.") from None
        if guild is None or not (guild.present and guild.available and session.owns(guild.id)):
            return
        nonce = clean_nonce(data.get("nonce"))
        if requested is not None:
            session.enqueue("GUILD_MEMBERS_CHUNK", user_ids_page(guild, requested, nonce))
        elif query or limit:
            session.enqueue("GUILD_MEMBERS_CHUNK", query_page(guild, str(query or ""), limit, nonce))
        elif query is not None and session.intents & Intent.GUILD_MEMBERS:
            # Without the intent, Discord ignores the request.
            self._full_request(session, MemberRequest(guild, nonce, self.limits.members_per_page), nonce)

    def _full_request(self, session: Session, request: MemberRequest, nonce: str | None) -> None:
        guild_id = request.guild.id
        self.member_requests.append(guild_id)
        del self.member_requests[:-10_000]
        refused = self.faults.take_rate_limit(guild_id)
        now = time.monotonic()
        if refused is None:
            left = self._last_full.get(guild_id, float("-inf")) + self.limits.chunk_cooldown - now
            refused = left if left > 0 else None
        if refused is not None:
            meta = {"guild_id": str(guild_id)} | ({"nonce": nonce} if nonce is not None else {})
            limited = {"opcode": 8, "retry_after": round(refused, 3), "meta": meta}
            session.enqueue("RATE_LIMITED", to_bytes(limited))
            return
        self._last_full[guild_id] = now
        if self.faults.take_ignored_request(guild_id):
            return
        request.set_page_order(self.faults.take_page_order(guild_id, request.count))
        session.request_members(request)
