"""/mirror: how far the mirror has come, and a reconcile on demand."""

from __future__ import annotations

import asyncio

import discord
from discord import app_commands
from discord.ext import commands

from models import mirrored_tables
from utils.bot.client import Guildbook
from utils.exceptions import GuildbookError, SyncError, ValidationError
from utils.mirror.records.rows import Run, tombstone_column
from utils.operations import slash
from utils.operations.slash import Reply

#: Guilds that `/mirror sync` has in work at once; the reconcile's own lanes do the rest.
AT_ONCE = 8
#: Seconds between two looks at a sync under way; Discord is told less often.
LOOK_SECONDS = 0.25
LAST_RUNS = 5


class MirrorCommands(commands.Cog):
    """The operators' window on the mirror."""

    mirror = app_commands.Group(name="mirror", description="The mirror of this bot's guilds (operators only)")

    def __init__(self, bot: Guildbook) -> None:
        self.bot: Guildbook = bot

    @mirror.command(name="status", description="How far the mirror has come, and what is in the database")
    async def status(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Show progress, the last reconciles and the row counts."""
        await slash.operate(interaction, "mirror status", self._status)

    @mirror.command(name="sync", description="Compare with Discord now, and write what differs")
    @app_commands.describe(guild="The guild's id; without it, every guild")
    async def sync(self, interaction: discord.Interaction[Guildbook], guild: str | None = None) -> None:
        """Reconcile one guild, or all of them."""

        async def work(reply: Reply) -> str:
            return await (self._sync_all(reply) if guild is None else self._sync_one(reply, self._known(guild)))

        await slash.operate(interaction, "mirror sync", work, guild=guild)

    async def _status(self, reply: Reply) -> str:
        ready, progress = self.bot.mirror.is_ready()
        lines = [
            f"**{'Up to date' if ready else 'Catching up'}**: {progress['available']:,} guilds available,"
            f" {progress['reconciled']:,} reconciled, {progress['waiting']:,} waiting, {progress['running']:,} running;"
            f" {len(self.bot.mirror.writer.buffer):,} rows wait to be written"
        ]
        counts = [f"{name} {await self._count(name):,}" for name in mirrored_tables()]
        lines += ["**In the database**: " + ", ".join(counts), "**Last reconciles**"]
        rows = await self.bot.db.fetch(
            "SELECT guild_id, finished_at, source, reason, error, rows_seen, rows_inserted, rows_updated, rows_left"
            " FROM sync_runs ORDER BY id DESC LIMIT $1",
            LAST_RUNS,
        )
        for row in rows:
            figures = f"{row['rows_seen']:,} seen, {row['rows_inserted']:,} new, {row['rows_updated']:,} changed"
            outcome = f"{figures}, {row['rows_left']:,} left" if row["error"] is None else f"failed: {row['error']}"
            when = discord.utils.format_dt(row["finished_at"], "R")
            lines.append(f"{self._name(row['guild_id'])} {when} ({row['reason']}, {row['source']}): {outcome}")
        return "\n".join(lines if rows else [*lines, "none yet"])

    async def _count(self, table: str) -> int:
        tombstone = tombstone_column(table)
        there = f" WHERE {tombstone} IS NULL" if tombstone is not None else ""
        count: int = await self.bot.db.fetchval(f"SELECT count(*) FROM {table}{there}")  # noqa: S608 - names from models/
        return count

    async def _sync_one(self, reply: Reply, guild_id: int) -> str:
        runs = await self._followed(reply, [guild_id])
        return f"Synced {self._name(guild_id)}: {self._figures(runs)}"

    async def _sync_all(self, reply: Reply) -> str:
        states = self.bot.mirror.reconciler.guilds.values()
        ids = [state.id for state in states if state.available]
        if not ids:
            raise SyncError("no guild is available: Discord has an outage, or the bot is in none")
        runs = await self._followed(reply, ids)
        return f"Synced {len(ids):,} guilds: {self._figures(runs)}"

    async def _followed(self, reply: Reply, ids: list[int]) -> list[Run]:
        """Sync some guilds and show how it goes."""
        turn, runs = asyncio.Semaphore(AT_ONCE), list[Run]()

        async def sync(guild_id: int) -> None:
            async with turn:
                runs.append(await self.bot.mirror.sync(guild_id))

        tasks = {asyncio.create_task(sync(guild_id)) for guild_id in ids}
        try:
            while True:
                done, left = await asyncio.wait(tasks, timeout=LOOK_SECONDS)
                if not left:
                    break
                await reply.progress(self._progress(ids, len(done)))
        finally:
            for task in tasks:
                task.cancel()
        errors = [error for task in tasks if (error := task.exception()) is not None]
        unforeseen = [error for error in errors if not isinstance(error, GuildbookError | discord.DiscordException)]
        if unforeseen:
            raise unforeseen[0]
        if errors:
            others = f" ({len(errors):,} of {len(ids):,} guilds failed)" if len(ids) > 1 else ""
            raise SyncError(f"{errors[0]}{others}")
        return runs

    def _progress(self, ids: list[int], finished: int) -> str:
        guilds = self.bot.mirror.reconciler.guilds
        listings = [state.listing for id in ids if (state := guilds.get(id)) is not None and state.listing is not None]
        pages, members = sum(listing.pages for listing in listings), sum(listing.seen for listing in listings)
        if len(ids) > 1:
            return f"Syncing: {finished:,} of {len(ids):,} guilds done, {members:,} members of others so far"
        if not listings:
            return f"Syncing {self._name(ids[0])}: waiting for its turn (Discord gives a full list every 30 s)"
        return f"Syncing {self._name(ids[0])}: {members:,} members in {pages:,} pages so far"

    def _figures(self, runs: list[Run]) -> str:
        begun = min(run.started_at for run in runs)
        seconds = (self.bot.db.now() - begun).total_seconds()
        sources = " and ".join(sorted({run.source for run in runs}))
        return (
            f"{sum(run.rows_seen for run in runs):,} members in {sum(run.pages for run in runs):,} pages ({sources}),"
            f" {sum(run.rows_inserted for run in runs):,} new, {sum(run.rows_updated for run in runs):,} changed,"
            f" {sum(run.rows_left for run in runs):,} left, {seconds:.1f} s"
        )

    def _known(self, text: str) -> int:
        digits = text.strip()
        if not (digits.isascii() and digits.isdigit() and 0 < int(digits) < 2**63):
            raise ValidationError(
                f"{text[:50]!r} is no guild id: expected digits (Developer Mode on, right-click the guild, Copy ID)"
            )
        if int(digits) not in self.bot.mirror.reconciler.guilds:
            raise ValidationError(f"the bot is in no guild with the id {digits}")
        return int(digits)

    def _name(self, guild_id: int) -> str:
        guild = self.bot.get_guild(guild_id)
        return (
            f"{discord.utils.escape_markdown(guild.name)} ({guild_id})" if guild and guild.name else f"guild {guild_id}"
        )


async def setup(bot: Guildbook) -> None:
    """Add the cog where operators are."""
    await slash.add_cog(bot, MirrorCommands(bot))
