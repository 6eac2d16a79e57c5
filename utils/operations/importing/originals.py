"""The files to import: finds them, copies them to the data directory, and identifies them by their SHA-256."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from utils.exceptions import ValidationError
from utils.files import create_private, sync_directory

_log = logging.getLogger(__name__)

#: File names to import from a directory; the last two are JSON lines.
SUFFIXES = (".json", ".jsonl", ".ndjson")
#: Name of the directory of copies in the data directory.
DIRECTORY = "imports"
_BLOCK = 2**20


@dataclass(frozen=True, slots=True)
class Original:
    """One file to import."""

    path: Path
    #: SHA-256 in hexadecimal.
    sha256: str
    size: int

    @property
    def is_lines(self) -> bool:
        """Whether it contains JSON lines."""
        return self.path.suffix.lower() in SUFFIXES[1:]


def find_files(paths: Sequence[Path], *, allow_none: bool = False) -> list[Path]:
    """Return the given files, and the .json, .jsonl and .ndjson files in the given directories; log what is skipped.

    Raises `ValidationError` if a path does not exist or cannot be read, and, unless `allow_none`, if there is no file.
    """
    files: list[Path] = []
    for path in paths:
        try:
            mode = path.stat().st_mode
            is_directory = stat.S_ISDIR(mode)
            inside = sorted(path.iterdir()) if is_directory else []
        except FileNotFoundError:
            raise ValidationError(f"{printable(path)}: no such file or directory") from None
        except OSError as exc:
            raise ValidationError(f"{printable(path)}: cannot be read: {exc.strerror}") from None
        if not is_directory and not stat.S_ISREG(mode):
            raise ValidationError(f"{printable(path)}: it is not a file")
        if not is_directory:
            files.append(path)
        for file in inside:
            if (reason := _reason_to_skip(file)) is None:
                files.append(file)
            else:
                _log.warning("skipped %s: %s", printable(file), reason)
    if not files and not allow_none:
        names = ", ".join(map(printable, paths)) or "an empty list of paths"
        raise ValidationError(f"no *.json, *.jsonl or *.ndjson file in {names}")
    return list({file.resolve(): file for file in reversed(files)}.values())[::-1]


def _reason_to_skip(path: Path) -> str | None:
    """Return why a path in a directory is not imported; None if it is."""
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        return f"it cannot be read: {exc.strerror}"
    if stat.S_ISDIR(mode):
        return "directories in a directory are not imported: name them on the command line"
    if path.suffix.lower() not in SUFFIXES:
        return "it is not named *.json, *.jsonl or *.ndjson"
    return None if stat.S_ISREG(mode) else "it is not a file"


def printable(path: Path | str) -> str:
    """Return a path for messages and reports: bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def hash_file(path: Path) -> Original:
    """Return a file with its SHA-256 and size. Raises `ValidationError` if it cannot be read."""
    return _read(path, lambda _: None)


def copy_files(
    paths: Sequence[Path], data_dir: Path, on_progress: Callable[[int], None] = lambda _: None
) -> tuple[Path, list[Original | ValidationError]]:
    """Copy files into a new directory in `data_dir`/imports, fsync them, and return the directory and the copies.

    Instead of the copy of a file that cannot be read, there is the error. `on_progress` is called with the number of
    bytes copied so far. Raises `OSError` if a copy cannot be written.
    """
    parent = data_dir / DIRECTORY
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    at = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    partial = parent / f".{at}-{secrets.token_hex(4)}.partial"
    partial.mkdir(mode=0o700)
    try:
        copies: list[Original | ValidationError] = []
        done = 0
        for path in paths:
            target = partial / _free_name(partial, path.name)
            with create_private_text(target) as file:

                def write(block: bytes, file: TextIO = file) -> None:
                    nonlocal done
                    file.buffer.write(block)
                    done += len(block)
                    on_progress(done)

                try:
                    original = _read(path, write)
                except ValidationError as exc:
                    target.unlink()
                    copies.append(exc)
                else:
                    copies.append(Original(target, original.sha256, original.size))
        digests = "".join(copy.sha256 for copy in copies if isinstance(copy, Original))
        digest = hashlib.sha256(digests.encode()).hexdigest()
        directory = parent / f"{at}-{digest[:12]}"
        sync_files(partial)
        partial.rename(directory)
        sync_directory(parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return directory, [
        replace(copy, path=directory / copy.path.name) if isinstance(copy, Original) else copy for copy in copies
    ]


def create_private_text(path: Path) -> TextIO:
    """Create a text file that only its owner can read."""
    return os.fdopen(create_private(path), "w", encoding="utf-8")


def sync_files(directory: Path) -> None:
    """Flush a directory and the files in it to disk."""
    for path in directory.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_directory(directory)


def _read(path: Path, write: Callable[[bytes], None]) -> Original:
    digest, size = hashlib.sha256(), 0

    def failed(exc: OSError) -> ValidationError:
        return ValidationError(f"{printable(path)}: cannot be read: {exc.strerror}")

    try:
        file = path.open("rb")
    except OSError as exc:
        raise failed(exc) from None
    with file:
        while True:
            try:
                block = file.read(_BLOCK)
            except OSError as exc:
                raise failed(exc) from None
            if not block:
                break
            digest.update(block)
            size += len(block)
            write(block)
    return Original(path, digest.hexdigest(), size)


def _free_name(directory: Path, name: str) -> str:
    """Return a file name that is free in a directory: two source directories may have a file of the same name."""
    number, path = 1, Path(name)
    while (directory / name).exists() or name == "report.json":
        number += 1
        name = f"{path.stem}-{number}{path.suffix}"
    return name
