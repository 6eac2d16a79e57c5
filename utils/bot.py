"""The bot itself: discord.py's, with the database and the mirror on it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import discord
import yarl
from discord.ext import commands
from discord.gateway import DiscordWebSocket
from discord.http import Route

from utils.commands import register_commands
from utils.database import Database
from utils.errors import GuildbookError
from utils.mirror import Mirror, tap
from utils.mirror.source import DiscordSource
from utils.operators import Operators
from utils.service import lease
from utils.settings import Settings

_log = logging.getLogger(__name__)

COGS = Path(__file__).resolve().parents[1] / "cogs"
#: Seconds that a cog's set-up may take.
COG_SECONDS = 30.0


class Guildbook(commands.AutoShardedBot):
    """Mirrors its guilds into the database and carries the cogs.

    `extensions`: the modules of the cogs; None for everything in `cogs/`.
    """

    def __init__(self, settings: Settings, database: Database, *, extensions: Iterable[str] | None = None) -> None:
        discord.VoiceClient.warn_nacl = discord.VoiceClient.warn_dave = False  # nobody here wants to speak
        intents = discord.Intents(guilds=True, members=True, voice_states=settings.member_cache != "none")
        super().__init__(
            command_prefix=commands.when_mentioned,
            help_command=None,
            intents=intents,
            chunk_guilds_at_startup=False,
            member_cache_flags=cache_flags(settings.member_cache),
            max_messages=None,
            allowed_mentions=discord.AllowedMentions.none(),
        )
        self.settings: Settings = settings
        self.db: Database = database
        self.operators: Operators = Operators(self, settings.admin_user_ids)
        #: Names this process in `ops.leases`.
        self.holder: str = lease.holder()
        self._extensions: list[str] = found_extensions() if extensions is None else list(extensions)
        self._mirror: Mirror | None = None
        Route.BASE = settings.discord_api_base

    @property
    def mirror(self) -> Mirror:
        """The mirror, there from the login on. Raises `GuildbookError` before."""
        if self._mirror is None:
            raise GuildbookError("the mirror begins with the login to Discord: use it from cog_load on")
        return self._mirror

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Tell whether every available guild is mirrored, and how far each listing under way has come."""
        if self._mirror is None:
            return False, {"state": "not logged in yet"}
        ready, progress = self._mirror.is_ready()
        guilds = self._mirror.reconciler.guilds
        listings = {id: state.listing.seen for id, state in guilds.items() if state.listing is not None}
        return ready, {**progress, "rows_waiting": len(self._mirror.writer.buffer), "members_received": listings}

    async def setup_hook(self) -> None:
        """Start the mirror and load the cogs: after the login, before the gateway."""
        shards = await self._find_gateway()
        settings = self.settings
        epoch = await lease.take(self.db, self.holder)
        self._mirror = Mirror(
            self.db,
            DiscordSource(self),
            epoch=epoch,
            shards=shards,
            flush_rows=settings.flush_rows,
            flush_seconds=settings.flush_seconds,
            page_timeout=settings.chunk_timeout_seconds,
            cooldown=settings.chunk_cooldown_seconds,
        )
        tap.install(self, self._mirror)
        self._mirror.start()
        await self._load_cogs()
        await register_commands(self)
        _log.info("logged in as %s", self.user, extra={"shards": shards, "epoch": epoch, "holder": self.holder})

    async def stop_mirror(self, timeout: float) -> None:
        """Write what waits, in `timeout` seconds at most, and stop the mirror; nothing when it never started."""
        if self._mirror is not None:
            await self._mirror.stop(timeout)

    async def on_error(self, event_method: str, /, *args: Any, **kwargs: Any) -> None:
        """Log what a listener raised; the bot lives on."""
        _log.exception("a listener of %s failed", event_method)

    async def _find_gateway(self) -> int:
        """Set the gateway's address, which sessions that cannot be resumed come back to, and return the shard count."""
        shards, url, _ = await self.http.get_bot_gateway()
        DiscordWebSocket.DEFAULT_GATEWAY = yarl.URL(self.settings.discord_gateway_url or url)
        self.shard_count = shards  # so that discord.py does not ask again, and takes the address above
        return shards

    async def _load_cogs(self) -> None:
        for name in self._extensions:
            try:
                async with asyncio.timeout(COG_SECONDS):
                    await self.load_extension(name)
            except Exception as exc:  # whatever is wrong with one cog is no reason to do without the others
                cause = exc.original if isinstance(exc, commands.ExtensionFailed) else exc
                _log.error("%s is left out, the bot goes on without it: %r", name, cause, exc_info=cause)


def found_extensions(directory: Path = COGS) -> list[str]:
    """Return the modules in the cogs' directory, those that begin with an underscore excepted."""
    names = {path.stem for path in directory.glob("*.py")} | {
        path.parent.name for path in directory.glob("*/__init__.py")
    }
    return [f"{directory.name}.{name}" for name in sorted(names) if not name.startswith("_")]


def cache_flags(kept: Literal["none", "voice", "all"]) -> discord.MemberCacheFlags:
    """Return which members discord.py keeps in memory."""
    if kept == "none":
        return discord.MemberCacheFlags.none()
    return discord.MemberCacheFlags(voice=True, joined=kept == "all")
