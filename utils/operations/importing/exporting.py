"""Exports documents and tables as JSON, JSON lines or CSV, in bounded memory and from one snapshot."""

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
from typing import Any, BinaryIO, Literal, Protocol, get_args

from sqlalchemy import BigInteger, Table, Text, bindparam, cast, func, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql.asyncpg import dialect as asyncpg_dialect

from models import Base
from utils.database import Connection, Pool
from utils.documents.documents import NAMESPACE
from utils.exceptions import GuildbookError, ValidationError
from utils.files import create_private, sync_directory
from utils.operations.action import Outcome, Progress, Step, ignore_progress
from utils.operations.importing.entries import KINDS, PREFIX
from utils.operations.importing.escaping import original_json, original_key

Format = Literal["json", "jsonl", "csv"]
#: Prefix that selects a table whose name is also the name of an imported file.
TABLE_PREFIX = "table:"
#: Number of rows to fetch and write at once, and of tables with JSON columns, whose rows may be large.
BATCH_ROWS = 1_000
LARGE_ROWS = 50
#: Number of bytes of documents to fetch at once; a document has up to 1 MB.
BATCH_BYTES = 4 * 2**20
#: Timeout of a statement in seconds: documents are sorted before the first one is returned.
STATEMENT_SECONDS = 1_800.0
_DOCUMENTS = """
SELECT guild_id, key, value::text AS value FROM documents
WHERE namespace = $1 AND ($2::bigint IS NULL OR guild_id = $2) ORDER BY version, guild_id, key
"""
_COUNT_DOCUMENTS = """
SELECT count(*), count(*) - count(DISTINCT key), coalesce(max(octet_length(value::text)), 0) FROM documents
WHERE namespace = $1 AND ($2::bigint IS NULL OR guild_id = $2)
"""

#: A record of the driver, accessed by position.
Row = Any


class Output(Protocol):
    """What an export is written to: an open file, or standard output."""

    def write(self, data: bytes, /) -> int: ...

    def flush(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Source:
    """A query and how to write its rows."""

    sql: str
    arguments: tuple[Any, ...]
    #: The CSV header.
    header: tuple[str, ...]
    #: Formats a row as an element of the JSON array, a member of the JSON object, or a line.
    format_row: Callable[[Row], str]
    opening: str = ""
    closing: str = ""
    between: str = ""
    #: Number of rows; None if unknown.
    total: int | None = None
    batch: int = BATCH_ROWS


async def export(
    pool: Pool,
    what: str,
    to: Path | Output,
    *,
    form: Format = "json",
    guild_id: int | None = None,
    progress: Progress = ignore_progress,
) -> Outcome:
    """Write documents or a table to a file; see docs/how-to/importing.md.

    `what` is members, users, emojis or shop (as imported), a table of `models` (`table:members` if an imported file has
    the same name), or a namespace of documents. `to` is a path, which is replaced atomically with a file that only its
    owner can read, or an open file. `guild_id` None exports all guilds. Raises `ValidationError` if `what` does not
    exist or cannot be written in this format, `GuildbookError` if the file cannot be written, and `DatabaseError`.
    """
    if form not in get_args(Format):
        raise ValidationError(f"{form!r} is not a format: choose json, jsonl or csv")
    try:
        if isinstance(to, Path):
            with _replace_file(to) as file:
                rows, name = await _export(pool, what, file, form, guild_id, progress)
        else:
            rows, name = await _export(pool, what, to, form, guild_id, progress)
    except OSError as exc:
        where = to if isinstance(to, Path) else "the output"
        raise GuildbookError(f"{where}: cannot be written: {exc.strerror or exc}") from exc
    where = f" to {to}" if isinstance(to, Path) else ""
    data = {"what": name, "format": form, "rows": rows, "file": str(to) if isinstance(to, Path) else None}
    return Outcome(f"Exported {rows:,} of {name}{where}", data)


async def _export(
    pool: Pool, what: str, file: Output, form: Format, guild_id: int | None, progress: Progress
) -> tuple[int, str]:
    table, namespace = _resolve(what)
    name = f"documents {namespace}" if table is None else f"table {table.fullname}"
    rows = 0
    async with pool.transaction(isolation="repeatable_read", readonly=True) as connection:
        # The server formats the times in CSV; always use UTC.
        await connection.execute("SET LOCAL TimeZone = 'UTC'")
        if table is None:
            source = await _documents(connection, what, namespace, form, guild_id)
        else:
            source = _table(table, form, guild_id)
        await asyncio.to_thread(file.write, source.opening.encode())
        # Not `async for`: asyncpg would fetch with the pool's timeout.
        cursor = await connection.cursor(source.sql, *source.arguments, timeout=STATEMENT_SECONDS)
        while batch := await cursor.fetch(source.batch, timeout=STATEMENT_SECONDS):
            await asyncio.to_thread(_write, file, source, batch, is_first=rows == 0)
            rows += len(batch)
            progress(Step(f"exporting {name}", rows, source.total))
        await asyncio.to_thread(file.write, source.closing.encode())
        await asyncio.to_thread(file.flush)
    return rows, name


def _write(file: Output, source: _Source, batch: Sequence[Row], *, is_first: bool) -> None:
    text = source.between.join(map(source.format_row, batch))
    file.write((text if is_first else source.between + text).encode())


def _resolve(what: str) -> tuple[Table | None, str]:
    """Return the table and '', or None and the namespace. Raises `ValidationError` for a name that is neither."""
    tables = Base.metadata.tables
    if what in KINDS:
        return None, f"{PREFIX}{what}"
    name = what.removeprefix(TABLE_PREFIX)
    if name in tables:
        return tables[name], ""
    if what != name or not NAMESPACE.fullmatch(what):
        near = difflib.get_close_matches(name, tables, 1)
        raise ValidationError(
            f"{what[:50]!r} is neither a table nor a namespace" + (f": did you mean {near[0]}?" if near else "")
        )
    return None, what


async def _documents(connection: Connection, what: str, namespace: str, form: Format, guild_id: int | None) -> _Source:
    counts = await connection.fetchrow(_COUNT_DOCUMENTS, namespace, guild_id, timeout=STATEMENT_SECONDS)
    assert counts is not None, "an aggregate has one row"
    total, duplicates, largest = counts
    batch = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, largest)))
    if not total:
        near = difflib.get_close_matches(what, Base.metadata.tables, 1)
        hint = (
            f"; the table is {TABLE_PREFIX}{what}"
            if what in Base.metadata.tables
            else near and f": did you mean {near[0]}?"
        )
        raise ValidationError(
            f"no documents in namespace {namespace}{'' if guild_id is None else f' in guild {guild_id}'}{hint or ''}"
        )
    if form == "json" and duplicates:
        raise ValidationError(
            f"{duplicates:,} keys of {namespace} exist in several guilds, but keys of a JSON object are unique:"
            " export one guild with --guild, or all with --format jsonl"
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
            raise ValidationError(f"table {table.fullname} has no guild column: omit --guild")
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
    """Format a line of CSV for PostgreSQL: NULL is an empty field, an empty string is quoted."""
    return ",".join(map(_csv_field, fields)) + "\r\n"


def _csv_field(field: str | None) -> str:
    if field is None:
        return ""
    if not field or field == "\\." or any(mark in field for mark in ',"\r\n') or field != field.strip():
        return '"' + field.replace('"', '""') + '"'
    return field


@contextlib.contextmanager
def _replace_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` when the block succeeds and is deleted otherwise."""
    partial = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.partial")
    handle = create_private(partial)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
