"""What a cog begins with: the database, the mirrored rows, settings, tasks, and answers to what goes wrong."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import discord
from discord import app_commands
from discord.ext import commands, tasks
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession

from utils.bot import command_errors
from utils.bot.registrations import LIFECYCLE_SECONDS, live_cogs
from utils.cache import TTLCache
from utils.documents import Documents
from utils.exceptions import GuildbookError
from utils.repositories import (
    ChannelRepository,
    GuildRepository,
    MemberRepository,
    RoleRepository,
    ThreadRepository,
    UserRepository,
)

if TYPE_CHECKING:
    from utils.bot.client import Guildbook
    from utils.database.access import Database

ResultT = TypeVar("ResultT")
ModelT = TypeVar("ModelT", bound=BaseModel)


class BaseCog(commands.Cog):
    """A cog with Guildbook's means at hand. Override `start` and `stop` instead of `cog_load` and `cog_unload`."""

    def __init__(self, bot: Guildbook) -> None:
        self.bot: Guildbook = bot
        self.db: Database = bot.db
        #: Named like the module: `cogs.tally`.
        self.log: logging.Logger = logging.getLogger(type(self).__module__)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._started = self._ended = False
        live_cogs.add(self)

    async def start(self) -> None:
        """Do what the cog needs before its first command or event, within 30 s; an exception leaves the cog out."""

    async def stop(self) -> None:
        """Give back what `start` took, within 30 s; the tasks of `spawn` have ended before."""

    # Data.

    def session(self) -> AbstractAsyncContextManager[AsyncSession]:
        """Return a session of SQLAlchemy: the end of the block commits, an exception rolls back."""
        return self.bot.get_db_session()

    def documents(self, namespace: str, model: type[ModelT]) -> Documents[ModelT]:
        """Return the documents of a namespace: settings and the like, typed by a pydantic model, without a table."""
        return Documents(self.db, namespace, model)

    @cached_property
    def cache(self) -> TTLCache[Any, Any]:
        """A cache of this cog's own, in memory; it goes with the cog."""
        return TTLCache()

    @cached_property
    def guilds(self) -> GuildRepository:
        """The guilds that are mirrored."""
        return GuildRepository(self.bot.get_db_session)

    @cached_property
    def users(self) -> UserRepository:
        """The accounts that the bot has seen."""
        return UserRepository(self.bot.get_db_session)

    @cached_property
    def members(self) -> MemberRepository:
        """Who is in which guild."""
        return MemberRepository(self.bot.get_db_session)

    @cached_property
    def roles(self) -> RoleRepository:
        """The guilds' roles."""
        return RoleRepository(self.bot.get_db_session)

    @cached_property
    def channels(self) -> ChannelRepository:
        """The guilds' channels."""
        return ChannelRepository(self.bot.get_db_session)

    @cached_property
    def threads(self) -> ThreadRepository:
        """The channels' threads."""
        return ThreadRepository(self.bot.get_db_session)

    # Tasks.

    def spawn(self, work: Coroutine[Any, Any, ResultT], name: str | None = None) -> asyncio.Task[ResultT]:
        """Run something in the background until the cog is unloaded; return the task.

        It starts in an empty context, so it is in no transaction of its starter. What it raises is logged, also when
        nobody awaits it. `name` stands in that line; None: the coroutine's own. Raises `GuildbookError` after the end.
        """
        name = name or getattr(work, "__qualname__", type(work).__name__)
        if self._ended:
            work.close()
            raise GuildbookError(f"{self.qualified_name} is unloaded: it cannot begin {name}")
        context = contextvars.Context()
        task = asyncio.get_running_loop().create_task(work, name=f"{self.log.name}: {name}", context=context)
        self._tasks.add(task)
        task.add_done_callback(self._finished, context=context)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            id = command_errors.reference()
            self.log.error("the task %s failed (%s)", task.get_name(), id, exc_info=error, extra={"reference": id})

    # Beginning and end.

    async def cog_load(self) -> None:
        """Call `start`; what it began is ended again when it fails."""
        try:
            async with asyncio.timeout(LIFECYCLE_SECONDS):
                self._started = True
                await self.start()
        except TimeoutError as exc:
            await self.cog_unload()
            raise GuildbookError(f"start() of {self.qualified_name} took longer than {LIFECYCLE_SECONDS:g} s") from exc
        except BaseException:
            await self.cog_unload()
            raise

    async def cog_unload(self) -> None:
        """End loops and tasks, then call `stop`; a second call does nothing."""
        if self._ended:
            return
        self._ended = True
        for loop in self._loops():
            loop.cancel()
        await self._end_tasks()
        if self._started:
            try:
                async with asyncio.timeout(LIFECYCLE_SECONDS):
                    await self.stop()
            except Exception:  # nothing of the cog may stay because its farewell failed
                id = command_errors.reference()
                self.log.exception("stop() failed (%s)", id, extra={"reference": id})
        live_cogs.discard(self)

    def _loops(self) -> list[tasks.Loop[Any]]:
        found = {name for name, _ in inspect.getmembers_static(type(self), lambda it: isinstance(it, tasks.Loop))}
        return [getattr(self, name) for name in found]

    async def _end_tasks(self) -> None:
        waiting = self._tasks - {asyncio.current_task()}
        for task in waiting:
            task.cancel()
        if waiting:
            _, left = await asyncio.wait(waiting, timeout=LIFECYCLE_SECONDS)
            for task in left:
                self.log.error("the task %s does not end: cancelled %g s ago", task.get_name(), LIFECYCLE_SECONDS)

    # What went wrong.

    async def cog_app_command_error(
        self, interaction: discord.Interaction[Any], error: app_commands.AppCommandError
    ) -> None:
        """Answer whoever used the command with one line, and log under the same reference; raises nothing."""
        command = interaction.command
        if not isinstance(command, app_commands.Command) or command.on_error is None:  # it answers for itself
            await command_errors.report_command_error(interaction, error, self.log)

    async def cog_command_error(self, ctx: commands.Context[Any], error: Exception) -> None:
        """Answer likewise where the command was a message."""
        await command_errors.report_command_error(ctx, error, self.log)
