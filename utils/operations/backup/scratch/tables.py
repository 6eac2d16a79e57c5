"""Scratch tables in the live database, in which a backup is loaded and counted before anything relies on it.

They are copies of the live ones if those are at the backup's revision. Otherwise the revisions make them as the
backup has them, and later migrate the loaded rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

from models import Document
from utils import packs
from utils.database import ConnectTarget, Pool, ownership
from utils.database.placement import OPS, Placement
from utils.database.recorded_packs import fetch_packs, revisions_of_packs
from utils.database.sessions import Connection, connect
from utils.exceptions import BackupError, MigrationError, translate_errors
from utils.operations import migrations
from utils.operations.action import Progress, Step, ignore_progress
from utils.operations.backup.archive.objects import Name, ScratchPlacement, find_tables, owned_names, qualified
from utils.operations.backup.archive.script import Archive
from utils.operations.backup.restore.selection import Selection
from utils.operations.backup.scratch import load
from utils.operations.backup.scratch.load import Loaded, Place
from utils.operations.backup.scratch.schemas import copy_structure, drop_columns, scratch_schemas
from utils.packs import Pack

_OTHER_PATH = """
SELECT string_agg(quote_ident(name), ', ' ORDER BY position)
FROM unnest(current_schemas(false)::text[]) WITH ORDINALITY AS path (name, position) WHERE name <> $1
"""


def missing_revisions(archive: Archive, options: migrations.MigrationOptions = migrations.DEFAULTS) -> list[str]:
    """Return the revisions that a backup lacks, oldest first, of packs last. Raises `BackupError` if one is unknown."""
    if archive.revision is None:
        raise BackupError(f"backup {archive.id} contains no tables of Guildbook's: there is nothing to restore")
    missing: list[str] = []
    for pack in _packs_of(archive):
        try:
            missing += migrations.Revisions(pack.scripts).pending(archive.packs[pack.name].split(", "))
        except MigrationError as exc:
            raise BackupError(f"backup {archive.id}: {exc}") from None
    try:
        return migrations.Revisions(options.scripts).pending(archive.revision.split(", ")) + missing
    except MigrationError:
        raise BackupError(
            f"backup {archive.id} is at revision {archive.revision}, which this version does not know: it was made by a"
            " newer Guildbook. Restore it with that version"
        ) from None


def _packs_of(archive: Archive) -> list[Pack]:
    """Return the active packs of which an archive has tables."""
    return [pack for pack in packs.active() if pack.name in archive.packs]


@contextlib.asynccontextmanager
async def open_scratch_tables(
    pool: Pool, *, is_restore: bool, options: migrations.MigrationOptions = migrations.DEFAULTS
) -> AsyncIterator[ScratchTables]:
    """Yield scratch schemas in the live database, which are dropped after the block. `options`: where revisions are.

    Raises `BackupError` behind a pooler and while another restore is running, and `ForbiddenHere` if the user may not
    create schemas.
    """
    live = pool.direct
    if live.pooled:
        raise BackupError(
            f"{live} is a pooler, and a restore or a drill needs a direct connection: set DATABASE_UNPOOLED_URL."
            " Nothing was changed"
        )
    live = live.with_database(await pool.fetchval("SELECT current_database()"))
    version = await ownership.fetch_version(pool)
    schemas = pool.placement
    async with scratch_schemas(live, schemas, is_restore=is_restore) as scratch:
        found = revisions_of_packs(await fetch_packs(pool))
        yield ScratchTables(live, schemas, scratch, version.revision, options, found)


class ScratchTables:
    """Scratch schemas in the live database, and what was loaded there."""

    def __init__(
        self,
        live: ConnectTarget,
        schemas: Placement,
        scratch: ScratchPlacement,
        revision: str | None,
        options: migrations.MigrationOptions = migrations.DEFAULTS,
        pack_revisions: Mapping[str, str] | None = None,
    ) -> None:
        self.live: ConnectTarget = live
        #: Where the live tables are.
        self.schemas: Placement = schemas
        #: The revision of the live tables; None: there are none.
        self.revision: str | None = revision
        #: The same of each pack, by its name.
        self.pack_revisions: Mapping[str, str] = pack_revisions or {}
        self._scratch = scratch
        self._migrations = options
        #: Leads revisions to the scratch tables; None: these are copies of the live ones.
        self._placed: ConnectTarget | None = None

    @property
    def is_migrated(self) -> bool:
        """Whether the revisions made the tables, so that they can be migrated."""
        return self._placed is not None

    @property
    def place(self) -> Place:
        """The scratch tables."""
        return Place(self.live, self._scratch)

    async def load(
        self,
        archive: Archive,
        selection: Selection | None = None,
        *,
        with_indexes: bool = True,
        progress: Progress = ignore_progress,
    ) -> Loaded:
        """Make the tables of an archive's revision, and load and count its rows.

        Of a `selection`, copies of live tables are made and loaded for the selected ones and those of `ops` only;
        revisions need all tables. Without `with_indexes`, copies keep only those indexes that refuse rows. Raises
        `BackupError` unless all of it comes back.
        """
        missing_revisions(archive, self._migrations)
        wanted = set(owned_names(archive.schemas, archive.revision, archive.packs))
        if selection is not None:
            wanted = {name for name in wanted if name in selection.tables or name[0] == archive.schemas.ops}
        names = load.translated_names(
            [name for name in archive.counts if name in wanted], archive.schemas, self.schemas
        )
        async with connect(self.live) as connection:
            with translate_errors("making the scratch tables"):
                tables = await find_tables(connection, list(names.values()))
                if self._has_structure_of(archive) and len(tables) == len(names):
                    await copy_structure(connection, tables, self.schemas, self._scratch)
                else:
                    await self._run_revisions(connection, archive)
        with_indexes = with_indexes or self.is_migrated  # revisions may rely on them
        only = None if selection is None or self.is_migrated else wanted
        loaded = await load.load_and_check(archive, self.place, only=only, with_indexes=with_indexes, progress=progress)
        if not self.is_migrated:
            async with connect(self.live) as connection:
                with translate_errors("reading the scratch tables"):
                    await drop_columns(connection, loaded.columns)
        return loaded

    def _has_structure_of(self, archive: Archive) -> bool:
        """Whether the live tables are at the revisions of an archive."""
        return self.revision == archive.revision and all(
            self.pack_revisions.get(pack.name) == archive.packs[pack.name] for pack in _packs_of(archive)
        )

    @property
    def _options(self) -> migrations.MigrationOptions:
        """Options with which revisions do not reach the live tables."""
        tables = {name for _, name in ownership.owned_tables()}  # in SQL, `guilds.id` is a column
        live = [name for name in self.schemas.schemas() if name != OPS and name not in tables]
        return replace(self._migrations, off_limits=tuple(live))

    async def _run_revisions(self, connection: Connection, archive: Archive) -> None:
        """Make the tables as the revision of an archive has them. Raises `MigrationError` if a revision fails."""
        if self._scratch.others:
            raise BackupError(
                f"backup {archive.id} is at revision {archive.revision}, and the live tables are at {self.revision}:"
                f" tables of cogs in the schema {', '.join(self._scratch.others)} cannot be migrated in scratch"
                " schemas. Restore with --whole-database"
            )
        # Types and functions of extensions may be in other schemas of the path.
        path = await connection.fetchval(_OTHER_PATH, self.schemas.main)
        placed = self.live.with_placement(Placement(self._scratch.main, self._scratch.ops))
        self._placed = (
            replace(placed, server_settings={**placed.server_settings, "search_path": path}) if path else placed
        )
        await load.make_place(archive, self._placed, self._scratch, self._options)
        for pack in _packs_of(archive):
            # What it needs of Guildbook now, it may not have needed then.
            options = replace(self._options.of_pack(pack), needs_base=False)
            for revision in archive.packs[pack.name].split(", "):
                await migrations.upgrade(self._placed, revision, options=options)

    async def migrate(self, archive: Archive, *, progress: Progress = ignore_progress) -> list[str]:
        """Migrate what was loaded to the newest revision; return the applied revisions.

        Copies of live tables stay at the revision of those.
        """
        revisions = missing_revisions(archive, self._migrations) if self.is_migrated else []
        if revisions:
            assert self._placed is not None, "the revisions made the tables"
            progress(Step("migrating", 0, len(revisions), "revisions"))
            await load.set_sequences(archive, self.place)  # a migration adds rows to `ops.migrations`
            await migrations.upgrade(self._placed, "heads", options=self._options)
            for pack in _packs_of(archive):
                await migrations.upgrade(self._placed, "heads", options=self._options.of_pack(pack))
            progress(Step("migrating", len(revisions), len(revisions), "revisions"))
        return revisions

    async def keep_documents_of(self, guild_id: int) -> int:
        """Delete the loaded documents of other guilds, and return how many are left."""
        table = qualified((self._scratch.main, Document.__tablename__))
        async with connect(self.live) as connection:
            with translate_errors("selecting the documents"):
                await connection.execute(f"DELETE FROM {table} WHERE guild_id <> $1", guild_id)  # noqa: S608
                rows: int = await connection.fetchval(f"SELECT count(*) FROM {table}")  # noqa: S608
        return rows

    async def tables_to_replace(self, loaded: Loaded, selection: Selection | None = None) -> list[Name]:
        """Return the live tables that have a counterpart here: one in the backup, or one that a revision filled.

        Of a `selection`: only the selected ones, and those of `ops`. Raises `BackupError` if one of them no longer
        exists.
        """
        async with connect(self.live) as connection:
            with translate_errors("reading the scratch tables"):
                tables = await find_tables(connection, owned_names(self._scratch))
                existing = [(table.schema, table.name) for table in tables]
                if selection is not None:
                    return self._selected(loaded, selection, existing)
                in_backup = set(loaded.tables.values())
                found: list[Name] = []
                for table, name in zip(tables, existing, strict=True):
                    if name in in_backup or await connection.fetchval(f"SELECT EXISTS (SELECT FROM {table.quoted})"):  # noqa: S608
                        found.append(name)
        return list(load.translated_names(found, self._scratch, self.schemas).values())

    def _selected(self, loaded: Loaded, selection: Selection, existing: Sequence[Name]) -> list[Name]:
        names = [loaded.tables[name] for name in selection.tables if name in loaded.tables]
        gone = [".".join(name) for name in selection.tables if loaded.tables.get(name) not in existing]
        if gone:
            raise BackupError(
                f"the revisions since the backup have replaced table {', '.join(gone)}: restore the whole backup."
                " Nothing was changed"
            )
        names += [name for name in existing if name[0] == self._scratch.ops]
        return list(load.translated_names(names, self._scratch, self.schemas).values())
