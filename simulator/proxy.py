"""A TCP proxy with injectable faults: latency, resets and frozen connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections import deque
from types import TracebackType

_CHUNK = 1 << 16
#: Maximum number of buffered bytes in one direction of one connection.
_MAX_BUFFERED = 1 << 22
#: SO_LINGER value that makes close() send RST.
_RESET = struct.pack("ii", 1, 0)

Upstream = tuple[str, int] | str


class _Pipe:
    """Forwards one direction of one connection with the proxy's latency."""

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        #: Chunks with the time when they are due; b"" is end of stream, None is a reset.
        self._buffer: deque[tuple[float, bytes | None]] = deque()
        self._size = 0
        self._has_data = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()

    async def run(self) -> None:
        """Forward until one side ends."""
        reading = asyncio.create_task(self._read())
        try:
            await self._write()
        finally:
            reading.cancel()

    async def _read(self) -> None:
        while True:
            await self._has_room.wait()
            try:
                data: bytes | None = await self._reader.read(_CHUNK)
            except OSError:
                data = None
            self._buffer.append((time.monotonic() + self._proxy.latency, data))
            self._size += len(data or b"")
            self._has_data.set()
            if not data:
                return
            if self._size > _MAX_BUFFERED:
                self._has_room.clear()

    async def _write(self) -> None:
        while True:
            while not self._buffer:
                self._has_data.clear()
                await self._has_data.wait()
            due, data = self._buffer.popleft()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            await self._proxy.flowing.wait()
            if data is None:
                raise ConnectionResetError("the peer was reset")
            if not data:
                if self._writer.can_write_eof():
                    self._writer.write_eof()
                return
            self._writer.write(data)
            await self._writer.drain()
            self._proxy.bytes += len(data)
            self._size -= len(data)
            self._has_room.set()


class Proxy:
    """Listens on a local port and forwards to `upstream`, an address or the path of a Unix socket.

    `latency` is in seconds, for each direction.
    """

    def __init__(self, upstream: Upstream, *, latency: float = 0.0) -> None:
        self.upstream = upstream
        self.latency = latency
        self.port = 0
        #: Number of bytes forwarded in both directions.
        self.bytes = 0
        #: Cleared while the proxy is frozen.
        self.flowing = asyncio.Event()
        self.flowing.set()
        self._is_cut = False
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}

    def __repr__(self) -> str:
        return f"<Proxy {self.port} -> {self.upstream} connections={self.connections}>"

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return len(self._connections)

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.heal()
        if self._server is not None:
            self._server.close()
        tasks = list(self._connections)
        self.reset_all()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def cut(self) -> None:
        """Reset every connection, including new ones, until `heal`."""
        self._is_cut = True
        self.reset_all()

    def freeze(self) -> None:
        """Forward nothing until `heal`; connections stay open and new ones are accepted."""
        self.flowing.clear()

    def heal(self) -> None:
        """Undo `cut` and `freeze`."""
        self._is_cut = False
        self.flowing.set()

    def reset_all(self) -> None:
        """Reset every connection."""
        for writers in self._connections.values():
            for writer in writers:
                _reset(writer)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self._is_cut:
            _reset(writer)
            return
        writers = self._connections[task] = [writer]
        running: list[asyncio.Task[None]] = []
        try:
            await self.flowing.wait()
            far_reader, far_writer = await self._connect()
            writers.append(far_writer)
            pipes = (_Pipe(self, reader, far_writer), _Pipe(self, far_reader, writer))
            running += [asyncio.create_task(pipe.run()) for pipe in pipes]
            await asyncio.gather(*running)
        except asyncio.CancelledError:
            pass  # the proxy is stopping
        except OSError:
            for each in writers:
                _reset(each)
        finally:
            del self._connections[task]
            for pipe in running:
                pipe.cancel()
            for each in writers:
                each.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self.upstream, str):
            return await asyncio.open_unix_connection(self.upstream)
        return await asyncio.open_connection(*self.upstream)


def _reset(writer: asyncio.StreamWriter) -> None:
    found = writer.get_extra_info("socket")
    if found is not None and found.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
