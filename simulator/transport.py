"""Transport compression: one stream for each connection, flushed after every gateway message."""

from __future__ import annotations

import zlib
from typing import Protocol

import zstandard


class Transport(Protocol):
    """Encodes gateway messages for one connection; `binary` says which kind of websocket frame carries them."""

    binary: bool

    def encode(self, message: bytes) -> bytes: ...


class Plain:
    """No compression: messages travel as text frames."""

    binary = False

    def encode(self, message: bytes) -> bytes:
        return message


class ZlibStream:
    """zlib-stream: each message ends with the Z_SYNC_FLUSH suffix 00 00 ff ff."""

    binary = True

    def __init__(self) -> None:
        # Level 1 is sufficient: tests measure the bot, not this compressor.
        self._stream = zlib.compressobj(1)

    def encode(self, message: bytes) -> bytes:
        return self._stream.compress(message) + self._stream.flush(zlib.Z_SYNC_FLUSH)


class ZstdStream:
    """zstd-stream: a single endless frame; each message ends with a flushed block."""

    binary = True

    def __init__(self) -> None:
        self._stream = zstandard.ZstdCompressor(level=1).compressobj()

    def encode(self, message: bytes) -> bytes:
        return self._stream.compress(message) + self._stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)


def open_transport(compress: str | None) -> Transport:
    """Return the transport for the `compress` query parameter. Raises ValueError if it is unknown."""
    if compress is None:
        return Plain()
    if compress == "zlib-stream":
        return ZlibStream()
    if compress == "zstd-stream":
        return ZstdStream()
    raise ValueError(f"unknown transport compression {compress!r}: use zlib-stream, zstd-stream or none")
