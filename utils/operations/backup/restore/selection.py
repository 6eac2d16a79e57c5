"""Which rows of a backup are restored when not all of them are: those of some tables, or one guild's documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models import Document
from utils.database.ownership import VERSION_TABLE
from utils.database.placement import Placement
from utils.exceptions import BackupError, UnknownBackup, ValidationError
from utils.operations.backup.archive.objects import Name, owned_names
from utils.operations.backup.archive.script import Archive
from utils.text import format_count


@dataclass(frozen=True, slots=True)
class Selection:
    """The tables of a backup whose rows are restored."""

    #: Their names in the backup.
    tables: tuple[Name, ...]
    #: How many tables of the backup could be restored.
    total: int
    #: Only the rows of this guild (0: of none); None: all rows.
    guild_id: int | None = None

    @property
    def whose(self) -> str:
        """Whose documents are restored, for people."""
        return f"guild {self.guild_id}" if self.guild_id else "no guild"

    def describe(self, rows: int) -> str:
        """Return what is restored, for people. `rows`: their number."""
        if self.guild_id is not None:
            return f"{format_count(rows, 'document')} of {self.whose}"
        return f"{format_count(rows, 'row')} in {len(self.tables)} of {format_count(self.total, 'table')}"


def check_options(
    tables: Sequence[str], documents_of: int | None, *, whole_database: bool = False, drop_old: bool = False
) -> None:
    """Raise `ValidationError` for options of a restore that exclude each other."""
    if tables and documents_of is not None:
        raise ValidationError("choose either tables or the documents of a guild, not both")
    if whole_database and (tables or documents_of is not None):
        raise ValidationError("the whole database cannot be replaced by a part of a backup: choose one of the two")
    if drop_old and not whole_database:
        raise ValidationError("a restore in place leaves no old database to drop: choose the whole database too")


def describe_options(tables: Sequence[str], documents_of: int | None, *, whole_database: bool = False) -> str:
    """Return what a restore with these options replaces, for people."""
    if whole_database:
        return "the whole database"
    if tables:
        return f"the rows of {', '.join(tables)}"
    if documents_of is None:
        return "the rows of Guildbook's tables"
    return f"the documents of guild {documents_of}" if documents_of else "the documents of no guild"


def select(archive: Archive, tables: Sequence[str] = (), documents_of: int | None = None) -> Selection | None:
    """Return what to restore of a backup: everything (None), some tables, or the documents of a guild.

    tables: names as in SQL, `members` or `schema.name`; none: all that the backup has, which of a partial one are not
    all. documents_of: the id of a guild; 0: those that belong to none. Raises `BackupError` for what the backup does
    not have or a restore does not replace, and `ValidationError` if both are given.
    """
    check_options(tables, documents_of)
    schemas, ours = archive.schemas, set(owned_names(archive.schemas))
    found = {name for name in archive.counts if name in ours and _is_replaceable(name, schemas)}
    if documents_of is not None:
        documents = (schemas.main, Document.__tablename__)
        if documents not in found:
            raise BackupError(f"backup {archive.id} has no table {Document.__tablename__}: choose another backup")
        return Selection((documents,), len(found), documents_of)
    if tables:
        return Selection(tuple(dict.fromkeys(_find(archive, name, found) for name in tables)), len(found))
    if archive.is_partial:
        if not found:
            raise BackupError(f"backup {archive.id} has only rows that a restore keeps: those of schema {schemas.ops}")
        return Selection(tuple(sorted(found)), len(found))
    return None


def _is_replaceable(name: Name, schemas: Placement) -> bool:
    return name[0] != schemas.ops and name != (schemas.main, VERSION_TABLE)


def _find(archive: Archive, name: str, found: set[Name]) -> Name:
    """Return the table of a backup that a name of SQL means."""
    schemas = archive.schemas
    by_name = {".".join(table): table for table in archive.counts}
    by_name |= {schemas.shown(*table): table for table in archive.counts}
    table = by_name.get(name)
    if table is None:
        known = ", ".join(sorted(schemas.shown(*one) for one in found))
        raise UnknownBackup(f"backup {archive.id} has no table {name}: choose from {known}")
    if table not in found:
        reason = "no revision here makes it"
        if not _is_replaceable(table, schemas):
            reason = f"a restore keeps schema {schemas.ops}" if table[0] == schemas.ops else "it records the revision"
        raise UnknownBackup(f"table {name} cannot be restored: {reason}")
    return table
