"""Documents: typed settings and small stores for cogs, per guild or global, without a table of their own."""

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

from utils.documents.codec import Codec, InvalidDocument
from utils.exceptions import DatabaseUnavailable, DocumentConflict, DocumentError

_log = logging.getLogger(__name__)

T = TypeVar("T", bound=BaseModel)

#: How long `update` retries after version conflicts, and the longest pause between two attempts, in seconds.
UPDATE_SECONDS = 20.0
MAX_PAUSE_SECONDS = 0.2
#: Maximum length of a key, in characters, and what a namespace looks like; both are part of an index entry.
KEY_LENGTH = 255
NAMESPACE = re.compile(r"[A-Za-z0-9_.:-]{1,100}")
_UNSTORABLE_KEY = re.compile("[\x00\ud800-\udfff]")
#: How the keys of `user` and `member` begin.
_OF_USERS = "@user:"

# Values are passed as text both ways: no decoder changes a number, and readers cannot modify the cached value.
# `is_quarantined`: the value is known not to fit the model. A document's first version is the time in microseconds, so
# a document that is deleted and created again never gets a version it had before.
_GET = """
SELECT value::text AS value, version, (quarantined IS NOT NULL AND quarantined = value) AS is_quarantined
FROM documents
WHERE guild_id = $1 AND namespace = $2 AND key = $3
"""
_LIST = """
SELECT key, value::text AS value, version, (quarantined IS NOT NULL AND quarantined = value) AS is_quarantined
FROM documents
WHERE guild_id = $1 AND namespace = $2 AND key >= $3 AND key < $4 AND key > $5
    AND ($7 OR NOT starts_with(key, '@user:'))
ORDER BY key LIMIT $6
"""
_COUNT = """
SELECT count(*) FROM documents
WHERE guild_id = $1 AND namespace = $2 AND key >= $3 AND key < $4 AND ($5 OR NOT starts_with(key, '@user:'))
"""
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
#: A write in a read-only transaction would fail and abort it.
_MAY_WRITE = "SELECT current_setting('transaction_read_only') = 'off'"


class Queries(Protocol):
    """The methods of `bot.db` that documents use."""

    async def fetch(self, sql: str, /, *args: Any) -> list[asyncpg.Record]:
        """Return all rows."""
        ...

    async def fetchrow(
        self, sql: str, /, *args: Any, use_cache: bool = True, stale_if_error: float | None = None
    ) -> asyncpg.Record | None:
        """Return the first row, or None if there is none."""
        ...

    async def fetchval(self, sql: str, /, *args: Any, use_cache: bool = True) -> Any:
        """Return the first column of the first row, or None if there is none."""
        ...

    def forget(self, sql: str, /, *args: Any) -> None:
        """Drop what `stale_if_error` has kept of a query."""
        ...


class Identified(Protocol):
    """What has an id, such as discord.py's guilds, users and members."""

    @property
    def id(self) -> int:
        """The snowflake."""
        ...


class Documents(Generic[T]):
    """The documents of one namespace: values of a pydantic model, stored under (guild id, key).

    Say whose documents they are: `guild(id)`, `user(id)`, `member(guild_id, user_id)` or `everywhere()` return the same
    documents for one scope, each with keys of its own, and every call may name a guild, `guild_id=0` for none. A call
    that says neither raises `DocumentError`; None, as in a direct message, never means everywhere.

    Keys are strings or ids. Values are read through the query cache and are fresh instances: changing one has no effect
    until you `set` it. PostgreSQL does not preserve the order of dictionaries.

    If a stored value no longer fits the model, the invalid parts are removed, so that their defaults apply. If that is
    not possible, the document counts as absent. Either way the row keeps the original in `quarantined`, and a warning
    is logged once.

    Example::

        class Shop(BaseModel):
            title: str = "Shop"

        shops = Documents(bot.db, "shop", Shop)
        await shops.guild(guild).update("settings", title="Bakery")
        shop = await shops.get("settings", guild.id)

    Every method raises `DocumentError` for an invalid key, and whatever `bot.db` raises.
    """

    def __init__(
        self,
        db: Queries,
        namespace: str,
        model: type[T],
        *,
        guild_id: int | None = None,
        stale_if_error: float | None = None,
    ) -> None:
        """
        guild_id: for calls that name none; 0: no guild; None: every call must name one.
        stale_if_error: while the database is unavailable, or does not answer within 1.5 s, `get` and `find` return what
            this process last read, if it is at most so many seconds old. A document that this process has written since
            is not returned. None: the error is raised.
        """
        if not NAMESPACE.fullmatch(namespace):
            raise DocumentError(f"invalid namespace {namespace!r}: use 1 to 100 letters, digits and _ . : -")
        self.db: Queries = db
        self.namespace: str = namespace
        self.model: type[T] = model
        self.guild_id: int | None = guild_id
        self.stale_if_error: float | None = stale_if_error
        #: What the keys begin with in the table.
        self._scope: str = ""
        self._codec: Codec[T] = Codec(model)

    def __repr__(self) -> str:
        scope = f" {self._scope}" if self._scope else ""
        return f"<Documents {self.namespace} of {self.model.__name__} guild_id={self.guild_id}{scope}>"

    def guild(self, guild: int | Identified) -> Documents[T]:
        """Return the documents of a guild, given by its id or as an object."""
        return self._scoped(_id_of(guild, "guild"))

    def user(self, user: int | Identified) -> Documents[T]:
        """Return the documents of a user, which are the same in every guild."""
        return self._scoped(0, _id_of(user, "user"))

    def member(self, guild: int | Identified, user: int | Identified) -> Documents[T]:
        """Return the documents of a user in one guild."""
        return self._scoped(_id_of(guild, "guild"), _id_of(user, "user"))

    def everywhere(self) -> Documents[T]:
        """Return the documents that belong to no guild and to no user."""
        return self._scoped(0)

    def _scoped(self, guild_id: int, user_id: int | None = None) -> Documents[T]:
        scoped = Documents(self.db, self.namespace, self.model, guild_id=guild_id, stale_if_error=self.stale_if_error)
        scoped._scope = "" if user_id is None else f"{_OF_USERS}{user_id}/"
        return scoped

    async def get(self, key: str | int, guild_id: int | None = None) -> T:
        """Return a document, or the model's defaults if there is none.

        Raises `DocumentError` if there is none and the model has a field without a default.
        """
        row_key = self._row_key(key, guild_id)
        found, _ = await self._read(row_key)
        return found if found is not None else self._default(row_key)

    async def find(self, key: str | int, guild_id: int | None = None) -> T | None:
        """Return a document, or None if there is none."""
        return (await self._read(self._row_key(key, guild_id)))[0]

    async def version(self, key: str | int, guild_id: int | None = None) -> int:
        """Return a document's current version, to pass to `set`; 0 if there is none. Bypasses the cache."""
        row = await self.db.fetchrow(_GET, *self._row_key(key, guild_id), use_cache=False)
        return 0 if row is None else int(row["version"])

    async def set(self, key: str | int, value: T, guild_id: int | None = None, *, version: int | None = None) -> int:
        """Store a document and return its new version.

        With `version`, write only if the document still has that version (0: only if there is none), and raise
        `DocumentConflict` otherwise; None writes unconditionally. Raises `DocumentError` for a value that does not fit
        the model or cannot be stored.
        """
        row_key, text = self._row_key(key, guild_id), self._text(key, value)
        written: int | None
        if version is None:
            written = await self.db.fetchval(_SET, *row_key, text)
            self.db.forget(_GET, *row_key)
        else:
            written = await self._write(row_key, text, version)
        if written is None:
            raise DocumentConflict(f"{self._describe(row_key)} no longer has version {version}: read it again")
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
        """Change a document (or the model's defaults if there is none) and return the stored value.

        `change` gets the current value and returns the new one, or modifies it and returns None. It is called again
        if another writer was faster, so it must have no side effects; if it raises, nothing is written. `fields` are
        set after it. No concurrent update is lost: raises `DocumentConflict` after 20 s of version conflicts, and
        `DocumentError` for unknown fields and values that cannot be stored.
        """
        unknown = sorted(fields.keys() - self.model.model_fields)
        if unknown:
            raise DocumentError(f"{self.model.__name__} has no field {', '.join(unknown)}")
        row_key = self._row_key(key, guild_id)
        # Not stamina, which logs each retry: version conflicts are ordinary and resolved within milliseconds.
        deadline, attempts = time.monotonic() + UPDATE_SECONDS, 0
        while True:
            found, version = await self._read(row_key, use_cache=False)
            value = found if found is not None else self._default(row_key)
            if change is not None:
                changed = change(value)
                value = value if changed is None else changed
            if fields:
                value = value.model_copy(update=fields)
            text = self._text(key, value)
            if await self._write(row_key, text, version) is not None:
                return self._codec.decode(text)
            attempts += 1
            if time.monotonic() > deadline:
                raise DocumentConflict(
                    f"{self._describe(row_key)} was changed by other writers {attempts} times in a row: try again later"
                )
            await asyncio.sleep(random.uniform(0, min(MAX_PAUSE_SECONDS, 0.002 * 2 ** min(attempts, 10))))

    async def delete(self, key: str | int, guild_id: int | None = None) -> bool:
        """Delete a document and return whether there was one."""
        row_key = self._row_key(key, guild_id)
        deleted = await self.db.fetchval(_DELETE, *row_key)
        self.db.forget(_GET, *row_key)
        return deleted is not None

    async def count(self, guild_id: int | None = None) -> int:
        """Return the number of documents, including those that no longer fit the model."""
        count: int = await self.db.fetchval(
            _COUNT, self._guild(guild_id), self.namespace, self._scope, _prefix_end(self._scope), bool(self._scope)
        )
        return count

    async def list(
        self, prefix: str = "", after: str | int | None = None, limit: int = 100, guild_id: int | None = None
    ) -> builtins.list[tuple[str, T]]:
        """Return up to `limit` (key, value) pairs whose keys start with `prefix`, ordered by key (by code points).

        `after` is the last key of the previous page, None for the first page. Documents that count as absent are
        omitted; fewer than `limit` pairs mean that this is the last page.
        """
        guild, position = self._guild(guild_id), "" if after is None else f"{self._scope}{after}"
        prefix = self._scope + prefix
        page: builtins.list[tuple[str, T]] = []
        while len(page) < limit:
            missing = limit - len(page)
            rows = await self.db.fetch(
                _LIST, guild, self.namespace, prefix, _prefix_end(prefix), position, missing, bool(self._scope)
            )
            for row in rows:
                position = row["key"]
                value, _ = await self._decode((guild, self.namespace, position), row)
                if value is not None:
                    page.append((position[len(self._scope) :], value))
            if len(rows) < missing:
                break
        return page

    def _guild(self, guild_id: int | None) -> int:
        if guild_id is not None and self._scope:
            raise DocumentError(f"{self!r} are of a user: name the guild with member(guild_id, user_id)")
        found = self.guild_id if guild_id is None else guild_id
        if found is None:
            raise DocumentError(
                f"whose document of {self.namespace}? Use guild(id), user(id), member(guild_id, user_id) or"
                " everywhere(), or name guild_id; it is None in direct messages, which guild_only() excludes"
            )
        return found

    def _row_key(self, key: str | int, guild_id: int | None) -> tuple[int, str, str]:
        text = f"{self._scope}{key}"
        if not self._scope and text.startswith(_OF_USERS):
            raise DocumentError(f"invalid key {text[:50]!r}: use user(id) or member(guild_id, user_id)")
        if not 0 < len(text) <= KEY_LENGTH or _UNSTORABLE_KEY.search(text):
            raise DocumentError(
                f"invalid key {text[:50]!r}: use 1 to {KEY_LENGTH} characters without NUL and lone surrogates"
            )
        return self._guild(guild_id), self.namespace, text

    def _describe(self, row_key: tuple[int, str, str]) -> str:
        return f"document {row_key[2][:50]!r} of {self.namespace}" + (f" in guild {row_key[0]}" if row_key[0] else "")

    def _default(self, row_key: tuple[int, str, str]) -> T:
        try:
            return self._codec.default()
        except InvalidDocument as exc:
            raise DocumentError(
                f"there is no {self._describe(row_key)}, and {self.model.__name__} has no default ({exc}):"
                " set it first, or use find()"
            ) from exc

    def _text(self, key: str | int, value: T) -> str:
        try:
            return self._codec.encode(value)
        except InvalidDocument as exc:
            raise DocumentError(f"document {str(key)[:50]!r} of {self.namespace} cannot be stored: {exc}") from exc

    async def _write(self, row_key: tuple[int, str, str], text: str, version: int) -> int | None:
        """Write if the document has this version (0: does not exist) and return the new version, otherwise None."""
        written: int | None
        if version == 0:
            written = await self.db.fetchval(_INSERT, *row_key, text)
        else:
            written = await self.db.fetchval(_REPLACE, *row_key, text, version)
        self.db.forget(_GET, *row_key)
        return written

    async def _read(self, row_key: tuple[int, str, str], *, use_cache: bool = True) -> tuple[T | None, int]:
        """Return a document (None if it does not fit the model) and its version; (None, 0) if there is none."""
        # `use_cache=False` is for writers, who must not see an old value.
        stale = self.stale_if_error if use_cache else None
        row = await self.db.fetchrow(_GET, *row_key, use_cache=use_cache, stale_if_error=stale)
        return (None, 0) if row is None else await self._decode(row_key, row)

    async def _decode(self, row_key: tuple[int, str, str], row: asyncpg.Record) -> tuple[T | None, int]:
        """Return a row's value, repaired if necessary and possible, else None, and its version. Keeps the original."""
        text, version = row["value"], int(row["version"])
        try:
            return self._codec.decode(text), version
        except InvalidDocument as exc:
            problem = str(exc)
        if row["is_quarantined"]:
            return None, version
        repaired = self._codec.repair(text)
        written: int | None = None
        try:
            if await self.db.fetchval(_MAY_WRITE, use_cache=False):
                if repaired is None:
                    written = await self.db.fetchval(_QUARANTINE, *row_key, version, problem)
                else:
                    written = await self.db.fetchval(_REPAIR, *row_key, repaired[0], version, problem)
        except DatabaseUnavailable:
            if self.stale_if_error is None:
                raise  # otherwise the row may be an old one: whoever reads it after the outage keeps the original
        if written is not None:
            _log.warning(
                "%s no longer fits %s and %s: %s", self._describe(row_key), self.model.__name__,
                "counts as absent" if repaired is None else "was repaired", problem,
                extra={"guild_id": row_key[0], "namespace": row_key[1], "key": row_key[2]},
            )  # fmt: skip
        return None if repaired is None else repaired[1], written or version


def _id_of(thing: int | Identified, what: str) -> int:
    id = thing if isinstance(thing, int) else getattr(thing, "id", None)
    if not isinstance(id, int) or id <= 0:
        raise DocumentError(f"{what}: {thing!r} is no id; everywhere() is for documents of no guild and no user")
    return id


def _prefix_end(prefix: str) -> str:
    """Return the smallest string that sorts after every key with this prefix."""
    for length in range(len(prefix), 0, -1):
        last = ord(prefix[length - 1])
        if last < 0x10FFFF:
            return prefix[: length - 1] + ("\ue000" if last == 0xD7FF else chr(last + 1))
    return "\U0010ffff" * (KEY_LENGTH + 1)
