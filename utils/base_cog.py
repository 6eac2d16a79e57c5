"""`BaseCog`: database access, repositories, documents, a cache, background tasks and error answers for cogs.

Cogs also import `Guildbook` and `MirrorChange`, the types of the bot and of `on_mirror_change` events, from here.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import logging
from collections.abc import Callable, Coroutine, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import discord
from discord import app_commands
from discord.ext import commands, tasks
from pydantic import BaseModel

from models import Base
from utils import packs
from utils.bot import command_errors
from utils.bot.change_dispatcher import idempotent
from utils.bot.client import Guildbook
from utils.bot.converters import MemberConverter, MemberTransformer, UserConverter, UserTransformer
from utils.bot.invocations import bounded
from utils.bot.periodic import RetryingLoop, bind_loop, loop, loops_of
from utils.bot.prefixes import DEFAULT_MARK
from utils.bot.registrations import LIFECYCLE_TIMEOUT, live_cogs
from utils.cache import TTLCache
from utils.documents import Documents
from utils.exceptions import GuildbookError
from utils.mirror.batches import SECONDS, SIZE, Batch
from utils.mirror.change_feed import MirrorChange
from utils.repositories import (
    ChannelRepository,
    GuildRepository,
    MemberRepository,
    Repository,
    RoleRepository,
    ThreadRepository,
    UserRepository,
)
from utils.tasks import cancel_and_wait

if TYPE_CHECKING:
    from utils.database.access import Database
    from utils.database.orm import SessionScope

__all__ = [
    "BaseCog",
    "Batch",
    "Guildbook",
    "MemberConverter",
    "MemberTransformer",
    "MirrorChange",
    "RetryingLoop",
    "UserConverter",
    "UserTransformer",
    "bounded",
    "idempotent",
    "loop",
]

ResultT = TypeVar("ResultT")
ModelT = TypeVar("ModelT", bound=BaseModel)
RowT = TypeVar("RowT", bound=Base)


class BaseCog(commands.Cog):
    """The base class of cogs. Override `start` and `stop` instead of `cog_load` and `cog_unload`.

    Example::

        class Greeter(BaseCog):
            @commands.Cog.listener()
            async def on_mirror_change(self, change: MirrorChange) -> None:
                if change.action == "join":
                    self.log.info("user %s joined guild %s", change.user_id, change.guild_id)
    """

    #: The gateway intents that the cog needs besides those of the mirror (guilds, members, moderation, guild_messages).
    #: A cog whose privileged intents Discord does not grant is not loaded.
    intents: ClassVar[discord.Intents] = discord.Intents.none()
    #: Seconds for each of `start`, `stop`, and the end of cancelled tasks.
    _lifecycle_timeout: ClassVar[float] = LIFECYCLE_TIMEOUT

    def __new__(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls, *args, **kwargs)
        # Before __init__, which may start them.
        for name, raw in inspect.getmembers_static(cls, lambda value: isinstance(value, tasks.Loop)):
            setattr(self, name, bind_loop(raw, self))
        return self

    def __init__(self, bot: Guildbook) -> None:
        self.bot: Guildbook = bot
        #: Reads and writes the database; the same as `bot.db`.
        self.db: Database = bot.db
        #: The logger of the cog's module.
        self.log: logging.Logger = logging.getLogger(type(self).__module__)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._batches: list[Batch] = []
        self._periodic: list[RetryingLoop] = []
        self._started = self._ended = False
        #: Which of `cog_load` and `cog_unload` is running.
        self._lifecycle_phase: Literal["load", "unload"] | None = None
        if self._pack is not None:
            _ = self.settings, self._locales  # a wrong value or file keeps the cog from being loaded
        live_cogs.add(self)

    async def start(self) -> None:
        """Set the cog up before its first command or event. It has 30 seconds; if it raises, the cog is not loaded."""

    async def stop(self) -> None:
        """Release what `start` acquired. It has 30 seconds and runs after the tasks of `spawn` have ended."""

    # --- the pack

    @property
    def _pack(self) -> packs.Pack | None:
        return packs.module_owner(type(self).__module__)

    @cached_property
    def settings(self) -> Any:
        """The settings of the cog's pack, its class `Settings`; of a cog in `cogs/`, those of the bot.

        A cog may declare their type: `settings: Settings`. Raises `SettingsError` with one line for each wrong value.
        """
        return self.bot.settings if self._pack is None else packs.load_pack_settings(self._pack)

    def text(self, key: str, locale: discord.Locale | str = "en-US", /, **values: object) -> str:
        """Return a text of the cog's pack in a locale, such as `interaction.locale`, from its `locales/`.

        Example::

            self.text("balance", interaction.locale, coins=5)
        """
        return self._locales.text(key, str(locale), **values)

    @cached_property
    def _locales(self) -> packs.Locales:
        if self._pack is None:
            raise GuildbookError(f"{self.qualified_name} is in no pack, and only packs have texts in locales/")
        return packs.Locales.of(self._pack)

    # --- text commands

    async def command_prefix(self, message: discord.Message) -> str | Sequence[str] | None:
        """Override to choose the prefixes of text commands for a message, for example from the guild's settings.

        Returns one or several, which replace COMMAND_PREFIX; None for the default. Several cogs' prefixes add up. It
        has a second; after an exception or a timeout the default applies, and it is not called for five seconds.

        Example::

            async def command_prefix(self, message: discord.Message) -> str | None:
                settings = await self.documents("prefix", PrefixSettings).guild(message.guild).get("settings")
                return settings.prefix
        """
        return None

    # --- data

    def session(self) -> SessionScope:
        """Return a SQLAlchemy session for `async with`: the end of the block commits, an exception rolls back.

        `session = await self.session()` is held by hand: you commit, and you `await session.close()`.
        """
        return self.bot.get_db_session()

    def documents(
        self, namespace: str, model: type[ModelT], *, stale_if_error: float | None = None
    ) -> Documents[ModelT]:
        """Return the documents of a namespace: settings and small records typed by a pydantic model, without a table.

        stale_if_error: seconds for which what was read may be returned again while the database is unavailable; None:
            the error is raised.

        Example::

            settings = self.documents("welcome", WelcomeSettings, stale_if_error=3600)
            current = await settings.guild(guild_id).get("settings")
        """
        return Documents(self.db, namespace, model, stale_if_error=stale_if_error)

    def repository(self, model: type[RowT]) -> Repository[RowT, Any]:
        """Return a repository for a table of your own: get, find, list, add, upsert, update, delete, and others.

        Example::

            case = await self.repository(Case).get_or_none((guild_id, number))
        """
        return Repository(self.bot.get_db_session, model)

    def batch(
        self,
        table: str | type[Base],
        size: int = SIZE,
        seconds: float = SECONDS,
        *,
        increments: Sequence[str] = (),
    ) -> Batch:
        """Return a write-behind batch for a table of this cog: `add` takes rows at once, and they are written together.

        table: a model of this cog, or the name of its table; also `member_stats`, whose column `xp` is for cogs.
        size: how many rows wait before they are written.
        seconds: how long a row waits at most.
        increments: columns whose values are added to those in the table; of all other columns the last value wins.

        Raises `ValidationError` if there is no such table or column, or if the table is not this cog's. Unloading the
        cog writes what waits, and closes the batch.
        """
        name = type(self).__cog_name__
        module = type(self).__module__
        batch = self.bot.mirror.batches.open(table, name, module, size=size, seconds=seconds, increments=increments)
        self._batches.append(batch)
        return batch

    @cached_property
    def cache(self) -> TTLCache[Any, Any]:
        """An in-memory cache for this cog: at most 1,000 values, each for 5 minutes. Unloading the cog discards it."""
        return TTLCache()

    @cached_property
    def guilds(self) -> GuildRepository:
        """The mirrored guilds."""
        return GuildRepository(self.bot.get_db_session)

    @cached_property
    def users(self) -> UserRepository:
        """The mirrored users."""
        return UserRepository(self.bot.get_db_session)

    @cached_property
    def members(self) -> MemberRepository:
        """The mirrored members of all guilds."""
        return MemberRepository(self.bot.get_db_session)

    @cached_property
    def roles(self) -> RoleRepository:
        """The mirrored roles."""
        return RoleRepository(self.bot.get_db_session)

    @cached_property
    def channels(self) -> ChannelRepository:
        """The mirrored channels."""
        return ChannelRepository(self.bot.get_db_session)

    @cached_property
    def threads(self) -> ThreadRepository:
        """The mirrored threads."""
        return ThreadRepository(self.bot.get_db_session)

    # --- background tasks

    def spawn(self, work: Coroutine[Any, Any, ResultT], name: str | None = None) -> asyncio.Task[ResultT]:
        """Run a coroutine in the background until it ends or the cog is unloaded, and return its task.

        An exception is logged, even if nobody awaits the task. The task starts in an empty context and so outside the
        caller's transaction. `name` is used in log lines; None uses the coroutine's name. Raises `GuildbookError` if
        the cog has been unloaded.
        """
        name = name or getattr(work, "__qualname__", type(work).__name__)
        if self._ended:
            work.close()
            raise GuildbookError(f"{self.qualified_name} is unloaded: it cannot start the task {name}")
        context = contextvars.Context()
        task = asyncio.get_running_loop().create_task(work, name=f"{self.log.name}: {name}", context=context)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done, context=context)
        return task

    def every(
        self,
        seconds: float,
        work: Callable[[], Coroutine[Any, Any, Any]],
        *,
        key: str | None = None,
        name: str | None = None,
    ) -> RetryingLoop:
        """Run a coroutine function at once and again every `seconds`, until the cog is unloaded, and return its loop.

        A run that raises is logged and repeated with back-off; an outage ends nothing. `/cogs list` shows the last run,
        its error, and the next run.

        key: the next run is remembered under it: a restart does not run the work too early, of several processes one
            runs it, and a run that failed or was cancelled is repeated. Unique in the cog. None: it runs at each start.
        name: in log lines and lists; None: that of the function.

        Raises `GuildbookError` if the cog has been unloaded.

        Example::

            async def start(self) -> None:
                self.every(60, self.refresh)
                self.every(24 * 3600, self.post_digest, key="digest")
        """
        name = name or str(getattr(work, "__name__", type(work).__name__))
        if self._ended:
            raise GuildbookError(f"{self.qualified_name} is unloaded: it cannot start {name}")
        if not isinstance(seconds, int | float) or not seconds > 0:
            raise GuildbookError(f"{name}: the interval must be more than 0 seconds, not {seconds!r}")
        if not callable(work):
            raise GuildbookError(f"{name}: every takes a coroutine function, without parentheses, not {work!r}")

        async def run(_: BaseCog) -> None:
            started: object = work()
            if not inspect.isawaitable(started):
                raise GuildbookError(f"{name} is not a coroutine function: define it with async def")
            await started

        run.__module__, run.__name__ = type(self).__module__, name
        periodic = RetryingLoop(run, seconds=seconds, name=name, key=key)
        periodic._injected = self  # type: ignore[assignment]
        self._periodic.append(periodic)
        periodic.start()
        return periodic

    def _on_task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            reference = command_errors.new_reference()
            self.log.error(
                "task failed: %s (ref %s)", task.get_name(), reference, exc_info=error, extra={"reference": reference}
            )

    # --- loading and unloading

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Many cogs override these without calling the inherited ones.
        for name, around in (("cog_load", cls._load), ("cog_unload", cls._unload)):
            if (own := cls.__dict__.get(name)) is not None:
                setattr(cls, name, _wrap(own, around))

    async def cog_load(self) -> None:
        """Call `start`. If it fails or times out, tear down what it started. An override need not call it."""
        await self._load(None)

    async def cog_unload(self) -> None:
        """Cancel loops and tasks, then call `stop`. A second call does nothing. An override need not call it."""
        await self._unload(None)

    async def _load(self, own: Callable[[Any], Any] | None) -> None:
        """Run an override of `cog_load`, which may call the inherited one, then `start` unless that has run it."""
        if self._lifecycle_phase is not None:  # called by an override
            await (self._start_once() if own is None else discord.utils.maybe_coroutine(own, self))
            return
        self._lifecycle_phase = "load"
        name = "start" if own is None else "cog_load"
        scope = asyncio.timeout(self._lifecycle_timeout)
        try:
            async with scope:
                if own is not None:
                    await discord.utils.maybe_coroutine(own, self)
                await self._start_once()
        except BaseException as exc:
            self._lifecycle_phase = None
            try:
                await self.cog_unload()
            except Exception:  # of an override
                self.log.exception("cog_unload() failed after a failed start: %s", self.qualified_name)
            if isinstance(exc, TimeoutError) and scope.expired():
                raise GuildbookError(
                    f"{name}() of {self.qualified_name} took longer than {self._lifecycle_timeout:g} s"
                ) from exc
            raise
        finally:
            self._lifecycle_phase = None

    async def _start_once(self) -> None:
        if not self._started:
            self._started = True
            await self.start()
            for batch in self._batches:
                await batch.verify()

    async def _unload(self, own: Callable[[Any], Any] | None) -> None:
        """Run an override of `cog_unload`, which may call the inherited one, and clean up whatever it does."""
        if self._lifecycle_phase == "unload":
            await (self._clean_up() if own is None else discord.utils.maybe_coroutine(own, self))
            return
        if self._ended:
            return
        self._lifecycle_phase = "unload"
        try:
            if own is not None:
                async with asyncio.timeout(self._lifecycle_timeout):
                    await discord.utils.maybe_coroutine(own, self)
        finally:
            self._lifecycle_phase = None
            await self._clean_up()

    async def _clean_up(self) -> None:
        if self._ended:
            return
        self._ended = True
        loops = [running for it in loops_of(self) if (running := it.get_task()) is not None]
        self._tasks.update(running for running in loops if not running.done())
        await self._cancel_tasks()
        if self._started:
            try:
                async with asyncio.timeout(self._lifecycle_timeout):
                    await self.stop()
            except Exception:
                reference = command_errors.new_reference()
                self.log.exception("stop() failed (ref %s)", reference, extra={"reference": reference})
        await asyncio.gather(*(batch.close() for batch in self._batches))
        live_cogs.discard(self)

    async def _cancel_tasks(self) -> None:
        running = self._tasks - {asyncio.current_task()}
        for task in await cancel_and_wait(running, self._lifecycle_timeout):
            self.log.error(
                "task still running %g s after its cancellation: %s", self._lifecycle_timeout, task.get_name()
            )

    # --- errors

    async def cog_app_command_error(
        self, interaction: discord.Interaction[Any], error: app_commands.AppCommandError
    ) -> None:
        """Answer a failed slash command in one line and log the error under the same reference. Never raises."""
        command = interaction.command
        if not isinstance(command, app_commands.Command) or command.on_error is None:
            await command_errors.report_command_error(interaction, error, self.log)

    async def cog_command_error(self, ctx: commands.Context[Any], error: Exception) -> None:
        """Answer a failed text command in one line and log the error under the same reference. Never raises."""
        await command_errors.report_command_error(ctx, error, self.log)


def _wrap(
    own: Callable[[Any], Any], around: Callable[[Any, Callable[[Any], Any]], Coroutine[Any, Any, None]]
) -> Callable[[Any], Coroutine[Any, Any, None]]:
    """Return an override of `cog_load` or `cog_unload` that runs with what the inherited one does."""

    @functools.wraps(own)
    async def wrapped(self: Any) -> None:
        await around(self, own)

    return wrapped


setattr(BaseCog.command_prefix, DEFAULT_MARK, True)
