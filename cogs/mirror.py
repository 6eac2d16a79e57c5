"""/mirror: the mirror's status, and reconciling on demand."""

from __future__ import annotations

import asyncio

import discord
from discord import app_commands
from discord.ext import commands

from models import mirrored_tables
from utils.base_cog import Guildbook
from utils.exceptions import GuildbookError, SyncError, ValidationError
from utils.mirror.discord.permissions import invite_url, missing_in
from utils.mirror.records.rows import Run, tombstone_column
from utils.operations import slash
from utils.operations.slash import Reply
from utils.text import format_count

#: Guilds that `/mirror sync` reconciles at the same time. The reconciler has limits of its own.
CONCURRENCY = 8
#: Seconds between two checks of a running sync. The reply is edited less often.
CHECK_INTERVAL = 0.25
#: Reconciles shown by `/mirror status`.
SHOWN_RUNS = 5
#: Guilds with missing permissions shown by `/mirror status`.
SHOWN_GUILDS = 5
#: Guilds whose permissions are computed without giving others a turn.
GUILDS_AT_ONCE = 100


class MirrorCommands(commands.Cog):
    """Operator commands for the mirror."""

    mirror = app_commands.Group(name="mirror", description="The mirror of this bot's guilds (operators only)")

    def __init__(self, bot: Guildbook) -> None:
        self.bot: Guildbook = bot

    @mirror.command(name="status", description="Show the mirror's progress and what is in the database")
    async def status(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Show progress, row counts and the last reconciles."""
        await slash.operate(interaction, "mirror status", self._status)

    @mirror.command(name="sync", description="Compare with Discord now and write the differences")
    @app_commands.describe(guild="The guild's id; all guilds if omitted")
    async def sync(self, interaction: discord.Interaction[Guildbook], guild: str | None = None) -> None:
        """Reconcile one guild or all guilds."""

        async def work(reply: Reply) -> str:
            return await (
                self._sync_all(reply) if guild is None else self._sync_one(reply, self._parse_guild_id(guild))
            )

        await slash.operate(interaction, "mirror sync", work, guild=guild)

    async def _status(self, reply: Reply) -> str:
        ready, progress = self.bot.mirror.is_ready()
        outage = f", {progress['unavailable']:,} in an outage" if progress["unavailable"] else ""
        guilds = f"{format_count(progress['available'], 'guild')} available{outage}"
        lines = [
            f"**{'Up to date' if ready else 'Catching up'}**: {guilds},"
            f" {progress['reconciled']:,} reconciled, {progress['waiting']:,} waiting, {progress['running']:,} running;"
            f" {format_count(len(self.bot.mirror.writer.buffer), 'row')} waiting to be written"
        ]
        lines += await self._missing_permissions()
        counts = [f"{name} {await self._count(name):,}" for name in mirrored_tables()]
        lines += ["**In the database**: " + ", ".join(counts), "**Last reconciles**"]
        rows = await self.bot.db.fetch(
            "SELECT guild_id, finished_at, source, reason, error, rows_seen, rows_inserted, rows_updated, rows_left"
            " FROM sync_runs ORDER BY id DESC LIMIT $1",
            SHOWN_RUNS,
        )
        for row in rows:
            figures = f"{row['rows_seen']:,} seen, {row['rows_inserted']:,} new, {row['rows_updated']:,} changed"
            outcome = f"{figures}, {row['rows_left']:,} left" if row["error"] is None else f"failed: {row['error']}"
            when = discord.utils.format_dt(row["finished_at"], "R")
            lines.append(f"{self._name(row['guild_id'])} {when} ({row['reason']}, {row['source']}): {outcome}")
        return "\n".join(lines if rows else [*lines, "none yet"])

    async def _missing_permissions(self) -> list[str]:
        """Return a line for each guild in which the mirror lacks a permission, at most `SHOWN_GUILDS`."""
        lacking: list[str] = []
        for number, guild in enumerate(self.bot.guilds, start=1):
            found = [f"no {used.name} (not mirrored: {used.missed})" for used in missing_in(guild)]
            state = self.bot.mirror.reconciler.guilds.get(guild.id)
            if not found and state is not None and (channels := {id for id, _ in state.skipped_archives}):
                verb = "denies" if len(channels) == 1 else "deny"
                found = [f"{format_count(len(channels), 'channel')} {verb} Read Message History or Manage Threads"]
            if found:
                lacking.append(f"{self._name(guild.id)}: {', '.join(found)}")
            if not number % GUILDS_AT_ONCE:
                await asyncio.sleep(0)
        if not lacking:
            return []
        unshown = len(lacking) - SHOWN_GUILDS
        more = [f"and {format_count(unshown, 'more guild')}"] if unshown > 0 else []
        assert self.bot.application_id is not None, "logged in"
        return [
            "**Missing permissions**",
            *lacking[:SHOWN_GUILDS],
            *more,
            f"To grant them, open <{invite_url(self.bot.application_id)}> and choose the guild.",
        ]

    async def _count(self, table: str) -> int:
        tombstone = tombstone_column(table)
        condition = f" WHERE {tombstone} IS NULL" if tombstone is not None else ""
        count: int = await self.bot.db.fetchval(f"SELECT count(*) FROM {table}{condition}")  # noqa: S608 - names from models/
        return count

    async def _sync_one(self, reply: Reply, guild_id: int) -> str:
        if not self.bot.mirror.reconciler.guilds[guild_id].available:
            raise SyncError(f"{self._name(guild_id)} is in an outage: try again when Discord sends it again")
        runs = await self._sync(reply, [guild_id])
        return f"Synced {self._name(guild_id)}: {self._figures(runs)}"

    async def _sync_all(self, reply: Reply) -> str:
        states = self.bot.mirror.reconciler.guilds.values()
        ids = [state.id for state in states if state.available]
        if not ids:
            raise SyncError("no guild is available: Discord has an outage, or the bot is not in any guild")
        left_out = len(states) - len(ids)
        runs = await self._sync(reply, ids)
        outage = f" ({format_count(left_out, 'guild')} in an outage left out)" if left_out else ""
        return f"Synced {format_count(len(ids), 'guild')}{outage}: {self._figures(runs)}"

    async def _sync(self, reply: Reply, ids: list[int]) -> list[Run]:
        """Reconcile guilds, show the progress, and return the runs. Raises the first error."""
        limit, runs = asyncio.Semaphore(CONCURRENCY), list[Run]()

        async def sync_one(guild_id: int) -> None:
            async with limit:
                runs.append(await self.bot.mirror.sync(guild_id))

        tasks = {asyncio.create_task(sync_one(guild_id)) for guild_id in ids}
        try:
            while True:
                done, pending = await asyncio.wait(tasks, timeout=CHECK_INTERVAL)
                if not pending:
                    break
                await reply.progress(self._progress(ids, len(done)))
        finally:
            for task in tasks:
                task.cancel()
        errors = [error for task in tasks if (error := task.exception()) is not None]
        unexpected = [error for error in errors if not isinstance(error, GuildbookError | discord.DiscordException)]
        if unexpected:
            raise unexpected[0]
        if errors:
            others = f" ({len(errors):,} of {len(ids):,} guilds failed)" if len(ids) > 1 else ""
            raise SyncError(f"{errors[0]}{others}")
        return runs

    def _progress(self, ids: list[int], finished: int) -> str:
        guilds = self.bot.mirror.reconciler.guilds
        listings = [state.listing for id in ids if (state := guilds.get(id)) is not None and state.listing is not None]
        pages, members = sum(listing.pages for listing in listings), sum(listing.seen for listing in listings)
        if len(ids) > 1:
            others = f"{format_count(members, 'member')} of other guilds so far"
            return f"Syncing: {finished:,} of {len(ids):,} guilds done, {others}"
        if not listings:
            return f"Syncing {self._name(ids[0])}: waiting in the queue (Discord sends a full list at most every 30 s)"
        seen = f"{format_count(members, 'member')} in {format_count(pages, 'page')}"
        return f"Syncing {self._name(ids[0])}: {seen} so far"

    def _figures(self, runs: list[Run]) -> str:
        started_at = min(run.started_at for run in runs)
        seconds = (self.bot.db.now() - started_at).total_seconds()
        sources = " and ".join(sorted({run.source for run in runs}))
        members = format_count(sum(run.rows_seen for run in runs), "member")
        pages = format_count(sum(run.pages for run in runs), "page")
        return (
            f"{members} in {pages} ({sources}),"
            f" {sum(run.rows_inserted for run in runs):,} new, {sum(run.rows_updated for run in runs):,} changed,"
            f" {sum(run.rows_left for run in runs):,} left, {seconds:.1f} s"
        )

    def _parse_guild_id(self, text: str) -> int:
        guild_id = slash.parse_guild_id(text)
        if guild_id not in self.bot.mirror.reconciler.guilds:
            raise ValidationError(f"the bot is not in a guild with the id {guild_id}")
        return guild_id

    def _name(self, guild_id: int) -> str:
        guild = self.bot.get_guild(guild_id)
        return (
            f"{discord.utils.escape_markdown(guild.name)} ({guild_id})" if guild and guild.name else f"guild {guild_id}"
        )


async def setup(bot: Guildbook) -> None:
    """Add the cog for operators."""
    await slash.add_cog(bot, MirrorCommands(bot))
