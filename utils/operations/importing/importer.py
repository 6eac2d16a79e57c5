"""Imports JSON files: copies the originals, then reads, repairs, merges and verifies each in one transaction."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from utils.database import Pool
from utils.exceptions import DatabaseError, DatabaseUnavailable, GuildbookError, ValidationError
from utils.operations.action import Outcome, Progress, Step, ignore_progress
from utils.operations.importing import originals
from utils.operations.importing.encoding import check_name, refuse_8_bit
from utils.operations.importing.entries import (
    KINDS,
    OTHER_KINDS,
    PREFIX,
    Rejects,
    Rows,
    Tally,
    check_namespace,
    kind_of,
    namespace_of,
    namespaces_of,
)
from utils.operations.importing.escaping import original_json, original_key
from utils.operations.importing.merging import Counts, Merge, Source, already_imported
from utils.operations.importing.originals import Original, printable
from utils.settings import Settings
from utils.text import format_count

_log = logging.getLogger(__name__)

#: Maximum number of files listed in the outcome's text; the report has all.
_MAX_FILES = 8
#: Maximum number of kinds of repairs, and of rejections, listed for a file.
_MAX_KINDS = 3
REPORT = "report.json"
#: The exit code of an import that left something out.
LEFT_OUT = 3
#: Why a file of which no entry could be stored is a failure.
NOTHING_USED = "none of its entries could be used"


@dataclass(frozen=True, slots=True)
class FileResult:
    """The result of importing one file."""

    name: str
    #: Where the file was found.
    path: str
    kind: str
    namespace: str
    sha256: str
    encoding: str
    #: Number of entries in the file.
    entries: int
    counts: Counts
    #: Number of entries left out because their user is in `ops.suppressions`.
    suppressed: int
    repaired: Tally
    rejected: Tally
    rejects: Rejects
    seconds: float

    @property
    def is_all_lost(self) -> bool:
        """Whether the file has entries, and all of them were left out."""
        return 0 < self.entries == self.rejects.lost

    @property
    def left_out(self) -> dict[str, int]:
        """How many entries, or values in them, were not used, by reason."""
        return {reason: kind["count"] for reason, kind in self.rejected.kinds.items()}

    def data(self) -> dict[str, Any]:
        """Return the result as JSON for the report."""
        rejects = self.rejects.path if self.rejects.entries else None
        return {
            "file": self.name,
            "path": self.path,
            "kind": self.kind,
            "namespace": self.namespace,
            "sha256": self.sha256,
            "encoding": self.encoding,
            "entries": self.entries,
            **asdict(self.counts),
            "rows": self.counts.rows,
            "suppressed": self.suppressed,
            "repaired": self.repaired.kinds,
            "rejected": self.rejected.kinds,
            "left_out": self.left_out,
            "rejected_entries": self.rejects.entries,
            "lost_entries": self.rejects.lost,
            "rejects": str(rejects) if rejects else None,
            "seconds": round(self.seconds, 1),
        }

    def line(self, *, dry_run: bool) -> str:
        """Return the result as one line of text without personal data."""
        counts, parts = self.counts, []
        for name, new, changed in (
            ("documents", counts.documents_new, counts.documents_changed),
            ("statistics", counts.stats_new, counts.stats_changed),
            ("preferences", counts.preferences_new, counts.preferences_changed),
        ):
            if new or changed:
                parts.append(f"{name} {new:,} new, {changed:,} changed")
        if not parts:
            parts.append("nothing to change")
        if self.encoding != "utf-8":
            parts.append(f"read as {self.encoding}")
        if self.suppressed:
            parts.append(f"{self.suppressed:,} left out on the users' request")
        for verb, tally in (("repaired", self.repaired), ("left out", self.rejected)):
            if tally.total:
                counted = sorted(((entry["count"], kind) for kind, entry in tally.kinds.items()), reverse=True)
                more = f" and {len(counted) - _MAX_KINDS} more kinds" if len(counted) > _MAX_KINDS else ""
                parts.append(f"{verb} {', '.join(f'{count:,} ({kind})' for count, kind in counted[:_MAX_KINDS])}{more}")
        if self.is_all_lost:
            parts.append(NOTHING_USED)
        elif self.rejects.lost:
            parts.append(f"{format_count(self.rejects.lost, 'entry')} not stored at all")
        verb = "would be written" if dry_run else "written"
        entries = format_count(self.entries, "entry")
        return f"{self.name[:60]} → {self.namespace}: {entries}, {verb}: {'; '.join(parts)}"


async def import_files(
    pool: Pool,
    settings: Settings,
    paths: Sequence[Path],
    dry_run: bool = False,
    *,
    kind: str | None = None,
    namespace: str | None = None,
    guild_id: int | None = None,
    encoding: str | None = None,
    progress: Progress = ignore_progress,
) -> Outcome:
    """Import files and the files in directories, each in one transaction; see docs/how-to/importing.md.

    `dry_run` writes nothing, neither to the database nor to disk. `kind` is members, users, emojis, shop, settings or
    documents, and `namespace` is where the originals are stored; None derives them from each file's name. `guild_id` is
    the guild of entries that do not say theirs. `encoding` is that of the files; None recognizes UTF-8, UTF-16 and
    UTF-32. If a file cannot be imported, or none of its entries can be used, the others are imported nevertheless and
    the outcome is not `ok`; neither is it if anything was left out, but then with exit code 3. Raises `ValidationError`
    for invalid paths and names, `GuildbookError` if the originals cannot be copied, and `DatabaseError`.
    """
    if kind not in (None, *KINDS, *OTHER_KINDS):
        raise ValidationError(f"{kind!r} is not a kind of file: choose {', '.join(KINDS)}, settings or documents")
    if guild_id is not None and not 0 < guild_id < 2**63:
        raise ValidationError(f"{guild_id} is not the id of a guild")
    if namespace is not None:
        check_namespace(namespace)
    if encoding is not None:
        check_name(encoding)
    files = await asyncio.to_thread(originals.find_files, paths)
    if namespace is not None and len(files) > 1:
        raise ValidationError(f"{len(files)} files cannot share the namespace {namespace}: import them one at a time")
    sources = _sources(files, kind, namespace)
    return await _import(pool, sources, settings.data_dir, dry_run, kind, guild_id, encoding, progress)


def has_changes(outcome: Outcome) -> bool:
    """Return whether a dry run found anything that an import would write."""
    return any(file["rows"] for file in outcome.data["files"])


async def import_new_files(
    pool: Pool, directory: Path, progress: Progress = ignore_progress, *, data_dir: Path
) -> Outcome | None:
    """Import the files in a directory that were never imported before; return None if there are none.

    For IMPORT_JSON. The originals are copied to `data_dir`. Files are recognized by their SHA-256, including those
    imported from the command line. Raises the same errors as `import_files`.
    """
    files = await asyncio.to_thread(originals.find_files, [directory], allow_none=True)
    digests: dict[Path, str] = {}
    for path in files:
        source = await _hash(path)
        if isinstance(source, Original):  # `_import` reports the others
            digests[path] = source.sha256
    known = await already_imported(pool, list(digests.values()))
    # By all files that are there, so that one keeps its namespace when others of its name have been imported before.
    sources = {path: where for path, where in _sources(files).items() if digests.get(path) not in known}
    return await _import(pool, sources, data_dir, False, None, None, None, progress) if sources else None


def _sources(files: Sequence[Path], kind: str | None = None, namespace: str | None = None) -> dict[Path, Source]:
    """Return where files come from, and where their originals are to be stored. `namespace`: as an operator says."""
    kinds = [kind or kind_of(path) for path in files]
    names = [namespace_of(path, one) for path, one in zip(files, kinds, strict=True)]
    found = namespaces_of(files, kinds) if namespace is None else [namespace] * len(files)
    return {
        path: Source(printable(path.absolute().parent.resolve() / path.name), name, where, namespace is not None)
        for path, name, where in zip(files, names, found, strict=True)
    }


async def _import(
    pool: Pool,
    places: Mapping[Path, Source],
    data_dir: Path,
    dry_run: bool,
    kind: str | None,
    guild_id: int | None,
    encoding: str | None,
    progress: Progress,
) -> Outcome:
    """Import files into their namespaces."""
    files = list(places)
    await _check_encoding(pool)
    directory: Path | None = None
    sources: list[Original | ValidationError]
    if dry_run:
        sources = [await _hash(path) for path in files]
    else:
        directory, sources = await _copy(files, data_dir, progress)
    done: list[FileResult] = []
    failed: list[tuple[str, str]] = []
    for (path, place), source in zip(places.items(), sources, strict=True):
        try:
            if not isinstance(source, Original):
                raise source
            result = await _import_file(
                pool, source, kind or kind_of(path), place, directory, progress,
                path=path, is_forced=kind is not None, guild_id=guild_id, encoding=encoding,
            )  # fmt: skip
        except DatabaseUnavailable:
            raise
        except (DatabaseError, OSError) as exc:  # costs this file alone
            name = printable(path.name if not isinstance(source, Original) else source.path.name)
            failed.append((name, str(exc)))
            _log.warning("%s was not imported, nothing of it was written: %s", name, exc)
            continue
        done.append(result)
        if result.is_all_lost:
            _log.warning("%s: %s: %s", result.name, NOTHING_USED, ", ".join(result.rejected.kinds))
        elif result.left_out:
            _log.warning("%s: left out: %s", result.name, describe_left_out(result.left_out))
    left_out: Counter[str] = Counter()
    for result in done:
        left_out.update(result.left_out)
    data = {
        "dry_run": dry_run, "directory": str(directory) if directory else None,
        "at": datetime.now(UTC).isoformat(timespec="seconds"), "files": [item.data() for item in done],
        "failed": [{"file": name, "error": error} for name, error in failed], "left_out": dict(left_out.most_common()),
    }  # fmt: skip
    lines = [item.line(dry_run=dry_run) for item in done[:_MAX_FILES]]
    lines += [
        f"{name[:60]} was not imported, nothing of it was written: {error[:400]}" for name, error in failed[:_MAX_FILES]
    ]
    unlisted = max(0, len(done) - _MAX_FILES) + max(0, len(failed) - _MAX_FILES)
    if unlisted:
        lines.append(f"and {format_count(unlisted, 'more file')}")
    if left_out:
        lines.append(f"left out: {describe_left_out(left_out)}")
    if directory is not None:
        await asyncio.to_thread(_write_report, directory, data)
        lines.append(f"The originals, the report and the rejected entries are in {directory}")
    text = "\n".join(lines)
    has_failed = bool(failed) or any(item.is_all_lost for item in done)
    return Outcome(
        text if len(text) <= 1_900 else f"{text[:1_890]} …",
        data,
        ok=not has_failed and not left_out,
        exit_code=LEFT_OUT if left_out and not has_failed else None,
    )


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """Return how often each reason occurred, the most frequent first, as text."""
    counted = sorted(left_out.items(), key=lambda item: -item[1])
    more = f" and {format_count(len(counted) - _MAX_KINDS, 'more reason')}" if len(counted) > _MAX_KINDS else ""
    return ", ".join(f"{count:,} ({reason})" for reason, count in counted[:_MAX_KINDS]) + more


async def _check_encoding(pool: Pool) -> None:
    """Raise `DatabaseError` if the database could refuse characters of Discord's in the middle of an import."""
    encoding = await pool.fetchval("SELECT current_setting('server_encoding')")
    if encoding != "UTF8":
        raise DatabaseError(
            f"the encoding of this database is {encoding}, so nothing was imported: use one made with"
            " ENCODING 'UTF8' TEMPLATE template0"
        )


async def _hash(path: Path) -> Original | ValidationError:
    try:
        return await asyncio.to_thread(originals.hash_file, path)
    except ValidationError as exc:
        return exc


async def _copy(files: list[Path], data_dir: Path, progress: Progress) -> tuple[Path, list[Original | ValidationError]]:
    loop = asyncio.get_running_loop()

    def on_progress(copied: int) -> None:
        loop.call_soon_threadsafe(progress, Step("copying the originals", copied, None, "bytes"))

    try:
        return await asyncio.to_thread(originals.copy_files, files, data_dir, on_progress)
    except OSError as exc:
        raise GuildbookError(
            f"the originals could not be copied to {data_dir / originals.DIRECTORY}, so nothing was imported:"
            f" {exc.strerror or exc}: check its permissions and the free disk space"
        ) from exc


async def _import_file(
    pool: Pool,
    source: Original,
    kind: str,
    place: Source,
    directory: Path | None,
    progress: Progress,
    *,
    path: Path,
    is_forced: bool,
    guild_id: int | None,
    encoding: str | None,
) -> FileResult:
    """Import one file in one transaction; if `directory` is None (a dry run), roll back before writing."""
    started = time.monotonic()
    name = printable(source.path.name)
    rejected = None if directory is None else directory / f"{name}.rejected.jsonl"
    with source.path.open("rb") as file, Rejects(rejected) as rejects:
        if encoding is None:
            await asyncio.to_thread(refuse_8_bit, file)
            file.seek(0)
        stem = printable(path.stem)
        rows = Rows(
            source, file, kind, rejects, stem=stem, is_forced=is_forced, guild_id=guild_id, encoding=encoding
        )  # fmt: skip
        async with pool.acquire(temp=True) as connection:
            transaction = connection.transaction()
            await transaction.start()
            try:
                merge = Merge(connection)
                await merge.begin()
                await merge.enter(place, source.sha256)
                async with aclosing(_batches(rows, Step(f"reading {name}", 0, source.size, "bytes"), progress)) as read:
                    await merge.stage(read)
                duplicates = 0
                async with aclosing(merge.drop_replaced()) as replaced:
                    async for row in replaced:
                        key, text = original_key(row["key"]), original_json(row["text"] or "")
                        rows.replace(line=row["line"], key=key, text=text, is_lost=row["is_lost"])
                        duplicates += not row["is_lost"]
                suppressed = await merge.drop_suppressed()
                progress(Step(f"comparing {name}"))
                counts = await merge.compare()
                if directory is not None:
                    progress(Step(f"writing {name}", 0, counts.rows))
                    await merge.write()
                    if counts.staged or not rows.rejects.lost:  # otherwise, a later version may read more of it
                        await merge.record_import(
                            source.sha256, {"file": name, "namespace": merge.namespace, "entries": rows.entries}
                        )
                    if counts.staged and merge.namespace.startswith(PREFIX):
                        await merge.record_source(place, source.sha256)
                    await _verify(merge, rows, counts, duplicates, suppressed)
                    progress(Step(f"writing {name}", counts.rows, counts.rows))
            except BaseException:
                if not connection.is_closed():
                    await transaction.rollback()
                raise
            if directory is None:
                await transaction.rollback()
            else:
                await transaction.commit()
    return FileResult(
        name, printable(path), kind, merge.namespace, source.sha256, rows.reader.encoding or "utf-8", rows.entries,
        counts, suppressed, rows.repaired, rows.rejected, rejects, time.monotonic() - started,
    )  # fmt: skip


async def _verify(merge: Merge, rows: Rows, counts: Counts, duplicates: int, suppressed: int) -> None:
    """Compare again: every entry must be accounted for, and no difference may remain."""
    remaining = await merge.compare()
    missing = rows.entries - rows.rejects.lost - duplicates - suppressed - counts.staged
    if missing or remaining.rows:
        raise DatabaseError(
            f"the database does not contain what was imported ({missing} entries are missing, {remaining.rows} rows"
            " differ), so the import was rolled back: check whether triggers or another process modify these tables"
        )


async def _batches(rows: Rows, step: Step, progress: Progress) -> AsyncGenerator[bytes, None]:
    """Read batches in a thread, one batch ahead of the database."""
    reading = asyncio.ensure_future(asyncio.to_thread(rows.batch))
    try:
        while batch := await asyncio.shield(reading):
            reading = asyncio.ensure_future(asyncio.to_thread(rows.batch))
            progress(Step(step.text, rows.reader.read, step.total, step.unit))
            yield batch
    finally:
        await asyncio.wait([reading])  # the thread still uses the file, so it must not be closed yet


def _write_report(directory: Path, data: dict[str, Any]) -> None:
    with originals.create_private_text(directory / REPORT) as file:
        json.dump(data, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    originals.sync_files(directory)
