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
from .limits import Window
from .payloads import own_user_payload, to_bytes
from .session import Session
from .state import PRIVILEGED, Emission, Intent
from .transport import Transport, open_transport

if TYPE_CHECKING:
    from .server import Simulator

# How long a session without a socket can still be resumed, and how many such sessions are kept.
RESUME_WINDOW_S = 180.0
_MAX_SESSIONS = 64
_MAX_COMMAND_BYTES = 4096


class CloseGateway(Exception):
    """The connection is to be closed with one of the gateway's close codes."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Connection:
    """One websocket with its compression stream; messages are compressed and written without a break between."""

    def __init__(self, gateway: Gateway, ws: web.WebSocketResponse, transport: Transport, request: web.Request) -> None:
        self._gateway = gateway
        self._ws = ws
        self._transport = transport
        self._tcp = request.transport
        # Whoever comes by way of a proxy goes on by way of it.
        self.url = f"ws://{request.host}/gateway"
        self._loose: set[asyncio.Task[None]] = set()
        self.last_heartbeat = time.monotonic()
        self.session: Session | None = None
        self.pump: asyncio.Task[None] | None = None
        self.commands = Window(gateway.limits.gateway_commands, gateway.limits.gateway_window)

    async def send(self, message: bytes) -> None:
        """Send a message and wait until the socket has room again."""
        running = self._gateway.faults.running
        if not running.is_set():
            await running.wait()
        data = self._transport.encode(message)
        if self._transport.binary:
            await self._ws.send_bytes(data)
        else:
            await self._ws.send_str(data.decode("utf-8", "replace"))

    async def send_json(self, payload: Json) -> None:
        """Send a payload that is no dispatch."""
        with suppress(ConnectionError, RuntimeError):
            await self.send(to_bytes(payload))

    def send_soon(self, payload: Json) -> None:
        """Send a payload from code that cannot wait."""
        task = asyncio.get_running_loop().create_task(self.send_json(payload))
        self._loose.add(task)
        task.add_done_callback(self._loose.discard)

    async def close(self, code: int, reason: str) -> None:
        """Close with a handshake, waiting no longer than a second for the client's half."""
        with suppress(TimeoutError, ConnectionError, RuntimeError):
            async with asyncio.timeout(1.0):
                await self._ws.close(code=code, message=reason.encode())
        self.abort()

    def abort(self) -> None:
        """Cut the TCP connection."""
        if self._tcp is not None:
            self._tcp.abort()

    def release(self) -> None:
        """Stop sending and let go of the session, which may be resumed later."""
        for task in (self.pump, *self._loose):
            if task is not None:
                task.cancel()
        if self.session is not None and self.session.socket is self:
            self.session.socket = None
            self.session.disconnected_at = self.session.delivery.disconnected_at = time.monotonic()


class Gateway:
    """Accepts connections, keeps the sessions, and hands them the world's events."""

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
    def waiting(self) -> int:
        """Dispatches that wait to be sent to a client that is connected."""
        return max((s.waiting for s in self.sessions.values() if s.socket is not None and not s.dead), default=0)

    @property
    def has_sent_all(self) -> bool:
        """Whether no client that is connected is owed anything."""
        return all(s.has_sent_all for s in self.sessions.values() if s.socket is not None and not s.dead)

    def receive(self, emission: Emission) -> None:
        """Give an event of the world to every session it concerns."""
        for session in list(self.sessions.values()):
            session.receive(emission)

    def dispatch(self, guild_id: int | None, name: str, payload: Json) -> int:
        """Dispatch something that is no change of the world; without a guild it goes to shard 0."""
        body = to_bytes(payload)
        alive = [session for session in self.sessions.values() if not session.dead]
        found = [s for s in alive if (s.owns(guild_id) if guild_id is not None else s.shard[0] == 0)]
        for session in found:
            session.enqueue(name, body)
        return len(found)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Serve one websocket from HELLO to its end."""
        try:
            transport = open_transport(request.query.get("compress"))
        except ValueError as exc:
            raise web.HTTPBadRequest(text=str(exc)) from None
        ws = web.WebSocketResponse(compress=False, max_msg_size=0, autoping=True)
        try:
            await ws.prepare(request)
        except ConnectionError:  # its client has gone meanwhile
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
        self._forget_old_sessions()
        self.identifies += 1
        self._session_number += 1
        session_id = f"{self.world.seed:08x}{self._session_number:024x}"
        pace = self.limits.pages_per_second
        threshold = min(250, max(50, int(data.get("large_threshold") or 50)))
        session = Session(self.world, self.faults, session_id, intents, (shard_id, shard_count), pace, threshold)
        session.introduce(self._ready(session, connection.url, sharded="shard" in data))
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
        refused = self.faults.take_refused_resume()
        if session is None or refused or not isinstance(sequence, int) or not session.can_resume(sequence):
            if session is not None:
                session.forget()
            await connection.send_json({"op": 9, "d": False})
            return
        for other in self.connections:
            if other.session is session:
                # Two pumps of one session would send events where the client no longer listens.
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

    def _forget_old_sessions(self) -> None:
        now = time.monotonic()
        for session in list(self.sessions.values()):
            stale = session.socket is None and now - session.disconnected_at > RESUME_WINDOW_S
            if session.dead or stale or len(self.sessions) >= _MAX_SESSIONS:
                session.forget()
                del self.sessions[session.id]

    def _request_members(self, session: Session, data: Json) -> None:
        if not isinstance(data, dict):
            raise CloseGateway(4002, "Error while decoding payload.")
        try:
            guild = self.world.guilds.get(int(data["guild_id"]))
            user_ids = data.get("user_ids")
            listed: list[Any] = user_ids if isinstance(user_ids, list) else [user_ids]
            wanted = None if user_ids is None else [int(user_id) for user_id in listed]
            query, limit = data.get("query"), int(data.get("limit") or 0)
        except (KeyError, TypeError, ValueError):
            raise CloseGateway(4002, "Error while decoding payload.") from None
        if guild is None or not (guild.present and guild.available and session.owns(guild.id)):
            return
        nonce = clean_nonce(data.get("nonce"))
        if wanted is not None:
            session.enqueue("GUILD_MEMBERS_CHUNK", user_ids_page(guild, wanted, nonce))
        elif query or limit:
            session.enqueue("GUILD_MEMBERS_CHUNK", query_page(guild, str(query or ""), limit, nonce))
        elif query is not None and session.intents & Intent.GUILD_MEMBERS:
            # Without the intent the full list is never sent, and nothing says so.
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
        request.follow(self.faults.take_page_order(guild_id, request.count))
        session.request_members(request)
