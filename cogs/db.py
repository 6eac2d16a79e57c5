"""The commands of /db, for operators. The command line has all of them too (`python bot.py db …`, `backup …`)."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import discord
from discord import app_commands

from utils.base_cog import BaseCog
from utils.bot.client import Guildbook
from utils.database import Pool
from utils.exceptions import DatabaseError, GuildbookError, MigrationError, ValidationError
from utils.operations import slash
from utils.operations.action import Outcome
from utils.operations.backup import recovery
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.catalog.keeping import drops_among, list_with_problems
from utils.operations.backup.create import backup_before
from utils.operations.backup.restore.selection import check_options, describe_options
from utils.operations.backup.service import BackupService
from utils.operations.doctor import DoctorContext, run_checks, summarize_findings
from utils.operations.doctor.context import CONNECT_SECONDS
from utils.operations.importing import exporting, importer
from utils.operations.migrations import Actor, admin, current
from utils.operations.migrations.preview import preview as preview_migration
from utils.operations.slash import Answer, Reply
from utils.operations.upkeep import maintain, picture
from utils.operations.upkeep.statistics import Statistics, collect, summarize
from utils.text import format_bytes, format_count

#: Most characters of an embed field (API reference, "Embed Limits").
FIELD_LENGTH = 1_024
#: The directories of `/db import` and `/db export` under DATA_DIR; a name from Discord cannot lead out of them.
IMPORTS = "import"
EXPORTS = "export"

Action = Callable[[Reply], Awaitable[str | Outcome | Answer]]


class DatabaseCommands(BaseCog):
    """Statistics, maintenance, import and export, migrations and backups."""

    db_group = app_commands.Group(name="db", description="The database of this bot (operators only)")
    migrate = app_commands.Group(name="migrate", description="The schema", parent=db_group)
    backup = app_commands.Group(name="backup", description="Backups", parent=db_group)

    # --- the data

    @db_group.command(name="stats", description="Table sizes, their growth, and what database and bot are doing")
    async def stats(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Show the statistics with a chart."""

        async def work(reply: Reply) -> Answer:
            backups, problems = await list_with_problems((await self._backups()).catalog)
            statistics = await collect(self._database, bot=self.bot.stats(), backups=backups, problems=problems)
            try:
                chart: bytes | None = await picture.draw(statistics)
            except GuildbookError as exc:  # the numbers matter more
                self.log.warning("could not draw the chart of the statistics: %s", exc)
                chart = None
            return self._to_embed(statistics, chart)

        await slash.operate(interaction, "db stats", work)

    @db_group.command(name="health", description="Check settings, database, privileges, disk, clock and tools")
    async def health(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Run the doctor's checks."""

        async def work(reply: Reply) -> Outcome:
            findings = await run_checks(BotContext(self.bot, self._database))
            return summarize_findings(findings)

        await self._run(interaction, "db health", work)

    @db_group.command(
        name="maintain", description="Analyze tables, rebuild bloated indexes, refresh views, create partitions"
    )
    async def maintain(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Show the due jobs, ask, and do them."""

        async def work(reply: Reply) -> Outcome:
            jobs = await maintain.preview(self._database)
            if not jobs.data["jobs"]:
                return jobs
            number = len(jobs.data["jobs"])
            due = f"{format_count(number, 'job')} {'is' if number == 1 else 'are'} due:"
            await reply.confirm(f"{due}\n{jobs.text}", "Do it")
            return await maintain.maintain(self._database, progress=reply.step)

        await self._run(interaction, "db maintain", work)

    @db_group.command(name="import", description="Import JSON files from DATA_DIR/import on the bot's machine")
    @app_commands.describe(
        name="A file or directory there; all by default",
        dry_run="Only show what would be written (the default)",
    )
    async def import_(
        self, interaction: discord.Interaction[Guildbook], name: str | None = None, dry_run: bool = True
    ) -> None:
        """Import files, or show what an import would write."""

        async def work(reply: Reply) -> Outcome:
            settings, path = self.bot.settings, self._path(IMPORTS, name)
            await self._require_no_hold()
            found = await importer.import_files(self._database, settings, [path], dry_run=True, progress=reply.step)
            if dry_run:
                return found
            if not importer.has_changes(found):
                return replace(found, text=f"Nothing to import: {found.text}")
            await reply.confirm(f"{found.text}\nImport this into the database?", "Import")
            return await importer.import_files(self._database, settings, [path], progress=reply.step)

        await self._run(interaction, "db import", work, name=name, dry_run=dry_run)

    @db_group.command(name="export", description="Write documents or a table to DATA_DIR/export on the bot's machine")
    @app_commands.describe(
        what="members, users, emojis or shop as imported; a table; or a namespace of documents", form="The format"
    )
    async def export(
        self, interaction: discord.Interaction[Guildbook], what: str, form: Literal["json", "jsonl", "csv"] = "json"
    ) -> None:
        """Export to a file on the bot's machine: personal data is not sent through Discord."""

        async def work(reply: Reply) -> Outcome:
            file = self._path(EXPORTS, f"{what.strip().replace(':', '_')}.{form}")
            return await exporting.export(self._database, what.strip(), file, form=form, progress=reply.step)

        await self._run(interaction, "db export", work, what=what, form=form)

    @db_group.command(name="begin-anew", description="Create the schema in an empty database, and fill it from Discord")
    async def begin_anew(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Ask, and end the hold on an empty database without restoring a backup."""

        async def work(reply: Reply) -> Outcome:
            await recovery.require_empty(self._database)
            await reply.confirm(
                "Begin anew? Members, roles and channels are filled from Discord; the history is only in the backups.",
                "Begin anew",
            )
            by = Actor("discord", interaction.user.id)
            return await recovery.begin_anew(self._database, by=by, progress=reply.step)

        await self._run(interaction, "db begin-anew", work)

    def _path(self, directory: str, name: str | None) -> Path:
        """Return a path under a directory of DATA_DIR. Raises `ValidationError` for a name that leads out of it."""
        root = (self.bot.settings.data_dir / directory).resolve()
        path = (root / (name or ".")).resolve()
        if path != root and root not in path.parents:
            raise ValidationError(f"{name!r:.100} leads out of DATA_DIR/{directory}: expected a name in there")
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        return path

    # --- the schema

    @migrate.command(name="status", description="The current revision, pending revisions, and drift from the models")
    async def status(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Show the state of the schema."""
        await self._run(
            interaction, "db migrate status", lambda reply: admin.status(self._database, progress=reply.step)
        )

    @migrate.command(name="history", description="All revisions, and when and by whom each was applied")
    async def history(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Show all revisions."""
        await self._run(
            interaction,
            "db migrate history",
            lambda reply: admin.history(
                self._database, progress=reply.step, format_time=_format_time, name_user="<@{}>".format
            ),
        )

    @migrate.command(name="preview", description="The SQL that a migration would run, as a file")
    @app_commands.describe(revision="The newest by default, or for a downgrade the previous one", down="A downgrade")
    async def preview(
        self, interaction: discord.Interaction[Guildbook], revision: str | None = None, down: bool = False
    ) -> None:
        """Show the SQL."""
        await self._run(
            interaction,
            "db migrate preview",
            lambda reply: preview_migration(self._database, revision, down=down, progress=reply.step),
            revision=revision,
            down=down,
        )

    @migrate.command(name="upgrade", description="Apply the pending revisions")
    async def upgrade(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Show the migration, ask, and run it."""

        async def work(reply: Reply) -> Outcome:
            await self._require_no_hold()
            migration = await admin.plan_upgrade(self._database, progress=reply.step)
            if migration is None:
                return Outcome(f"the schema is at {await current(self._database)}, the newest revision: nothing to do")
            warning = "\nA backup is made first." if migration.data["loses_rows"] else ""
            await reply.confirm(f"{migration.text}{warning}", "Upgrade")
            by = Actor("discord", interaction.user.id)
            backup = backup_before("before upgrade", self.bot.settings, self._database, reply.step)
            outcome = await admin.upgrade(self._database, backup=backup, by=by, progress=reply.step)
            await self.db.renew()
            return outcome

        await self._run(interaction, "db migrate upgrade", work)

    @migrate.command(
        name="downgrade", description="Revert revisions; the bot then stops, to be started with an older version"
    )
    @app_commands.describe(revision="The number of a revision")
    async def downgrade(self, interaction: discord.Interaction[Guildbook], revision: str) -> None:
        """Show what would be lost, ask, back up, downgrade the schema, and shut down."""

        async def work(reply: Reply) -> Outcome:
            migration = await admin.plan_downgrade(self._database, revision, progress=reply.step)
            if migration is None:
                return Outcome(f"the schema is at {await current(self._database)} already: nothing to do")
            warning = "A backup is made first. Then this bot shuts down: it cannot work on an older schema."
            await reply.confirm(f"{migration.text}\n{warning}", "Downgrade")
            outcome = await admin.downgrade(
                self._database,
                revision,
                backup=backup_before("before downgrade", self.bot.settings, self._database, reply.step),
                exclusive=_allow_own_lease,
                by=Actor("discord", interaction.user.id),
                progress=reply.step,
            )
            if outcome.data["taken_back"]:
                self.bot.shut_down(
                    MigrationError(
                        f"an operator downgraded the schema to {revision}: start a version that fits, or upgrade again"
                        " (python bot.py db upgrade)"
                    )
                )
            return outcome

        await self._run(interaction, "db migrate downgrade", work, revision=revision)

    @migrate.command(name="stamp", description="Record a revision without running it, if the schema is what it makes")
    @app_commands.describe(revision="The number of a revision, or head")
    async def stamp(self, interaction: discord.Interaction[Guildbook], revision: str = "head") -> None:
        """Compare, ask, and record the revision."""

        async def work(reply: Reply) -> Outcome:
            checked = await admin.check_stamp(self._database, revision, progress=reply.step)
            if not checked.is_recorded:
                question = f"Record that the schema is at {checked.goal}, without running anything?"
                await reply.confirm(f"{checked.line}. {question}", "Stamp")
            return await admin.record_stamp(self._database, checked, by=Actor("discord", interaction.user.id))

        await self._run(interaction, "db migrate stamp", work, revision=revision)

    # --- backups

    @backup.command(name="create", description="Back the database up")
    @app_commands.describe(tables="Only these tables, separated by commas", schema_only="No rows")
    async def create(
        self, interaction: discord.Interaction[Guildbook], tables: str | None = None, schema_only: bool = False
    ) -> None:
        """Make a backup."""

        async def work(reply: Reply) -> Outcome:
            return await (await self._backups()).create(
                self._database, tables=_split(tables), schema_only=schema_only, progress=reply.step
            )

        await self._run(interaction, "db backup create", work, tables=tables, schema_only=schema_only)

    @backup.command(name="list", description="The backups that there are, and how their last drill went")
    async def list_(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Show all backups."""

        async def work(reply: Reply) -> Outcome:
            return await (await self._backups()).list()

        await self._run(interaction, "db backup list", work)

    @backup.command(name="verify", description="Check that a backup is whole")
    @app_commands.describe(id="Its id, or latest")
    async def verify(self, interaction: discord.Interaction[Guildbook], id: str = "latest") -> None:
        """Check a backup."""

        async def work(reply: Reply) -> Outcome:
            return await (await self._backups()).verify(id, progress=reply.step)

        await self._run(interaction, "db backup verify", work, id=id)

    @backup.command(name="drill", description="Restore a backup into scratch tables and compare, changing nothing")
    @app_commands.describe(id="Its id, or latest")
    async def drill(self, interaction: discord.Interaction[Guildbook], id: str = "latest") -> None:
        """Prove that a backup comes back."""

        async def work(reply: Reply) -> Outcome:
            return await (await self._backups()).drill(self._database, id, progress=reply.step)

        await self._run(interaction, "db backup drill", work, id=id)

    @backup.command(name="restore", description="Replace Guildbook's rows by a backup's; a backup is made before")
    @app_commands.describe(
        id="Its id, or latest",
        whole_database="Replace the database with everything in it, after naming what is lost",
        drop_old="With whole_database: drop the old database at once instead of keeping it",
        from_other="Also a backup of another database or application",
        tables="Only the rows of these tables, separated by commas",
        guild="Only the documents of the guild with this id; 0: those of none",
    )
    async def restore(
        self,
        interaction: discord.Interaction[Guildbook],
        id: str = "latest",
        whole_database: bool = False,
        drop_old: bool = False,
        from_other: bool = False,
        tables: str | None = None,
        guild: str | None = None,
    ) -> None:
        """Ask, and restore; the bot stays connected, and reconciles afterwards."""
        names = _split(tables)

        async def work(reply: Reply) -> Outcome:
            guild_id = None if guild is None else slash.parse_guild_id(guild)
            check_options(names, guild_id, whole_database=whole_database, drop_old=drop_old)
            service = await self._backups()
            entry, text = await service.describe_restore(self._database, id)
            what = describe_options(names, guild_id, whole_database=whole_database)
            question = f"Replace {what} by this backup? {text}"
            if whole_database:
                losses = await service.find_losses(self._database, entry.id)
                question += f". This would be lost: {', '.join(losses) or 'nothing that is not in it'}"
            await reply.confirm(question, "Restore")
            # A bot that holds the database starts over, and reconciles then.
            after = None if self.bot.is_held else self.bot.reconnect_gateway
            return await service.restore(
                self._database,
                entry.id,
                whole_database=whole_database,
                drop_old=drop_old,
                from_other=from_other,
                tables=names,
                documents_of=guild_id,
                progress=reply.step,
                after=after,
            )

        arguments = {
            "id": id,
            "whole_database": whole_database,
            "drop_old": drop_old,
            "from_other": from_other,
            "tables": names,
            "guild": guild,
        }
        await self._run(interaction, "db backup restore", work, **arguments)

    @backup.command(name="push", description="Upload backups that the remote store lacks")
    @app_commands.describe(id="One backup; by default all that are missing there")
    async def push(self, interaction: discord.Interaction[Guildbook], id: str | None = None) -> None:
        """Upload backups."""

        async def work(reply: Reply) -> Outcome:
            return await (await self._backups()).push(id, progress=reply.step)

        await self._run(interaction, "db backup push", work, id=id)

    @backup.command(name="accept", description="Say that a backup may have much less than the ones before it")
    @app_commands.describe(id="Its id, or latest")
    async def accept(self, interaction: discord.Interaction[Guildbook], id: str = "latest") -> None:
        """Ask, and let retention go on."""

        async def work(reply: Reply) -> Outcome:
            service = await self._backups()
            entry, (entries, _) = await service.catalog.find(id), await service.catalog.scan()
            if entry.id not in {drop.after.id for drop in drops_among(entries)}:
                return Outcome(f"Nothing to accept: backup {entry.id} does not have much less than the ones before it.")
            await reply.confirm(f"May this backup have less than the ones before it? {entry.line}", "Accept")
            return await service.accept(entry.id)

        await self._run(interaction, "db backup accept", work, id=id)

    @backup.command(name="prune", description="Delete the backups that BACKUP_KEEP does not keep")
    async def prune(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Show what would go, ask, and delete it."""

        async def work(reply: Reply) -> Outcome:
            service = await self._backups()
            would = await service.prune(dry_run=True)
            if not would.data["deleted"] and not would.data["files"]:
                return replace(would, text="Nothing to delete: every backup is kept.") if would.ok else would
            await reply.confirm(would.text, "Delete")
            return await service.prune()

        await self._run(interaction, "db backup prune", work)

    def _to_embed(self, statistics: Statistics, chart: bytes | None) -> Answer:
        size = format_bytes(statistics.server["bytes"])
        embed = discord.Embed(title=f"PostgreSQL {statistics.server['version']}, {size}", timestamp=statistics.at)
        lines = summarize(statistics, name_guild=self._name_guild, format_time=_format_time)
        for name, value in lines.items():
            embed.add_field(
                name=name, value=discord.utils.escape_markdown(value)[:FIELD_LENGTH], inline=len(value) < 60
            )
        if chart is not None:
            embed.set_image(url="attachment://statistics.png")
        text = f"{format_count(len(statistics.tables), 'table')}, {size}"
        return Answer(text, embed, None if chart is None else ("statistics.png", chart))

    def _name_guild(self, guild_id: int) -> str:
        guild = self.bot.get_guild(guild_id)
        return guild.name if guild is not None and guild.name else f"guild {guild_id}"

    @property
    def _database(self) -> Pool:
        return self.db.pool

    async def _require_no_hold(self) -> None:
        """Raise `BackupError` if the database is held: what fills it would hide what was lost."""
        await recovery.require_no_hold(self._database, BackupCatalog(self.bot.settings))

    async def _backups(self) -> BackupService:
        """Return the service for the backups of this database; as the settings name it while it does not answer."""
        catalog = BackupCatalog(self.bot.settings)
        with contextlib.suppress(DatabaseError):
            catalog = await catalog.serving(self._database)
        return BackupService(self.bot.settings, catalog=catalog)

    async def _run(
        self, interaction: discord.Interaction[Guildbook], command: str, work: Action, **arguments: Any
    ) -> None:
        await slash.operate(interaction, command, work, **arguments)


class BotContext(DoctorContext):
    """Checks the running bot with its settings and its pool, which is left open."""

    is_bot = True

    def __init__(self, bot: Guildbook, pool: Pool) -> None:
        super().__init__()
        self._settings = bot.settings
        self._bot_pool = pool
        self._loader = bot.loader

    def cog_problems(self) -> list[str]:
        """Return why cogs are not loaded, and the warnings of the others."""
        states = self._loader.states()
        failed = [f"{state.name} is not loaded: {state.reason}" for state in states if state.state == "failed"]
        return failed + [f"{state.name}: {warning}" for state in states for warning in state.warnings]

    async def _connect(self) -> Pool:
        async with self._bot_pool.acquire(CONNECT_SECONDS) as connection:  # it may have been lost since
            await connection.fetchval("SELECT 1", timeout=CONNECT_SECONDS)
        return self._bot_pool


def _split(names: str | None) -> list[str]:
    """Return the names in a list separated by commas."""
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def _format_time(at: datetime) -> str:
    """Return a time as Discord shows it to each reader: `5 minutes ago`."""
    return discord.utils.format_dt(at, "R")


def _allow_own_lease(pool: Pool) -> contextlib.AbstractAsyncContextManager[None]:
    """Let a downgrade run although a bot acts: this one does, and it was asked to."""
    return contextlib.nullcontext()


async def setup(bot: Guildbook) -> None:
    """Add the cog to the operators' guild or to direct messages."""
    await slash.add_cog(bot, DatabaseCommands(bot))
