"""A fake S3 server on loopback, with the faults that a store may have."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from types import TracebackType
from urllib.parse import unquote
from xml.sax.saxutils import escape, unescape

from aiohttp import web

ACCESS_KEY, SECRET_KEY = "fake-access", "hush-fake-secret"
#: Objects on one page of a listing: few, so that a listing has several.
PAGE = 3
_HEAD = '<?xml version="1.0" encoding="UTF-8"?>'


class FakeS3:
    """A server with one bucket, in memory."""

    def __init__(self, bucket: str = "bucket") -> None:
        self.bucket = bucket
        self.objects: dict[str, bytes] = {}
        #: Number of requests by verb: PUT, PART, CREATE, COMPLETE, ABORT, GET, HEAD, LIST, DELETE.
        self.requests: Counter[str] = Counter()
        #: Largest request body in bytes.
        self.largest_body = 0
        #: Requests that are being answered, and the most there were at once.
        self.running = self.most_running = 0
        #: Applied to an archive before it is stored.
        self.damage: Callable[[bytes], bytes] | None = None
        #: Verbs answered with an internal error, verbs refused, and verbs never answered.
        self.failing: set[str] = set()
        self.refusing: set[str] = set()
        self.silent: set[str] = set()
        #: Seconds before each answer.
        self.pause = 0.0
        #: Number of chunks, 0.2 s apart, in which a body is sent; 0: all at once.
        self.drips = 0
        self._uploads: dict[str, dict[int, bytes]] = {}
        self._numbers = itertools.count(1)
        self._closing = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self.url = ""

    @property
    def open_uploads(self) -> int:
        """Number of multipart uploads that were neither completed nor aborted."""
        return len(self._uploads)

    def environment(self) -> dict[str, str]:
        """Return the environment variables that point to it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        }

    async def __aenter__(self) -> FakeS3:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Stop: connections are refused from now on."""
        self._closing.set()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if f"Credential={ACCESS_KEY}/" not in request.headers.get("Authorization", ""):
            return _error(403, "AccessDenied", "the signature is wrong")
        bucket, _, key = unquote(request.path).lstrip("/").partition("/")
        if bucket != self.bucket:
            return _error(404, "NoSuchBucket", f"there is no bucket {bucket}")
        verb = _verb(request)
        self.requests[verb] += 1
        body = await request.read()
        self.largest_body = max(self.largest_body, len(body))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._answer_verb(verb, request, key, body)
        finally:
            self.running -= 1

    async def _answer_verb(self, verb: str, request: web.Request, key: str, body: bytes) -> web.StreamResponse:
        if verb in self.silent:
            await self._closing.wait()
        if self.pause:
            await asyncio.sleep(self.pause)
        if verb in self.refusing:
            return _error(403, "AccessDenied", "this is not allowed")
        if verb in self.failing:
            return _error(500, "InternalError", "We encountered an internal error. Please try again.")
        response: web.Response = getattr(self, f"_{verb.lower()}")(request, key, body)
        if verb == "GET" and self.drips:
            return await self._drip(request, response)
        return response

    def _put(self, request: web.Request, key: str, body: bytes) -> web.Response:
        self._store(key, body)
        return web.Response(headers={"ETag": _tag(body)})

    def _store(self, key: str, body: bytes) -> None:
        is_archive = not key.endswith(".json")
        self.objects[key] = self.damage(body) if self.damage is not None and is_archive else body

    def _create(self, request: web.Request, key: str, body: bytes) -> web.Response:
        upload = f"upload-{next(self._numbers)}"
        self._uploads[upload] = {}
        return _xml(
            f"<InitiateMultipartUploadResult><Bucket>{self.bucket}</Bucket><Key>{escape(key)}</Key>"
            f"<UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
        )

    def _part(self, request: web.Request, key: str, body: bytes) -> web.Response:
        self._uploads[request.query["uploadId"]][int(request.query["partNumber"])] = body
        return web.Response(headers={"ETag": _tag(body)})

    def _complete(self, request: web.Request, key: str, body: bytes) -> web.Response:
        parts = self._uploads.pop(request.query["uploadId"])
        content = b"".join(parts[number] for number in sorted(parts))
        self._store(key, content)
        return _xml(
            f"<CompleteMultipartUploadResult><Key>{escape(key)}</Key><ETag>{escape(_tag(content))}</ETag>"
            "</CompleteMultipartUploadResult>"
        )

    def _abort(self, request: web.Request, key: str, body: bytes) -> web.Response:
        self._uploads.pop(request.query["uploadId"], None)
        return web.Response(status=204)

    async def _drip(self, request: web.Request, response: web.Response) -> web.StreamResponse:
        """Send a body in `drips` chunks with pauses between them."""
        slow = web.StreamResponse(status=response.status, headers=response.headers)
        content = response.body
        assert isinstance(content, bytes)
        slow.content_length = len(content)
        await slow.prepare(request)
        step = len(content) // self.drips + 1
        for start in range(0, len(content), step):
            await slow.write(content[start : start + step])
            await asyncio.sleep(0.2)
        return slow

    def _get(self, request: web.Request, key: str, body: bytes) -> web.Response:
        content = self.objects.get(key)
        if content is None:
            return _error(404, "NoSuchKey", "The specified key does not exist.")
        headers = {"ETag": _tag(content), "Last-Modified": formatdate(0, usegmt=True), "Accept-Ranges": "bytes"}
        range_ = request.http_range
        if range_.start is None and range_.stop is None:
            return web.Response(body=content, headers=headers)
        start, stop, _ = range_.indices(len(content))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return web.Response(status=206, body=content[start:stop], headers=headers)

    def _head(self, request: web.Request, key: str, body: bytes) -> web.Response:
        found = self._get(request, key, body)
        if found.status != 200:
            return found
        return web.Response(headers={**found.headers, "Content-Length": str(len(self.objects[key]))})

    def _list(self, request: web.Request, key: str, body: bytes) -> web.Response:
        prefix, after = request.query.get("prefix", ""), request.query.get("continuation-token", "")
        keys = sorted(key for key in self.objects if key.startswith(prefix) and key > after)
        if delimiter := request.query.get("delimiter"):  # what is below a directory is left out
            keys = [key for key in keys if delimiter not in key.removeprefix(prefix)]
        page, more = keys[:PAGE], len(keys) > PAGE
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(_tag(self.objects[key]))}</ETag><Size>{len(self.objects[key])}</Size></Contents>"
            for key in page
        )
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        return _xml(
            f"<ListBucketResult><Name>{self.bucket}</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<KeyCount>{len(page)}</KeyCount><MaxKeys>{PAGE}</MaxKeys><IsTruncated>{str(more).lower()}</IsTruncated>"
            f"{token}{rows}</ListBucketResult>"
        )

    def _delete(self, request: web.Request, key: str, body: bytes) -> web.Response:
        keys = [unescape(found) for found in re.findall(r"<Key>(.*?)</Key>", body.decode())]
        for one in keys:
            self.objects.pop(one, None)
        deleted = "".join(f"<Deleted><Key>{escape(one)}</Key></Deleted>" for one in keys)
        return _xml(f"<DeleteResult>{deleted}</DeleteResult>")


def _verb(request: web.Request) -> str:
    if "list-type" in request.query:
        return "LIST"
    if "uploadId" in request.query:
        return {"PUT": "PART", "POST": "COMPLETE", "DELETE": "ABORT"}[request.method]
    if "delete" in request.query:  # several at once
        return "DELETE"
    if "uploads" in request.query:
        return "CREATE"
    return request.method


def _tag(content: bytes) -> str:
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


def _xml(content: str, status: int = 200) -> web.Response:
    return web.Response(status=status, text=_HEAD + content, content_type="application/xml")


def _error(status: int, code: str, message: str) -> web.Response:
    return _xml(f"<Error><Code>{code}</Code><Message>{message}</Message></Error>", status)
