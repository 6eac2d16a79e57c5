"""Files that only their owner can read, and directories whose entries survive a crash of the machine."""

from __future__ import annotations

import os
from pathlib import Path


def create_private(path: Path) -> int:
    """Create a file that only its owner can read, and return its descriptor. Raises `OSError`, also if it exists."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries to disk, not its files. Raises `OSError`."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
