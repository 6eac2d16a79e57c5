"""Documents and tables written out: as JSON, JSON lines or CSV, in bounded memory, from one moment of the database."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from sqlalchemy import BigInteger, Table, Text, bindparam, cast, func, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql.asyncpg import dialect as asyncpg_dialect

from models import Base
from utils.database import Connection, Pool
from utils.documents.documents import NAMESPACE
from utils.exceptions import GuildbookError, ValidationError
from utils.operations.action import Outcome, Progress, Step, ignore_progress
from utils.operations.importing.entries import KINDS, PREFIX
from utils.operations.importing.escaping import original_json, original_key

Format = Literal["json", "jsonl", "csv"]
#: Asks for a table whose name is also that of an imported file.
TABLE = "table:"
#: Rows that are fetched and written at once, and of what may be large: a document has up to 1 MB.
BATCH_ROWS = 1_000
LARGE_ROWS = 50
#: Bytes of documents that are.
BATCH_BYTES = 4 * 2**20
#: Seconds that one statement may take: documents are sorted before the first one comes.
STATEMENT_SECONDS = 1_800.0
_DOCUMENTS = """
SELECT guild_id, key, value::text AS value FROM documents
WHERE namespace = $1 AND ($2::bigint IS NULL OR guild_id = $2) ORDER BY version, guild_id, key
"""
_COUNT_DOCUMENTS = """
SELECT count(*), count(*) - count(DISTINCT key), coalesce(max(octet_length(value::text)), 0) FROM documents
WHERE namespace = $1 AND ($2::bigint IS NULL OR guild_id = $2)
"""

#: What the driver gives, by position.
Row = Any


@dataclass(frozen=True, slots=True)
class _Source:
    """What is exported, and how its rows are written."""

    sql: str
    arguments: tuple[Any, ...]
    #: Of the CSV; the fields are text or None.
    header: tuple[str, ...]
    #: One row as an element of the JSON array, a member of the object, or a line.
    written: Callable[[Row], str]
    opening: str = ""
    closing: str = ""
    between: str = ""
    #: None: nobody knows.
    total: int | None = None
    batch: int = BATCH_ROWS


async def export(
    database: Pool,
    what: str,
    to: Path | BinaryIO,
    *,
    form: Format = "json",
    guild_id: int | None = None,
    progress: Progress = ignore_progress,
) -> Outcome:
    """Write documents or a table to a file; see docs/importing.md.

    `what`: members, users, emojis or shop as they were imported, else a table of `models` (`table:members` for one that
    is called like a file), else a namespace of documents. `to`: a path, replaced at the end as a whole, readable for
    its owner alone; or an open file, which is only written to. `guild_id` None: of all guilds. Raises
    `ValidationError` for what does not exist or cannot be written in this form, `GuildbookError` when the file cannot
    be written, and `DatabaseError`.
    """
    if form not in get_args(Format):
        raise ValidationError(f"{form!r} is no format: json, jsonl or csv")
    try:
        if isinstance(to, Path):
            with _replaced(to) as file:
                rows, name = await _export(database, what, file, form, guild_id, progress)
        else:
            rows, name = await _export(database, what, to, form, guild_id, progress)
    except OSError as exc:
        raise GuildbookError(f"{to if isinstance(to, Path) else 'the output'}: cannot be written: {exc}") from exc
    where = f" to {to}" if isinstance(to, Path) else ""
    data = {"what": name, "format": form, "rows": rows, "file": str(to) if isinstance(to, Path) else None}
    return Outcome(f"Exported {rows:,} of {name}{where}", data)


async def _export(
    database: Pool, what: str, file: BinaryIO, form: Format, guild_id: int | None, progress: Progress
) -> tuple[int, str]:
    table, namespace = _found(what)
    name = f"documents {namespace}" if table is None else f"table {table.fullname}"
    rows = 0
    async with database.transaction(isolation="repeatable_read", readonly=True) as connection:
        # Times in CSV are written by the server, and nobody should have to guess the zone.
        await connection.execute("SET LOCAL TimeZone = 'UTC'")
        if table is None:
            source = await _documents(connection, what, namespace, form, guild_id)
        else:
            source = _table(table, form, guild_id)
        await asyncio.to_thread(file.write, source.opening.encode())
        # Opened by itself: a cursor of asyncpg's `async for` fetches under the timeout of the pool.
        cursor = await connection.cursor(source.sql, *source.arguments, timeout=STATEMENT_SECONDS)
        while batch := await cursor.fetch(source.batch, timeout=STATEMENT_SECONDS):
            await asyncio.to_thread(_write, file, source, batch, is_first=rows == 0)
            rows += len(batch)
            progress(Step(f"exporting {name}", rows, source.total))
        await asyncio.to_thread(file.write, source.closing.encode())
        await asyncio.to_thread(file.flush)
    return rows, name


def _write(file: BinaryIO, source: _Source, batch: Sequence[Row], *, is_first: bool) -> None:
    text = source.between.join(map(source.written, batch))
    file.write((text if is_first else source.between + text).encode())


def _found(what: str) -> tuple[Table | None, str]:
    """Return the table, or None and the namespace. Raises `ValidationError` for a name that is neither."""
    tables = Base.metadata.tables
    if what in KINDS:
        return None, f"{PREFIX}{what}"
    name = what.removeprefix(TABLE)
    if name in tables:
        return tables[name], ""
    if what != name or not NAMESPACE.fullmatch(what):
        near = difflib.get_close_matches(name, tables, 1)
        raise ValidationError(
            f"{what[:50]!r} is neither a table nor a namespace" + (f": was {near[0]} meant?" if near else "")
        )
    return None, what


async def _documents(connection: Connection, what: str, namespace: str, form: Format, guild_id: int | None) -> _Source:
    counted = await connection.fetchrow(_COUNT_DOCUMENTS, namespace, guild_id, timeout=STATEMENT_SECONDS)
    assert counted is not None, "an aggregate has one row"
    total, twice, largest = counted
    batch = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, largest)))
    if not total:
        near = difflib.get_close_matches(what, Base.metadata.tables, 1)
        hint = f"; the table is {TABLE}{what}" if what in Base.metadata.tables else near and f": was {near[0]} meant?"
        raise ValidationError(
            f"there are no documents {namespace}{'' if guild_id is None else f' of guild {guild_id}'}{hint or ''}"
        )
    if form == "json" and twice:
        raise ValidationError(
            f"{twice:,} keys of {namespace} are in several guilds, and an object has each key once: export one with"
            " --guild, or all with --format jsonl"
        )
    arguments, header = (namespace, guild_id), ("guild_id", "key", "value")
    if form == "csv":
        return _Source(
            _DOCUMENTS, arguments, header, lambda row: _csv((str(row[0]), row[1], original_json(row[2]))),
            opening=_csv(header), total=total, batch=batch,
        )  # fmt: skip
    if form == "jsonl":
        return _Source(_DOCUMENTS, arguments, header, _document_line, total=total, batch=batch)
    return _Source(_DOCUMENTS, arguments, header, _document_member, "{\n", "\n}\n", ",\n", total, batch)


def _document_line(row: Row) -> str:
    return f'{{"guild_id": "{row[0]}", "key": {_key(row[1])}, "value": {original_json(row[2])}}}\n'


def _document_member(row: Row) -> str:
    return f"{_key(row[1])}: {original_json(row[2])}"


def _key(key: str) -> str:
    original = original_key(key)
    return json.dumps(original, ensure_ascii=original != key)


def _table(table: Table, form: Format, guild_id: int | None) -> _Source:
    rows = table.alias("t")
    columns: list[Any] = (
        [cast(column, Text) for column in rows.columns] if form == "csv" else [cast(_as_json(rows), Text)]
    )
    statement = select(*columns).select_from(rows).order_by(*(rows.c[key.name] for key in table.primary_key.columns))
    if guild_id is not None:
        guild = rows.columns.get("guild_id" if table.name != "guilds" else "id")
        if guild is None:
            raise ValidationError(f"table {table.fullname} is not by guild: leave --guild out")
        statement = statement.where(guild == bindparam("guild", type_=BigInteger))
    sql = str(statement.compile(dialect=asyncpg_dialect()))  # type: ignore[no-untyped-call]
    arguments = () if guild_id is None else (guild_id,)
    header = tuple(column.name for column in table.columns)
    batch = LARGE_ROWS if any(isinstance(column.type, JSONB) for column in table.columns) else BATCH_ROWS
    if form == "csv":
        return _Source(sql, arguments, header, _csv, opening=_csv(header), batch=batch)
    if form == "jsonl":
        return _Source(sql, arguments, header, lambda row: f"{row[0]}\n", batch=batch)
    return _Source(sql, arguments, header, lambda row: str(row[0]), "[\n", "\n]\n", ",\n", batch=batch)


def _as_json(rows: Any) -> Any:
    return func.row_to_json(rows.table_valued())


def _csv(fields: Iterable[str | None]) -> str:
    """Return a line of CSV as PostgreSQL reads it: NULL is nothing, an empty text is quoted."""
    return ",".join(map(_csv_field, fields)) + "\r\n"


def _csv_field(field: str | None) -> str:
    if field is None:
        return ""
    if not field or field == "\\." or any(mark in field for mark in ',"\r\n') or field != field.strip():
        return '"' + field.replace('"', '""') + '"'
    return field


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """Lend a new file that takes the place of `path` when all went well, and is gone otherwise."""
    partial = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.partial")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
