"""Files of JSON brought into the database: copied away, read, repaired, merged in one transaction each, verified."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from utils.database import Pool
from utils.exceptions import DatabaseError, GuildbookError, ValidationError
from utils.operations.action import Outcome, Progress, Step, ignore_progress
from utils.operations.importing import originals
from utils.operations.importing.entries import KINDS, Rows, checked_namespace, kind_of, namespace_of
from utils.operations.importing.merging import Counts, Merge, remembered
from utils.operations.importing.originals import Original
from utils.operations.importing.report import Rejects, Tally, shortened
from utils.settings import Settings

#: Files that an outcome's text names; the report has all.
_NAMED = 8
#: Kinds of repairs and rejects that it names of each.
_KINDS = 3
REPORT = "report.json"


@dataclass(frozen=True, slots=True)
class Imported:
    """What came of one file."""

    name: str
    kind: str
    namespace: str
    sha256: str
    #: Entries that the file has.
    entries: int
    counts: Counts
    #: Entries of people who asked not to be kept.
    suppressed: int
    repaired: Tally
    rejected: Tally
    rejects: Rejects
    seconds: float

    def data(self) -> dict[str, Any]:
        """Return it for the report."""
        rejects = self.rejects.path if self.rejects.entries else None
        return {
            "file": self.name, "kind": self.kind, "namespace": self.namespace, "sha256": self.sha256,
            "entries": self.entries, **asdict(self.counts), "suppressed": self.suppressed,
            "repaired": self.repaired.kinds, "rejected": self.rejected.kinds,
            "rejected_entries": self.rejects.entries, "lost_entries": self.rejects.lost,
            "rejects": str(rejects) if rejects else None, "seconds": round(self.seconds, 1),
        }  # fmt: skip

    def line(self, *, dry_run: bool) -> str:
        """Return it as a line for people, without any of theirs."""
        counts, said = self.counts, []
        for name, new, changed in (
            ("documents", counts.documents_new, counts.documents_changed),
            ("statistics", counts.stats_new, counts.stats_changed),
            ("preferences", counts.preferences_new, counts.preferences_changed),
        ):
            if new or changed:
                said.append(f"{name} {new:,} new, {changed:,} changed")
        if not said:
            said.append("nothing to change")
        if self.suppressed:
            said.append(f"{self.suppressed:,} left out who asked not to be kept")
        for verb, tally in (("repaired", self.repaired), ("could not use", self.rejected)):
            if tally.total:
                counted = sorted(((found["count"], kind) for kind, found in tally.kinds.items()), reverse=True)
                more = f" and {len(counted) - _KINDS} kinds more" if len(counted) > _KINDS else ""
                said.append(f"{verb} {', '.join(f'{count:,} ({kind})' for count, kind in counted[:_KINDS])}{more}")
        if self.rejects.lost:
            said.append(f"{self.rejects.lost:,} entries left out")
        verb = "would be written" if dry_run else "written"
        return f"{self.name[:60]} → {self.namespace}: {self.entries:,} entries, {verb}: {'; '.join(said)}"


async def import_files(
    database: Pool,
    settings: Settings,
    paths: Sequence[Path],
    dry_run: bool = False,
    *,
    kind: str | None = None,
    namespace: str | None = None,
    progress: Progress = ignore_progress,
) -> Outcome:
    """Import files, or all in a directory, each in one transaction; see docs/importing.md.

    `dry_run`: nothing is written, neither into the database nor on disk. `kind`: members, users, emojis, shop or
    documents; None: by each file's name. `namespace`: where the originals go; None: by each file's name. The outcome is
    not `ok` when a file could not be imported; the others are all the same. Raises `ValidationError` for paths and
    names that are none, `GuildbookError` when the originals cannot be copied, and `DatabaseError`.
    """
    if kind not in (None, "documents", *KINDS):
        raise ValidationError(f"{kind!r} is no kind of file: members, users, emojis, shop or documents")
    if namespace is not None:
        checked_namespace(namespace)
    files = await asyncio.to_thread(originals.found, paths)
    if namespace is not None and len(files) > 1:
        raise ValidationError(f"{len(files)} files cannot all be namespace {namespace}: import them one by one")
    return await _import(database, files, settings.data_dir, dry_run, kind, namespace, progress)


async def at_start(
    database: Pool, directory: Path, progress: Progress = ignore_progress, *, data_dir: Path
) -> Outcome | None:
    """Import what a directory has that was never imported before; None: nothing, or it is empty.

    For the first start (IMPORT_JSON); `data_dir` is where the originals are copied to. A file counts as known by its
    SHA-256, also when it was imported from the command line. Raises like `import_files`.
    """
    files = await asyncio.to_thread(originals.found, [directory], may_be_none=True)
    digests = {path: (await asyncio.to_thread(originals.digested, path)).sha256 for path in files}
    known = await remembered(database, list(digests.values()))
    files = [path for path in files if digests[path] not in known]
    return await _import(database, files, data_dir, False, None, None, progress) if files else None


async def _import(
    database: Pool,
    files: list[Path],
    data_dir: Path,
    dry_run: bool,
    kind: str | None,
    namespace: str | None,
    progress: Progress,
) -> Outcome:
    directory: Path | None = None
    if dry_run:
        sources = [await asyncio.to_thread(originals.digested, path) for path in files]
    else:
        directory, sources = await _copied(files, data_dir, progress)
    done: list[Imported] = []
    failed: list[tuple[str, str]] = []
    for path, source in zip(files, sources, strict=True):
        as_kind = kind or kind_of(path)
        where = namespace or namespace_of(path, as_kind)
        try:
            done.append(await _one(database, source, as_kind, where, directory, progress))
        except ValidationError as exc:
            failed.append((source.path.name, str(exc)))
        except OSError as exc:
            raise GuildbookError(f"{source.path}: the import was broken off, nothing of it is written: {exc}") from exc
    data = {
        "dry_run": dry_run, "directory": str(directory) if directory else None,
        "at": datetime.now(UTC).isoformat(timespec="seconds"), "files": [item.data() for item in done],
        "failed": [{"file": name, "error": told} for name, told in failed],
    }  # fmt: skip
    lines = [item.line(dry_run=dry_run) for item in done[:_NAMED]]
    lines += [f"{name[:60]} was not imported, nothing of it is written: {told[:200]}" for name, told in failed[:_NAMED]]
    left = max(0, len(done) - _NAMED) + max(0, len(failed) - _NAMED)
    if left:
        lines.append(f"and {left} files more")
    if directory is not None:
        await asyncio.to_thread(_report, directory, data)
        lines.append(f"The originals, the report and what could not be used are in {directory}")
    text = "\n".join(lines)
    return Outcome(text if len(text) <= 1_900 else f"{text[:1_890]} …", data, ok=not failed)


async def _copied(files: list[Path], data_dir: Path, progress: Progress) -> tuple[Path, list[Original]]:
    loop = asyncio.get_running_loop()

    def told(copied: int) -> None:
        loop.call_soon_threadsafe(progress, Step("copying the originals", copied, None, "bytes"))

    try:
        return await asyncio.to_thread(originals.copied, files, data_dir, told)
    except OSError as exc:
        raise GuildbookError(
            f"the originals could not be copied to {data_dir / originals.DIRECTORY}, so nothing was imported:"
            f" {exc.strerror or exc}; is there room, and may we write there?"
        ) from exc


async def _one(
    database: Pool, source: Original, kind: str, namespace: str, directory: Path | None, progress: Progress
) -> Imported:
    """Import one file in one transaction; a dry run (`directory` None) is rolled back before anything is written."""
    started = time.monotonic()
    name = source.path.name
    path = None if directory is None else directory / f"{name}.rejected.jsonl"
    with source.path.open("rb") as file, Rejects(path) as rejects:
        rows = Rows(source, file, kind, rejects)
        async with database.acquire(temp=True) as connection:
            transaction = connection.transaction()
            await transaction.start()
            try:
                merge = Merge(connection, namespace)
                await merge.begin()
                async with aclosing(_batches(rows, Step(f"reading {name}", 0, source.size, "bytes"), progress)) as read:
                    await merge.stage(read)
                twice = await merge.drop_twice()
                suppressed = await merge.drop_suppressed()
                progress(Step(f"comparing {name}"))
                counts = await merge.compare()
                if directory is not None:
                    progress(Step(f"writing {name}", 0, counts.rows))
                    await merge.write()
                    await merge.remember(source.sha256, {"file": name, "namespace": namespace, "entries": rows.entries})
                    await _verify(merge, rows, counts, len(twice) and twice[0]["total"], suppressed)
                    progress(Step(f"writing {name}", counts.rows, counts.rows))
            except BaseException:
                if not connection.is_closed():
                    await transaction.rollback()
                raise
            if directory is None:
                await transaction.rollback()
            else:
                await transaction.commit()
    if twice:
        rows.repaired.kinds["key twice, the last one taken"] = {
            "count": twice[0]["total"],
            "examples": [{"line": row["line"], "key": shortened(row["key"]), "value": None} for row in twice],
        }
    return Imported(
        name, kind, namespace, source.sha256, rows.entries, counts, suppressed, rows.repaired, rows.rejected, rejects,
        time.monotonic() - started,
    )  # fmt: skip


async def _verify(merge: Merge, rows: Rows, counts: Counts, twice: int, suppressed: int) -> None:
    """Compare once more: every entry must be accounted for, and nothing be left to write."""
    left = await merge.compare()
    missing = rows.entries - rows.rejects.lost - twice - suppressed - counts.staged
    if missing or left.rows:
        raise DatabaseError(
            f"the database does not hold what was imported ({missing} entries are missing, {left.rows} rows differ), so"
            " nothing was kept: do triggers or another process change these tables?"
        )


async def _batches(rows: Rows, step: Step, progress: Progress) -> AsyncGenerator[bytes, None]:
    """Read in a thread, one batch ahead of what the database takes."""
    ahead = asyncio.ensure_future(asyncio.to_thread(rows.batch))
    try:
        while batch := await asyncio.shield(ahead):
            ahead = asyncio.ensure_future(asyncio.to_thread(rows.batch))
            progress(Step(step.text, rows.reader.read, step.total, step.unit))
            yield batch
    finally:
        await asyncio.wait([ahead])  # the thread uses the file: it may not be closed beneath it


def _report(directory: Path, data: dict[str, Any]) -> None:
    with originals.created(directory / REPORT) as file:
        json.dump(data, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    originals.forced(directory)
