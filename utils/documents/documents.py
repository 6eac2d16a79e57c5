"""Documents: typed settings and small stores for cogs, per guild, per user or for all, without a table of their own."""

from __future__ import annotations

import asyncio
import builtins
import logging
import random
import re
import time
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import asyncpg
from pydantic import BaseModel

from utils.documents.codec import Codec, Misfit
from utils.exceptions import DocumentConflict, DocumentError

_log = logging.getLogger(__name__)

T = TypeVar("T", bound=BaseModel)

#: Seconds that `update` tries again while others change the same document, and the longest pause between two tries.
UPDATE_SECONDS = 20.0
PAUSE_SECONDS = 0.2
#: Characters of a key and of a namespace; both are part of an index entry.
KEY_LENGTH = 255
NAMESPACE = re.compile(r"[A-Za-z0-9_.:-]{1,100}")
_UNSTORABLE_KEY = re.compile("[\x00\ud800-\udfff]")

# Values go as text both ways: so no number is bent on its way through a decoder, and what the cache keeps cannot be
# changed by its readers. `is_marked`: that it does not fit is known and written down. A version begins with the time in
# microseconds: a document that is deleted and made anew never has one that it had before.
_GET = """
SELECT value::text AS value, version, (quarantined IS NOT NULL AND quarantined = value) AS is_marked FROM documents
WHERE guild_id = $1 AND namespace = $2 AND key = $3
"""
_LIST = """
SELECT key, value::text AS value, version, (quarantined IS NOT NULL AND quarantined = value) AS is_marked FROM documents
WHERE guild_id = $1 AND namespace = $2 AND key >= $3 AND key < $4 AND key > $5 ORDER BY key LIMIT $6
"""
_COUNT = "SELECT count(*) FROM documents WHERE guild_id = $1 AND namespace = $2"
_SET = """
INSERT INTO documents AS d (guild_id, namespace, key, value, version, updated_at)
VALUES ($1, $2, $3, $4::text::jsonb, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, now())
ON CONFLICT (guild_id, namespace, key)
DO UPDATE SET value = excluded.value, version = d.version + 1, updated_at = excluded.updated_at
RETURNING version
"""
_INSERT = """
INSERT INTO documents (guild_id, namespace, key, value, version)
VALUES ($1, $2, $3, $4::text::jsonb, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint)
ON CONFLICT (guild_id, namespace, key) DO NOTHING RETURNING version
"""
_REPLACE = """
UPDATE documents SET value = $4::text::jsonb, version = version + 1, updated_at = now()
WHERE guild_id = $1 AND namespace = $2 AND key = $3 AND version = $5 RETURNING version
"""
_DELETE = "DELETE FROM documents WHERE guild_id = $1 AND namespace = $2 AND key = $3 RETURNING version"
_REPAIR = """
UPDATE documents
SET quarantined = value, value = $4::text::jsonb, version = version + 1, updated_at = now(), problem = $6
WHERE guild_id = $1 AND namespace = $2 AND key = $3 AND version = $5 RETURNING version
"""
_QUARANTINE = """
UPDATE documents SET quarantined = value, problem = $5
WHERE guild_id = $1 AND namespace = $2 AND key = $3 AND version = $4 RETURNING version
"""
#: Inside a transaction that only reads, writing would end it.
_MAY_WRITE = "SELECT current_setting('transaction_read_only') = 'off'"


class Verbs(Protocol):
    """What documents need of `bot.db`."""

    async def fetch(self, sql: str, /, *args: Any) -> list[asyncpg.Record]:
        """Return all rows."""
        ...

    async def fetchrow(self, sql: str, /, *args: Any, use_cache: bool = True) -> asyncpg.Record | None:
        """Return the first row, or None when there is none."""
        ...

    async def fetchval(self, sql: str, /, *args: Any, use_cache: bool = True) -> Any:
        """Return the first column of the first row, or None when there is none."""
        ...


class Documents(Generic[T]):
    """The documents of one namespace, each a `model`, of the guild `guild_id` unless a call names another one.

    A guild id of 0 stands for no guild; keys are text or ids. Values are read through the query cache and are fresh
    instances: changing one changes nothing until it is `set`. Dictionaries in them come back in an order of
    PostgreSQL's. A value that does not fit the model any more loses the
    parts that do not fit, so that their defaults apply, or counts as absent where that does not help; the row keeps
    what it was (`quarantined`), and the log says so once.

    Every method raises `DocumentError` for a key that cannot be one, and what `bot.db` raises.
    """

    def __init__(self, db: Verbs, namespace: str, model: type[T], *, guild_id: int = 0) -> None:
        if not NAMESPACE.fullmatch(namespace):
            raise DocumentError(f"{namespace!r} is no namespace: up to 100 letters, digits and any of _ . : -")
        self.db: Verbs = db
        self.namespace: str = namespace
        self.model: type[T] = model
        self.guild_id: int = guild_id
        self._codec: Codec[T] = Codec(model)

    def __repr__(self) -> str:
        return f"<Documents {self.namespace} of {self.model.__name__} guild_id={self.guild_id}>"

    def for_guild(self, guild_id: int) -> Documents[T]:
        """Return the same documents, of another guild."""
        return Documents(self.db, self.namespace, self.model, guild_id=guild_id)

    async def get(self, key: str | int, guild_id: int | None = None) -> T:
        """Return a document, or the model's defaults when there is none.

        Raises `DocumentError` when there is none and the model has fields without a default.
        """
        place = self._place(key, guild_id)
        found, _ = await self._read(place)
        return found if found is not None else self._default(place)

    async def find(self, key: str | int, guild_id: int | None = None) -> T | None:
        """Return a document, or None when there is none."""
        return (await self._read(self._place(key, guild_id)))[0]

    async def version(self, key: str | int, guild_id: int | None = None) -> int:
        """Return the present version of a document, for `set`; 0 when there is none. Never from the cache."""
        row = await self.db.fetchrow(_GET, *self._place(key, guild_id), use_cache=False)
        return 0 if row is None else int(row["version"])

    async def set(self, key: str | int, value: T, guild_id: int | None = None, *, version: int | None = None) -> int:
        """Store a document and return its new version.

        `version`: write only if the document still has this one (0: only if there is none), else raise
        `DocumentConflict`; None: whatever is there. Raises `DocumentError` for what the model or the store refuses.
        """
        place, text = self._place(key, guild_id), self._text(key, value)
        written: int | None
        if version is None:
            written = await self.db.fetchval(_SET, *place, text)
        else:
            written = await self._write(place, text, version)
        if written is None:
            raise DocumentConflict(f"{self._named(place)} is not at version {version} any more: read it again")
        return written

    async def update(
        self,
        key: str | int,
        change: Callable[[T], T | None] | None = None,
        /,
        *,
        guild_id: int | None = None,
        **fields: Any,
    ) -> T:
        """Change a document, or the model's defaults when there is none, without losing what others do meanwhile.

        `change` gets the present value and returns the new one, or None when it changed what it got; it is called
        again when somebody else was faster, so it may do nothing else. What it raises leaves all as it was. `fields`
        are set after it. Returns what was stored. Raises `DocumentConflict` when others are faster for 20 s.
        """
        unknown = sorted(fields.keys() - self.model.model_fields)
        if unknown:
            raise DocumentError(f"{self.model.__name__} has no field {', '.join(unknown)}")
        place = self._place(key, guild_id)
        until, tries = time.monotonic() + UPDATE_SECONDS, 0
        while True:
            found, version = await self._read(place, use_cache=False)
            value = found if found is not None else self._default(place)
            if change is not None:
                changed = change(value)
                value = value if changed is None else changed
            if fields:
                value = value.model_copy(update=fields)
            text = self._text(key, value)
            if await self._write(place, text, version) is not None:
                return self._codec.decode(text)
            tries += 1
            if time.monotonic() > until:
                raise DocumentConflict(f"{self._named(place)} was changed by others {tries} times in a row: try later")
            await asyncio.sleep(random.uniform(0, min(PAUSE_SECONDS, 0.002 * 2 ** min(tries, 10))))

    async def delete(self, key: str | int, guild_id: int | None = None) -> bool:
        """Delete a document, and tell whether there was one."""
        return await self.db.fetchval(_DELETE, *self._place(key, guild_id)) is not None

    async def count(self, guild_id: int | None = None) -> int:
        """Return how many documents there are."""
        count: int = await self.db.fetchval(_COUNT, self._guild(guild_id), self.namespace)
        return count

    async def list(
        self, prefix: str = "", after: str | int | None = None, limit: int = 100, guild_id: int | None = None
    ) -> builtins.list[tuple[str, T]]:
        """Return up to `limit` documents whose keys begin with `prefix`, ordered by key (as text, by code points).

        `after`: only those behind this key, the last of the page before; None: from the start. Documents that count
        as absent are left out; fewer than `limit` means that there are no more.
        """
        guild, position = self._guild(guild_id), "" if after is None else str(after)
        page: builtins.list[tuple[str, T]] = []
        while len(page) < limit:
            wanted = limit - len(page)
            rows = await self.db.fetch(_LIST, guild, self.namespace, prefix, _end_of(prefix), position, wanted)
            for row in rows:
                position = row["key"]
                value, _ = await self._fitting((guild, self.namespace, position), row)
                if value is not None:
                    page.append((position, value))
            if len(rows) < wanted:
                break
        return page

    def _guild(self, guild_id: int | None) -> int:
        return self.guild_id if guild_id is None else guild_id

    def _place(self, key: str | int, guild_id: int | None) -> tuple[int, str, str]:
        text = str(key)
        if not 0 < len(text) <= KEY_LENGTH or _UNSTORABLE_KEY.search(text):
            raise DocumentError(
                f"{text[:50]!r} cannot be a key: 1 to {KEY_LENGTH} characters, without NUL and lone surrogates"
            )
        return self._guild(guild_id), self.namespace, text

    def _named(self, place: tuple[int, str, str]) -> str:
        return f"document {place[2][:50]!r} of {self.namespace}" + (f" in guild {place[0]}" if place[0] else "")

    def _default(self, place: tuple[int, str, str]) -> T:
        try:
            return self._codec.default()
        except Misfit as exc:
            raise DocumentError(
                f"there is no {self._named(place)}, and {self.model.__name__} has no default ({exc}): set it first, or"
                " ask with find()"
            ) from exc

    def _text(self, key: str | int, value: T) -> str:
        try:
            return self._codec.encode(value)
        except Misfit as exc:
            raise DocumentError(f"document {str(key)[:50]!r} of {self.namespace} cannot be stored: {exc}") from exc

    async def _write(self, place: tuple[int, str, str], text: str, version: int) -> int | None:
        """Write if the document is at a version (0: not there), and return the next one; None when it is not."""
        written: int | None
        if version == 0:
            written = await self.db.fetchval(_INSERT, *place, text)
        else:
            written = await self.db.fetchval(_REPLACE, *place, text, version)
        return written

    async def _read(self, place: tuple[int, str, str], *, use_cache: bool = True) -> tuple[T | None, int]:
        """Return a document and its version; None for one that does not fit, None and 0 when there is none."""
        row = await self.db.fetchrow(_GET, *place, use_cache=use_cache)
        return (None, 0) if row is None else await self._fitting(place, row)

    async def _fitting(self, place: tuple[int, str, str], row: asyncpg.Record) -> tuple[T | None, int]:
        """Return the value of a row and its version, repaired where it can be, else None; what did not fit is kept."""
        text, version = row["value"], int(row["version"])
        try:
            return self._codec.decode(text), version
        except Misfit as exc:
            problem = str(exc)
        if row["is_marked"]:
            return None, version
        repaired = self._codec.repair(text)
        written: int | None = None
        if await self.db.fetchval(_MAY_WRITE, use_cache=False):
            if repaired is None:
                written = await self.db.fetchval(_QUARANTINE, *place, version, problem)
            else:
                written = await self.db.fetchval(_REPAIR, *place, repaired[0], version, problem)
        if written is not None:
            _log.warning(
                "%s does not fit %s any more and %s: %s", self._named(place), self.model.__name__,
                "counts as absent" if repaired is None else "was repaired", problem,
                extra={"guild_id": place[0], "namespace": place[1], "key": place[2]},
            )  # fmt: skip
        return None if repaired is None else repaired[1], written or version


def _end_of(prefix: str) -> str:
    """Return the smallest text behind all keys with a prefix."""
    for length in range(len(prefix), 0, -1):
        last = ord(prefix[length - 1])
        if last < 0x10FFFF:
            return prefix[: length - 1] + ("\ue000" if last == 0xD7FF else chr(last + 1))
    return "\U0010ffff" * (KEY_LENGTH + 1)
