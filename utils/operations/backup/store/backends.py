"""What `Remote` asks: the blocking calls of obstore (S3, GCS, Azure, …), or a directory of a mounted file system."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from utils.files import create_private
from utils.operations.backup.archive.pipeline import CHUNK
from utils.operations.backup.store.directory import Directory

#: Shares of the seconds for an answer: for one request, for retries after errors, and for the longest pause before
#: one. They leave a rest, so that obstore gives up by itself.
REQUEST_SHARE, RETRY_SHARE, PAUSE_SHARE = 0.75, 0.15, 0.05
#: Bytes of a part, and parts in flight at once: together, the memory that an upload takes. All of them must be sent
#: in the time of one request, which limits how slow the connection may be.
PART_BYTES, PARTS_IN_FLIGHT = 5 << 20, 2
#: What may be secret in a URL: a login, and a query, which may be a signature.
_SECRET = re.compile(r"(?<=//)[^/@\s]*@|\?[^\s\"]*")


class NoAnswer(Exception):
    """A store did not answer in time."""


@dataclass(slots=True)
class Transfer:
    """The state of an upload."""

    #: Called, in any thread, with the number of bytes that the store has taken.
    report: Callable[[int], object]
    #: When the store last took a part, on the monotonic clock.
    moved_at: float = field(default_factory=time.monotonic)
    #: Whether it shall end at the next part.
    is_abandoned: bool = False

    def abandon(self) -> None:
        """Let it end at the next part."""
        self.is_abandoned = True

    def parts(self, path: Path, size: int) -> Iterator[bytes]:
        """Yield a file's content in parts; the next one is asked for when the store has taken one."""
        sent = 0
        with path.open("rb") as file:
            while part := file.read(size):
                yield part
                if self.is_abandoned:
                    raise NoAnswer("the transfer was abandoned")
                self.moved_at = time.monotonic()
                sent += len(part)
                self.report(sent)


class Backend(Protocol):
    """What `Remote` needs of a store. The methods block, and raise what obstore or the disk raises."""

    def names(self) -> dict[str, int]: ...
    def size(self, name: str) -> int: ...
    def read(self, name: str, limit: int) -> bytes | None: ...
    def read_part(self, name: str, start: int, end: int) -> bytes: ...
    def write(self, name: str, content: bytes) -> None: ...
    def upload(self, path: Path, name: str, transfer: Transfer) -> None: ...
    def delete(self, name: str) -> None: ...


class Objects:
    """A store of objects behind a network, through obstore's blocking functions.

    Its futures are not used: they are completed by threads that need the interpreter once more afterwards, and abort
    the process if it is shutting down by then.
    """

    def __init__(self, url: str, answer_seconds: float, stall_seconds: float, part_bytes: int) -> None:
        import obstore

        self._obstore = obstore
        self._part_bytes = part_bytes
        self._small = _connect(url, answer_seconds)
        #: For parts of large objects, which may take longer.
        self._large = _connect(url, stall_seconds)

    def names(self) -> dict[str, int]:
        listed = self._obstore.list_with_delimiter(self._small)
        return {item["path"]: item["size"] for item in listed["objects"]}

    def size(self, name: str) -> int:
        return self._obstore.head(self._small, name)["size"]

    def read(self, name: str, limit: int) -> bytes | None:
        content = bytearray()
        for chunk in self._obstore.get(self._small, name).stream():
            content += chunk
            if len(content) >= limit:
                break
        return bytes(content[:limit])

    def read_part(self, name: str, start: int, end: int) -> bytes:
        return bytes(self._obstore.get_range(self._large, name, start=start, end=end))

    def write(self, name: str, content: bytes) -> None:
        self._obstore.put(self._small, name, content, use_multipart=False)

    def upload(self, path: Path, name: str, transfer: Transfer) -> None:
        self._obstore.put(
            self._large,
            name,
            transfer.parts(path, self._part_bytes),
            use_multipart=True,
            chunk_size=self._part_bytes,
            max_concurrency=PARTS_IN_FLIGHT,
        )

    def delete(self, name: str) -> None:
        self._obstore.delete(self._small, name)


def _connect(url: str, seconds: float) -> Any:
    """Return obstore's store at a URL, which answers or fails within `seconds`."""
    import obstore.store

    request = timedelta(seconds=seconds * REQUEST_SHARE)
    options: Any = {"timeout": request, "connect_timeout": request}
    if os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes"):
        options["allow_http"] = True
    pause = seconds * PAUSE_SHARE
    retries: Any = {
        "retry_timeout": timedelta(seconds=seconds * RETRY_SHARE),
        "backoff": {"init_backoff": timedelta(seconds=pause / 10), "max_backoff": timedelta(seconds=pause)},
    }
    return obstore.store.from_url(url, client_options=options, retry_config=retries)


class Files:
    """A directory, perhaps of a network's file system."""

    def __init__(self, path: Path) -> None:
        self._directory = Directory(path)
        self.names = self._directory.blocking_names
        self.read = self._directory.blocking_read
        self.write = self._directory.blocking_write
        self.delete = self._directory.blocking_delete

    def size(self, name: str) -> int:
        return (self._directory.path / name).stat().st_size

    def read_part(self, name: str, start: int, end: int) -> bytes:
        with (self._directory.path / name).open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def upload(self, path: Path, name: str, transfer: Transfer) -> None:
        self._directory.prepare()
        with self._directory.unfinished(name) as unfinished:
            with os.fdopen(create_private(unfinished), "wb", buffering=0) as file:
                for part in transfer.parts(path, CHUNK):
                    file.write(part)
            self._directory.finish(unfinished, name)


def first_line(exc: BaseException) -> str:
    """Return the first line of an error of a store's, without the secrets that URLs may contain."""
    if isinstance(exc, OSError) and exc.strerror:
        return f"{exc.filename}: {exc.strerror}" if exc.filename else exc.strerror
    line = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
    return _SECRET.sub("", line)[:300]
