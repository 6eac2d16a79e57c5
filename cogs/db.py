"""/db: the operators' hands on the database. Everything here is also on the command line (`python bot.py db …`)."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import discord
from discord import app_commands

from utils.base_cog import BaseCog
from utils.bot.client import Guildbook
from utils.database import Pool
from utils.exceptions import GuildbookError, MigrationError, ValidationError
from utils.operations import slash
from utils.operations.action import Outcome
from utils.operations.backup.service import BackupService
from utils.operations.doctor import DoctorContext, run_checks
from utils.operations.importing import exporting, importer
from utils.operations.migrations import Actor, admin
from utils.operations.migrations.preview import preview as written
from utils.operations.slash import Answer, Reply
from utils.operations.upkeep import maintain, picture
from utils.operations.upkeep.statistics import Statistics, collect, figures
from utils.text import format_bytes

#: Discord's bounds of an embed's field (API reference, "Embed Limits").
FIELD = 1_024
#: Where files for `/db import` are looked for, under DATA_DIR: a name from Discord leads nowhere else.
IMPORTS = "import"
#: Where `/db export` writes.
EXPORTS = "export"

Action = Callable[[Reply], Awaitable[str | Outcome | Answer]]


class DatabaseCommands(BaseCog):
    """Migrate, back up, restore, import, and look."""

    db_group = app_commands.Group(name="db", description="The database of this bot (operators only)")
    migrate = app_commands.Group(name="migrate", description="The schema", parent=db_group)
    backup = app_commands.Group(name="backup", description="Backups", parent=db_group)

    # --- looking

    @db_group.command(name="stats", description="What the tables hold, how they grow, and how the database fares")
    async def stats(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Show the figures and a picture."""

        async def work(reply: Reply) -> Answer:
            backups = [{"id": known.id, "line": known.line} for known in (await self._vault().known())[:3]]
            found = await collect(self._database, bot=self.bot.stats(), backups=backups)
            try:
                drawn: bytes | None = await picture.draw(found)
            except GuildbookError as exc:  # the figures matter more
                self.log.warning("the statistics are shown without their picture: %s", exc)
                drawn = None
            return _embedded(found, drawn)

        await slash.operate(interaction, "db stats", work)

    @db_group.command(name="health", description="Check settings, database, rights, disk, clock and tools")
    async def health(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Run the doctor's checks."""

        async def work(reply: Reply) -> Outcome:
            findings = await run_checks(_BotContext(self._database))
            return Outcome(
                "\n".join(finding.line for finding in findings),
                ok=all(finding.state != "fail" for finding in findings),
            )

        await self._run(interaction, "db health", work)

    @db_group.command(name="maintain", description="Analyse, rebuild bloated indexes, refresh views, make partitions")
    async def maintain(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Show what would be done, ask, and do it."""

        async def work(reply: Reply) -> Outcome:
            would = await maintain.preview(self._database)
            await reply.confirm(f"This would be done:\n{would.text}", "Do it")
            return await maintain.maintain(self._database, progress=reply.step)

        await self._run(interaction, "db maintain", work)

    @db_group.command(name="import", description="Import JSON files that lie in DATA_DIR/import on the bot's machine")
    @app_commands.describe(
        name="A file or directory there; without it, all of them",
        dry_run="Only say what would be written (the default)",
    )
    async def import_(
        self, interaction: discord.Interaction[Guildbook], name: str | None = None, dry_run: bool = True
    ) -> None:
        """Import, or say what an import would do."""

        async def work(reply: Reply) -> Outcome:
            settings, path = self.bot.settings, self._path(IMPORTS, name)
            if not dry_run:
                await reply.confirm(f"Import {path.name} into the database?", "Import")
            return await importer.import_files(self._database, settings, [path], dry_run, progress=reply.step)

        await self._run(interaction, "db import", work, name=name, dry_run=dry_run)

    @db_group.command(name="export", description="Write documents or a table into DATA_DIR/export on the bot's machine")
    @app_commands.describe(
        what="members, users, emojis or shop as imported; a table; or a namespace of documents", form="The format"
    )
    async def export(
        self, interaction: discord.Interaction[Guildbook], what: str, form: Literal["json", "jsonl", "csv"] = "json"
    ) -> None:
        """Export to a file that stays there: people's data is not sent through Discord."""

        async def work(reply: Reply) -> Outcome:
            file = self._path(EXPORTS, f"{what.strip().replace(':', '_')}.{form}")
            return await exporting.export(self._database, what.strip(), file, form=form, progress=reply.step)

        await self._run(interaction, "db export", work, what=what, form=form)

    def _path(self, directory: str, name: str | None) -> Path:
        """Return a path under DATA_DIR. Raises `ValidationError` for a name that leads elsewhere."""
        root = (self.bot.settings.data_dir / directory).resolve()
        path = (root / (name or ".")).resolve()
        if path != root and root not in path.parents:
            raise ValidationError(f"{name!r:.100} leads out of DATA_DIR/{directory}: expected a name in there")
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        return path

    # --- the schema

    @migrate.command(name="status", description="The schema's revision, what waits, and what differs from the models")
    async def status(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Show where the schema is."""
        await self._run(
            interaction, "db migrate status", lambda reply: admin.status(self._database, progress=reply.step)
        )

    @migrate.command(name="history", description="Every revision of the schema, and when it was applied")
    async def history(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Show all revisions."""
        await self._run(
            interaction, "db migrate history", lambda reply: admin.history(self._database, progress=reply.step)
        )

    @migrate.command(name="preview", description="The SQL that a migration would run, as a file")
    @app_commands.describe(revision="Where to; without it the newest, or the one before", down="Back instead of on")
    async def preview(
        self, interaction: discord.Interaction[Guildbook], revision: str | None = None, down: bool = False
    ) -> None:
        """Show the SQL."""
        await self._run(
            interaction,
            "db migrate preview",
            lambda reply: written(self._database, revision, down=down, progress=reply.step),
            revision=revision,
            down=down,
        )

    @migrate.command(name="upgrade", description="Bring the schema up to date")
    async def upgrade(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Show what would be done, ask, and do it."""

        async def work(reply: Reply) -> Outcome:
            would = await written(self._database)
            await reply.confirm(would.text, "Upgrade")
            by = Actor("discord", interaction.user.id)
            outcome = await admin.upgrade(self._database, by=by, progress=reply.step)
            await self.db.renew()
            return outcome

        await self._run(interaction, "db migrate upgrade", work)

    @migrate.command(name="downgrade", description="Take the schema back; the bot ends, and starts with older code")
    @app_commands.describe(revision="Where to: a revision's number")
    async def downgrade(self, interaction: discord.Interaction[Guildbook], revision: str) -> None:
        """Show what would be lost, ask, back up, take the schema down, and end."""

        async def work(reply: Reply) -> Outcome:
            would = await written(self._database, revision, down=True)
            warning = "A backup is made first. Then this bot ends: it cannot work on an older schema."
            await reply.confirm(f"{would.text}\n{warning}", "Downgrade")

            async def save() -> str:
                return await self._vault().save(self._database, "before downgrade", reply.step)

            outcome = await admin.downgrade(
                self._database,
                revision,
                backup=save,
                exclusive=_together,
                by=Actor("discord", interaction.user.id),
                progress=reply.step,
            )
            self.bot.shut_down(
                MigrationError(
                    f"an operator took the schema down to {revision}: start the version that fits it, or bring it up"
                    " again (python bot.py db upgrade)"
                )
            )
            return outcome

        await self._run(interaction, "db migrate downgrade", work, revision=revision)

    @migrate.command(
        name="stamp", description="Note a revision without running anything, if the tables are what it says"
    )
    @app_commands.describe(revision="A revision's number, or head")
    async def stamp(self, interaction: discord.Interaction[Guildbook], revision: str = "head") -> None:
        """Set the revision."""

        async def work(reply: Reply) -> Outcome:
            await reply.confirm(f"Note that the schema is at {revision}, without running anything?", "Stamp")
            return await admin.stamp(self._database, revision, by=Actor("discord", interaction.user.id))

        await self._run(interaction, "db migrate stamp", work, revision=revision)

    # --- backups

    @backup.command(name="create", description="Back the database up")
    @app_commands.describe(tables="Only these tables, separated by commas", schema_only="No rows")
    async def create(
        self, interaction: discord.Interaction[Guildbook], tables: str | None = None, schema_only: bool = False
    ) -> None:
        """Make a backup."""

        async def work(reply: Reply) -> Outcome:
            names = [name.strip() for name in (tables or "").split(",") if name.strip()]
            return await self._vault().create(
                self._database, tables=names, schema_only=schema_only, progress=reply.step
            )

        await self._run(interaction, "db backup create", work, tables=tables, schema_only=schema_only)

    @backup.command(name="list", description="The backups that there are, and how their last drill went")
    async def list_(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Show all backups."""
        await self._run(interaction, "db backup list", lambda reply: self._vault().listing())

    @backup.command(name="verify", description="Check that a backup is whole")
    @app_commands.describe(id="Its id, or latest")
    async def verify(self, interaction: discord.Interaction[Guildbook], id: str = "latest") -> None:
        """Check a backup."""
        await self._run(
            interaction, "db backup verify", lambda reply: self._vault().verify(id, progress=reply.step), id=id
        )

    @backup.command(name="drill", description="Restore a backup beside the database and compare, changing nothing")
    @app_commands.describe(id="Its id, or latest")
    async def drill(self, interaction: discord.Interaction[Guildbook], id: str = "latest") -> None:
        """Prove that a backup comes back."""
        await self._run(
            interaction,
            "db backup drill",
            lambda reply: self._vault().drill(self._database, id, progress=reply.step),
            id=id,
        )

    @backup.command(name="restore", description="Put a backup in the database's place; a backup is made before")
    @app_commands.describe(id="Its id, or latest")
    async def restore(self, interaction: discord.Interaction[Guildbook], id: str = "latest") -> None:
        """Ask, and restore; the bot stays connected, and reconciles afterwards."""

        async def work(reply: Reply) -> Outcome:
            known = await self._vault().find(id)
            await reply.confirm(f"Put this in the database's place? {known.line}", "Restore")
            return await self._vault().restore(
                self._database, known.id, progress=reply.step, after=self.bot.reconnect_gateway
            )

        await self._run(interaction, "db backup restore", work, id=id)

    @backup.command(name="prune", description="Delete the backups that BACKUP_KEEP does not keep")
    async def prune(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Show what would go, ask, and delete it."""

        async def work(reply: Reply) -> Outcome:
            would = await self._vault().prune(dry_run=True)
            await reply.confirm(would.text, "Delete")
            return await self._vault().prune()

        await self._run(interaction, "db backup prune", work)

    @property
    def _database(self) -> Pool:
        return self.db.pool

    def _vault(self) -> BackupService:
        return BackupService(self.bot.settings)

    async def _run(
        self, interaction: discord.Interaction[Guildbook], command: str, work: Action, **arguments: Any
    ) -> None:
        await slash.operate(interaction, command, work, **arguments)


class _BotContext(DoctorContext):
    """Checks the running bot's own pool, and leaves it open."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self._bot_pool = pool

    async def _connect(self) -> Pool:
        return self._bot_pool


def _together(database: Pool) -> contextlib.AbstractAsyncContextManager[None]:
    """Let the schema be taken down while a bot acts: it is the one that was asked to."""
    return contextlib.nullcontext()


def _embedded(found: Statistics, drawn: bytes | None) -> Answer:
    lines = figures(found)
    embed = discord.Embed(
        title=f"PostgreSQL {found.server['version']}, {format_bytes(found.server['bytes'])}", timestamp=found.at
    )
    for name, value in lines.items():
        embed.add_field(name=name, value=discord.utils.escape_markdown(value)[:FIELD], inline=len(value) < 60)
    if drawn is not None:
        embed.set_image(url="attachment://statistics.png")
    text = f"{len(found.tables)} tables, {format_bytes(found.server['bytes'])}"
    return Answer(text, embed, None if drawn is None else ("statistics.png", drawn))


async def setup(bot: Guildbook) -> None:
    """Add the cog where operators are."""
    await slash.add_cog(bot, DatabaseCommands(bot))
