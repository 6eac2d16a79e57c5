"""Where backup files are: a local directory, or a remote store at a URL."""

from __future__ import annotations

from typing import TypeAlias

from utils.operations.backup.store.directory import UNFINISHED, Content, Directory
from utils.operations.backup.store.remote import ANSWER_SECONDS, Remote

__all__ = ["ANSWER_SECONDS", "UNFINISHED", "Content", "Directory", "Remote", "Store"]

Store: TypeAlias = Directory | Remote
