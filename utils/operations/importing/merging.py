"""Merges the staged rows of one file into `documents`, `member_stats` and `member_preferences`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

import orjson

from utils.database import Connection
from utils.database.cache.channel import announce
from utils.database.placement import placement_on
from utils.exceptions import DatabaseUnavailable, ValidationError
from utils.operations.importing.entries import COLUMNS, namespace_in

#: Timeout of a statement in seconds: enough for a million rows on a small host.
STATEMENT_SECONDS = 1_800.0
#: Key of the advisory lock that an import holds: two imports at once would block on each other's rows.
_LOCK = 4_715_001
_STAGING = """
CREATE TEMP TABLE import_entries (
    ordinal bigint NOT NULL, line bigint NOT NULL, guild_id bigint NOT NULL, key text COLLATE "C" NOT NULL,
    value jsonb NOT NULL, is_record boolean NOT NULL, user_id bigint, message_count bigint, last_active_at timestamptz,
    xp bigint, notifications boolean, language text
) ON COMMIT DROP;
CREATE TEMP TABLE import_documents (ordinal bigint NOT NULL, is_new boolean NOT NULL) ON COMMIT DROP;
CREATE TEMP TABLE import_stats (
    guild_id bigint NOT NULL, user_id bigint NOT NULL, message_count bigint NOT NULL, last_active_at timestamptz,
    xp bigint NOT NULL, is_new boolean NOT NULL
) ON COMMIT DROP;
CREATE TEMP TABLE import_preferences (
    guild_id bigint NOT NULL, user_id bigint NOT NULL, notifications boolean, language text, is_new boolean NOT NULL
) ON COMMIT DROP;
SET LOCAL work_mem = '64MB';
"""
#: The target tables may never have been analysed. The planner would assume that they are empty and use nested loops.
_NO_NESTED_LOOPS = "SET LOCAL enable_nestloop = off"

_ANALYZE = "ANALYZE import_entries"
# Elements of an array that have the same key are different records, such as the warnings of a member. Equal ones are
# duplicates.
_NUMBER_RECORDS = """
WITH first AS (
    SELECT e.guild_id, e.key, e.value, min(e.ordinal) AS ordinal FROM import_entries AS e
    JOIN (
        SELECT guild_id, key FROM import_entries WHERE is_record GROUP BY guild_id, key HAVING count(*) > 1
    ) AS t USING (guild_id, key)
    WHERE e.is_record GROUP BY e.guild_id, e.key, e.value
), numbered AS (
    SELECT *, row_number() OVER (PARTITION BY guild_id, key ORDER BY ordinal) AS number FROM first
)
UPDATE import_entries AS e SET key = left(e.key, 240) || '#' || n.number FROM numbered AS n
WHERE n.number > 1 AND e.is_record AND e.guild_id = n.guild_id AND e.key = n.key AND e.value = n.value
"""
# A file does not say whether the ids in a guild are its members', channels' or roles'.
_CLEAR_OTHER_IDS = """
UPDATE import_entries AS e
SET user_id = NULL, message_count = NULL, last_active_at = NULL, xp = NULL, notifications = NULL, language = NULL
FROM (
    SELECT guild_id, id FROM channels UNION SELECT guild_id, id FROM roles UNION SELECT guild_id, id FROM threads
) AS t
WHERE e.guild_id = t.guild_id AND e.user_id = t.id
"""
# Of entries with the same key, the last one is used, as JSON parsers do.
_REPLACED = """
SELECT e.ordinal, e.line, e.key, e.value <> l.value AS is_lost,
    CASE WHEN e.value <> l.value THEN e.value::text END AS text
FROM import_entries AS e
JOIN (
    SELECT guild_id, key, max(ordinal) AS last FROM import_entries GROUP BY guild_id, key HAVING count(*) > 1
) AS t ON e.guild_id = t.guild_id AND e.key = t.key AND e.ordinal < t.last
JOIN import_entries AS l ON l.ordinal = t.last
"""
_DROP_REPLACED = """
DELETE FROM import_entries AS e
USING (
    SELECT guild_id, key, max(ordinal) AS last FROM import_entries GROUP BY guild_id, key HAVING count(*) > 1
) AS t
WHERE e.guild_id = t.guild_id AND e.key = t.key AND e.ordinal < t.last
"""
_DROP_SUPPRESSED = """
WITH deleted AS (
    DELETE FROM import_entries AS e USING ops.suppressions AS s WHERE s.user_id = e.user_id RETURNING e.ordinal
)
SELECT count(*) FROM deleted
"""
_CHANGED_DOCUMENTS = """
INSERT INTO import_documents
SELECT e.ordinal, d.key IS NULL FROM import_entries AS e
LEFT JOIN documents AS d ON d.guild_id = e.guild_id AND d.namespace = $1 AND d.key = e.key
WHERE d.key IS NULL OR d.value <> e.value
"""
# Keep the greater value, so that messages counted by the bot are not lost.
_CHANGED_STATS = """
INSERT INTO import_stats
SELECT e.guild_id, e.user_id, e.message_count, e.last_active_at, e.xp, t.guild_id IS NULL
FROM (
    SELECT guild_id, user_id, coalesce(max(message_count), 0) AS message_count, max(last_active_at) AS last_active_at,
        coalesce(max(xp), 0) AS xp
    FROM import_entries
    WHERE user_id IS NOT NULL AND (message_count IS NOT NULL OR last_active_at IS NOT NULL OR xp IS NOT NULL)
    GROUP BY guild_id, user_id
) AS e
LEFT JOIN member_stats AS t ON t.guild_id = e.guild_id AND t.user_id = e.user_id
WHERE t.guild_id IS NULL OR t.message_count < e.message_count OR t.xp < e.xp
    OR greatest(t.last_active_at, e.last_active_at) IS DISTINCT FROM t.last_active_at
"""
# A member's own choice takes precedence: only preferences they did not choose are set.
_CHANGED_PREFERENCES = """
INSERT INTO import_preferences
SELECT e.guild_id, e.user_id, e.notifications, e.language, t.guild_id IS NULL
FROM (
    SELECT DISTINCT ON (guild_id, user_id) guild_id, user_id, notifications, language
    FROM import_entries WHERE user_id IS NOT NULL AND (notifications IS NOT NULL OR language IS NOT NULL)
    ORDER BY guild_id, user_id, ordinal DESC
) AS e
LEFT JOIN member_preferences AS t ON t.guild_id = e.guild_id AND t.user_id = e.user_id
WHERE t.guild_id IS NULL OR (t.notifications IS NULL AND e.notifications IS NOT NULL)
    OR (t.language IS NULL AND e.language IS NOT NULL)
"""
_COUNTS = """
SELECT (SELECT count(*) FROM import_entries),
    (SELECT count(*) FROM import_documents WHERE is_new), (SELECT count(*) FROM import_documents WHERE NOT is_new),
    (SELECT count(*) FROM import_stats WHERE is_new), (SELECT count(*) FROM import_stats WHERE NOT is_new),
    (SELECT count(*) FROM import_preferences WHERE is_new), (SELECT count(*) FROM import_preferences WHERE NOT is_new)
"""
_CLEAR = "TRUNCATE import_documents, import_stats, import_preferences"
# A first version is the time in microseconds, as in `utils.documents.documents`. Versions increase in the order of the
# file, so that an export can restore that order.
_WRITE_DOCUMENTS = """
INSERT INTO documents AS d (guild_id, namespace, key, value, version, updated_at)
SELECT e.guild_id, $1, e.key, e.value,
    (extract(epoch FROM statement_timestamp()) * 1000000)::bigint + e.ordinal, now()
FROM import_entries AS e JOIN import_documents AS c USING (ordinal) ORDER BY e.guild_id, e.key
ON CONFLICT (guild_id, namespace, key) DO UPDATE SET
    value = excluded.value, version = greatest(d.version + 1, excluded.version), updated_at = excluded.updated_at
WHERE d.value <> excluded.value
"""
_WRITE_STATS = """
INSERT INTO member_stats AS t (guild_id, user_id, message_count, last_active_at, xp)
SELECT guild_id, user_id, message_count, last_active_at, xp FROM import_stats ORDER BY guild_id, user_id
ON CONFLICT (guild_id, user_id) DO UPDATE SET
    message_count = greatest(t.message_count, excluded.message_count),
    last_active_at = greatest(t.last_active_at, excluded.last_active_at), xp = greatest(t.xp, excluded.xp)
"""
_WRITE_PREFERENCES = """
INSERT INTO member_preferences AS t (guild_id, user_id, notifications, language)
SELECT guild_id, user_id, notifications, language FROM import_preferences ORDER BY guild_id, user_id
ON CONFLICT (guild_id, user_id) DO UPDATE SET
    notifications = coalesce(t.notifications, excluded.notifications),
    language = coalesce(t.language, excluded.language)
"""
_RECORD_IMPORT = """
INSERT INTO documents (guild_id, namespace, key, value, version)
VALUES (0, $1, $2, $3::text::jsonb, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint)
ON CONFLICT (guild_id, namespace, key) DO NOTHING
"""
#: The record of one namespace ($2), and that of the namespace which a file ($3) was imported into under a name ($4).
_SOURCES = """
SELECT key, value::text AS value FROM documents
WHERE guild_id = 0 AND namespace = $1 AND starts_with(key, 'source:')
    AND (key = $2 OR (value ->> 'path' = $3 AND value ->> 'name' = $4))
"""
_RECORD_SOURCE = """
INSERT INTO documents AS d (guild_id, namespace, key, value, version)
VALUES (0, $1, $2, $3::text::jsonb, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint)
ON CONFLICT (guild_id, namespace, key) DO UPDATE SET
    value = excluded.value, version = greatest(d.version + 1, excluded.version), updated_at = now()
WHERE d.value <> excluded.value
"""
_ALREADY_IMPORTED = "SELECT key FROM documents WHERE guild_id = 0 AND namespace = $1 AND key = ANY($2)"
#: Namespace of the records of imported files; the originals are in namespaces that begin with `legacy.`.
RECORDS = "legacy"
#: Beginning of the keys there that say which file the entries of a namespace come from.
_SOURCE = "source:"
_WRITTEN = ("documents", "member_stats", "member_preferences")


@dataclass(frozen=True, slots=True)
class Counts:
    """Number of staged rows, and for each table of new and changed rows."""

    staged: int
    documents_new: int
    documents_changed: int
    stats_new: int
    stats_changed: int
    preferences_new: int
    preferences_changed: int

    @property
    def rows(self) -> int:
        """Number of new and changed rows in all tables."""
        return int(sum(asdict(self).values())) - self.staged


@dataclass(frozen=True, slots=True)
class Source:
    """Where a file comes from, and the namespace for its originals."""

    #: The file's absolute path, as `printable` writes it.
    path: str
    #: The namespace that its name alone says.
    name: str
    #: The namespace that was chosen for it, of a run with other files of its name another one.
    namespace: str
    #: Whether an operator named that.
    is_chosen: bool = False


class Merge:
    """Merges one file, inside a transaction that the caller commits."""

    def __init__(self, connection: Connection, namespace: str = "") -> None:
        self._connection = connection
        #: Where the originals are stored.
        self.namespace: str = namespace

    async def enter(self, source: Source, sha256: str) -> None:
        """Choose the namespace of a file: the one that it was imported into before, or that of its source.

        Raises `ValidationError` if the namespace has the entries of a file in another directory, unless an operator
        chose it.
        """
        self.namespace = source.namespace
        if source.is_chosen:
            return
        rows = await self._connection.fetch(_SOURCES, RECORDS, _source_key(source.namespace), source.path, source.name)
        records = {row["key"].removeprefix(_SOURCE): orjson.loads(row["value"]) for row in rows}
        known = [name for name, record in records.items() if record.get("path") == source.path]
        if known:
            self.namespace = source.namespace if source.namespace in known else min(known)
        elif (record := records.get(source.namespace)) is not None and record.get("sha256") != sha256:
            parent = PurePath(source.path).parent
            if PurePath(str(record.get("path"))).parent == parent:
                return  # in another format
            raise ValidationError(
                f"the namespace {source.namespace} has the entries of another file: import it from the command line"
                f" with --namespace {namespace_in(parent.name, source.name)} to keep both, or with --namespace"
                f" {source.namespace} to update those of {record.get('path')}"
            )

    async def record_source(self, source: Source, sha256: str) -> None:
        """Record that the namespace has the entries of this file."""
        record = {"path": source.path, "name": source.name, "sha256": sha256}
        await self._execute(_RECORD_SOURCE, RECORDS, _source_key(self.namespace), orjson.dumps(record).decode())

    async def begin(self) -> None:
        """Create the staging tables. Raises `DatabaseUnavailable` while another import is running."""
        if not await self._connection.fetchval(
            "SELECT pg_try_advisory_xact_lock($1)", placement_on(self._connection).lock_key(_LOCK)
        ):
            raise DatabaseUnavailable("another import is running on this database: wait until it ends")
        await self._connection.execute(_STAGING)
        await self._connection.execute(_NO_NESTED_LOOPS)

    async def stage(self, batches: AsyncIterator[bytes]) -> None:
        """Copy the rows into the staging table, and tell apart records with the same key."""
        await self._connection.copy_to_table(
            "import_entries", source=batches, columns=COLUMNS, format="text", timeout=STATEMENT_SECONDS
        )
        await self._execute(_ANALYZE)
        await self._execute(_NUMBER_RECORDS)
        await self._execute(_CLEAR_OTHER_IDS)

    async def drop_replaced(self) -> AsyncGenerator[Any, None]:
        """Delete all but the last entry of each key, after yielding them in the order of the file.

        They have `line`, `key`, `is_lost` (the last one's value is different) and, if so, their value as `text`.
        """
        async for row in self._connection.cursor(_REPLACED + "ORDER BY e.ordinal", timeout=STATEMENT_SECONDS):
            yield row
        await self._execute(_DROP_REPLACED)

    async def drop_suppressed(self) -> int:
        """Delete the entries of users in `ops.suppressions` and return how many there were."""
        deleted = await self._connection.fetchval(_DROP_SUPPRESSED, timeout=STATEMENT_SECONDS)
        return int(deleted)

    async def compare(self) -> Counts:
        """Find new and changed rows and count them."""
        await self._execute(_CLEAR)
        await self._execute(_CHANGED_DOCUMENTS, self.namespace)
        await self._execute(_CHANGED_STATS)
        await self._execute(_CHANGED_PREFERENCES)
        row = await self._connection.fetchrow(_COUNTS, timeout=STATEMENT_SECONDS)
        assert row is not None, "a SELECT without FROM has one row"
        return Counts(*row.values())

    async def write(self) -> None:
        """Write the rows that `compare` found."""
        await self._execute(_WRITE_DOCUMENTS, self.namespace)
        await self._execute(_WRITE_STATS)
        await self._execute(_WRITE_PREFERENCES)
        await announce(self._connection, _WRITTEN)

    async def record_import(self, sha256: str, about: dict[str, Any]) -> None:
        """Record that a file was imported."""
        await self._execute(_RECORD_IMPORT, RECORDS, record_key(sha256), orjson.dumps(about).decode())

    async def _execute(self, sql: str, *arguments: Any) -> None:
        await self._connection.execute(sql, *arguments, timeout=STATEMENT_SECONDS)


def _source_key(namespace: str) -> str:
    return f"{_SOURCE}{namespace}"


async def already_imported(pool: Any, digests: list[str]) -> set[str]:
    """Return which of these SHA-256 digests belong to files that were imported before."""
    keys = await pool.fetch(_ALREADY_IMPORTED, RECORDS, [record_key(digest) for digest in digests])
    return {row["key"].removeprefix("import:") for row in keys}


def record_key(sha256: str) -> str:
    """Return the key of the document that records the import of a file."""
    return f"import:{sha256}"
