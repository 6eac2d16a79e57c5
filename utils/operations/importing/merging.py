"""The staged rows of one file, merged into `documents`, `member_stats` and `member_preferences`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

import orjson

from utils.database import Connection
from utils.database.cache.channel import announce
from utils.exceptions import DatabaseError
from utils.operations.importing.entries import COLUMNS

#: Seconds that one statement may take: a million rows on a small host.
STATEMENT_SECONDS = 1_800.0
#: Held by an import until its end: two at once would wait for each other's rows. Chosen by us, like the others here.
_LOCK = 4_715_001
_STAGING = """
CREATE TEMP TABLE import_entries (
    ordinal bigint NOT NULL, line bigint NOT NULL, guild_id bigint NOT NULL, key text COLLATE "C" NOT NULL,
    value jsonb NOT NULL, user_id bigint, message_count bigint, last_active_at timestamptz, notifications boolean,
    language text
) ON COMMIT DROP;
CREATE TEMP TABLE import_documents (ordinal bigint NOT NULL, is_new boolean NOT NULL) ON COMMIT DROP;
CREATE TEMP TABLE import_stats (
    guild_id bigint NOT NULL, user_id bigint NOT NULL, message_count bigint NOT NULL, last_active_at timestamptz,
    is_new boolean NOT NULL
) ON COMMIT DROP;
CREATE TEMP TABLE import_preferences (
    guild_id bigint NOT NULL, user_id bigint NOT NULL, notifications boolean, language text, is_new boolean NOT NULL
) ON COMMIT DROP;
SET LOCAL work_mem = '64MB';
"""
#: A table that was never analysed looks empty, and the planner would look up a million rows one by one.
_NO_NESTED_LOOPS = "SET LOCAL enable_nestloop = off"

_ANALYZE = "ANALYZE import_entries"
# Of entries with the same key the last one counts, as every JSON parser has it.
_TWICE = """
WITH gone AS (
    DELETE FROM import_entries AS e
    USING (
        SELECT guild_id, key, max(ordinal) AS last FROM import_entries GROUP BY guild_id, key HAVING count(*) > 1
    ) AS t
    WHERE e.guild_id = t.guild_id AND e.key = t.key AND e.ordinal < t.last RETURNING e.key, e.line
)
SELECT key, line, count(*) OVER () AS total FROM gone ORDER BY line LIMIT 3
"""
_SUPPRESSED = """
WITH gone AS (
    DELETE FROM import_entries AS e USING ops.suppressions AS s WHERE s.user_id = e.user_id RETURNING e.ordinal
)
SELECT count(*) FROM gone
"""
_CHANGED_DOCUMENTS = """
INSERT INTO import_documents
SELECT e.ordinal, d.key IS NULL FROM import_entries AS e
LEFT JOIN documents AS d ON d.guild_id = e.guild_id AND d.namespace = $1 AND d.key = e.key
WHERE d.key IS NULL OR d.value <> e.value
"""
# What was counted since may not be lost: the greater one stays.
_CHANGED_STATS = """
INSERT INTO import_stats
SELECT e.guild_id, e.user_id, e.message_count, e.last_active_at, t.guild_id IS NULL
FROM (
    SELECT guild_id, user_id, coalesce(max(message_count), 0) AS message_count, max(last_active_at) AS last_active_at
    FROM import_entries WHERE user_id IS NOT NULL AND (message_count IS NOT NULL OR last_active_at IS NOT NULL)
    GROUP BY guild_id, user_id
) AS e
LEFT JOIN member_stats AS t ON t.guild_id = e.guild_id AND t.user_id = e.user_id
WHERE t.guild_id IS NULL OR t.message_count < e.message_count
    OR greatest(t.last_active_at, e.last_active_at) IS DISTINCT FROM t.last_active_at
"""
# What a member chose since wins: only what they did not choose is filled in.
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
_FORGET = "TRUNCATE import_documents, import_stats, import_preferences"
# A version begins with the time in microseconds, like those of `utils.documents.documents`; what an import adds has
# them in the order of the file, so that an export restores it.
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
INSERT INTO member_stats AS t (guild_id, user_id, message_count, last_active_at)
SELECT guild_id, user_id, message_count, last_active_at FROM import_stats ORDER BY guild_id, user_id
ON CONFLICT (guild_id, user_id) DO UPDATE SET
    message_count = greatest(t.message_count, excluded.message_count),
    last_active_at = greatest(t.last_active_at, excluded.last_active_at)
"""
_WRITE_PREFERENCES = """
INSERT INTO member_preferences AS t (guild_id, user_id, notifications, language)
SELECT guild_id, user_id, notifications, language FROM import_preferences ORDER BY guild_id, user_id
ON CONFLICT (guild_id, user_id) DO UPDATE SET
    notifications = coalesce(t.notifications, excluded.notifications),
    language = coalesce(t.language, excluded.language)
"""
_REMEMBER = """
INSERT INTO documents (guild_id, namespace, key, value, version)
VALUES (0, $1, $2, $3::text::jsonb, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint)
ON CONFLICT (guild_id, namespace, key) DO NOTHING
"""
_REMEMBERED = "SELECT key FROM documents WHERE guild_id = 0 AND namespace = $1 AND key = ANY($2)"
#: Where what was imported is remembered; the originals have namespaces that begin with `legacy.`.
MEMORY = "legacy"
#: As the query cache calls them.
_WRITTEN = ("public.documents", "public.member_stats", "public.member_preferences")


@dataclass(frozen=True, slots=True)
class Counts:
    """How many rows are staged, and how many of each table are new or change."""

    staged: int
    documents_new: int
    documents_changed: int
    stats_new: int
    stats_changed: int
    preferences_new: int
    preferences_changed: int

    @property
    def rows(self) -> int:
        """Rows that are new or change, of all tables."""
        return int(sum(asdict(self).values())) - self.staged


class Merge:
    """The import of one file, inside a transaction that the caller commits."""

    def __init__(self, connection: Connection, namespace: str) -> None:
        self._connection = connection
        self._namespace = namespace

    async def begin(self) -> None:
        """Make the staging tables. Raises `DatabaseError` while another import is under way."""
        if not await self._connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", _LOCK):
            raise DatabaseError("another import is under way on this database: wait until it has ended")
        await self._connection.execute(_STAGING)
        await self._connection.execute(_NO_NESTED_LOOPS)

    async def stage(self, batches: AsyncIterator[bytes]) -> None:
        """Take the rows in."""
        await self._connection.copy_to_table(
            "import_entries", source=batches, columns=COLUMNS, format="text", timeout=STATEMENT_SECONDS
        )
        await self._execute(_ANALYZE)

    async def drop_twice(self) -> list[Any]:
        """Drop all but the last of entries with the same key; return up to three with `key`, `line` and `total`."""
        return list(await self._connection.fetch(_TWICE, timeout=STATEMENT_SECONDS))

    async def drop_suppressed(self) -> int:
        """Drop the entries of people who asked not to be kept, and return how many they were."""
        gone = await self._connection.fetchval(_SUPPRESSED, timeout=STATEMENT_SECONDS)
        return int(gone)

    async def compare(self) -> Counts:
        """Find what is new or would change."""
        await self._execute(_FORGET)
        await self._execute(_CHANGED_DOCUMENTS, self._namespace)
        await self._execute(_CHANGED_STATS)
        await self._execute(_CHANGED_PREFERENCES)
        row = await self._connection.fetchrow(_COUNTS, timeout=STATEMENT_SECONDS)
        assert row is not None, "a SELECT without FROM has one row"
        return Counts(*row.values())

    async def write(self) -> None:
        """Write what `compare` found."""
        await self._execute(_WRITE_DOCUMENTS, self._namespace)
        await self._execute(_WRITE_STATS)
        await self._execute(_WRITE_PREFERENCES)
        await announce(self._connection, _WRITTEN)

    async def remember(self, sha256: str, about: dict[str, Any]) -> None:
        """Remember that a file was imported."""
        await self._execute(_REMEMBER, MEMORY, memory_key(sha256), orjson.dumps(about).decode())

    async def _execute(self, sql: str, *arguments: Any) -> None:
        await self._connection.execute(sql, *arguments, timeout=STATEMENT_SECONDS)


async def remembered(database: Any, digests: list[str]) -> set[str]:
    """Return those of some files' SHA-256 that were imported already."""
    keys = await database.fetch(_REMEMBERED, MEMORY, [memory_key(digest) for digest in digests])
    return {row["key"].removeprefix("import:") for row in keys}


def memory_key(sha256: str) -> str:
    """Return the key of the document that remembers a file."""
    return f"import:{sha256}"
