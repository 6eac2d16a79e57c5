"""Which backups there are: where they are, whose, whether they are intact, and which are kept."""

from __future__ import annotations

from utils.operations.backup.catalog.catalog import BackupCatalog

__all__ = ["BackupCatalog"]
