"""The files that are imported: found, copied away first, and known again by their SHA-256."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from utils.exceptions import ValidationError

#: What is looked for in a directory; the last two are JSON lines.
SUFFIXES = (".json", ".jsonl", ".ndjson")
#: Under the data directory.
DIRECTORY = "imports"
_BLOCK = 2**20


@dataclass(frozen=True, slots=True)
class Original:
    """One file to import."""

    path: Path
    #: Hexadecimal; '' before it was read.
    sha256: str
    size: int

    @property
    def is_lines(self) -> bool:
        """Whether it holds JSON lines."""
        return self.path.suffix.lower() in SUFFIXES[1:]


def found(paths: Sequence[Path], *, may_be_none: bool = False) -> list[Path]:
    """Return the files: those named, and of directories what is called .json, .jsonl or .ndjson.

    Raises `ValidationError` when one is not there or cannot be read, or there are none and that may not be.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            try:
                files += sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
            except OSError as exc:
                raise ValidationError(f"{path}: it cannot be read: {exc.strerror}") from None
        elif path.is_file():
            files.append(path)
        else:
            raise ValidationError(f"{path}: there is no such file or directory")
    if not files and not may_be_none:
        raise ValidationError(f"{', '.join(map(str, paths)) or 'nothing'}: there is no file called *.json or *.jsonl")
    return list(dict.fromkeys(files))


def digested(path: Path) -> Original:
    """Return a file with its SHA-256. Raises `ValidationError`."""
    return _read(path, lambda _: None)


def copied(
    paths: Sequence[Path], data_dir: Path, told: Callable[[int], None] = lambda _: None
) -> tuple[Path, list[Original]]:
    """Copy files into a new directory of `data_dir`/imports, forced to disk; return it and the copies, in order.

    `told` gets the bytes copied so far. Raises `ValidationError` for what cannot be read, `OSError` for what cannot be
    written.
    """
    parent = data_dir / DIRECTORY
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    at = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    partial = parent / f".{at}-{secrets.token_hex(4)}.partial"
    partial.mkdir(mode=0o700)
    try:
        copies, done = [], 0
        for path in paths:
            target = partial / _free(partial, path.name)
            with created(target) as file:

                def write(block: bytes, file: TextIO = file) -> None:
                    nonlocal done
                    file.buffer.write(block)
                    done += len(block)
                    told(done)

                original = _read(path, write)
            copies.append(Original(target, original.sha256, original.size))
        whole = hashlib.sha256("".join(copy.sha256 for copy in copies).encode()).hexdigest()
        directory = parent / f"{at}-{whole[:12]}"
        forced(partial)
        partial.rename(directory)
        forced(parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return directory, [Original(directory / copy.path.name, copy.sha256, copy.size) for copy in copies]


def created(path: Path) -> TextIO:
    """Open a new file for its owner alone."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8")


def forced(directory: Path) -> None:
    """Force to disk what a directory holds: its files and its names."""
    for path in (*directory.iterdir(), directory):
        if path is directory or path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _read(path: Path, write: Callable[[bytes], None]) -> Original:
    digest, size = hashlib.sha256(), 0
    try:
        file = path.open("rb")
    except OSError as exc:
        raise ValidationError(f"{path}: it cannot be read: {exc.strerror}") from None
    with file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
            write(block)
    return Original(path, digest.hexdigest(), size)


def _free(directory: Path, name: str) -> str:
    """Return a name that no file in a directory has: two directories may have a file of the same name."""
    number, path = 1, Path(name)
    while (directory / name).exists() or name == "report.json":
        number += 1
        name = f"{path.stem}-{number}{path.suffix}"
    return name
