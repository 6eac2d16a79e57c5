"""Runs operators' slash commands: checks who may run them, defers, shows progress, and records the result."""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import discord
from discord import app_commands
from discord.ext import commands

from utils.cache import SingleFlight
from utils.database import deadline
from utils.exceptions import GuildbookError, NotConfirmed, ValidationError
from utils.logs import RateLimit, log_once, redact
from utils.operations.action import Outcome, Step, record_action
from utils.service import metrics
from utils.tasks import cancel_and_wait
from utils.text import format_count

if TYPE_CHECKING:
    from utils.bot.client import Guildbook

_log = logging.getLogger(__name__)

#: Seconds between two edits of a reply.
EDIT_INTERVAL = 2.0
#: Seconds after the start of a command during which its reply is edited. Discord accepts edits for 15 minutes.
REPLY_TIMEOUT = 14 * 60.0
#: Seconds that an action may take.
ACTION_TIMEOUT = 12 * 3_600.0
#: Seconds for which the application's owner and team are cached.
OWNERS_TTL = 600.0
#: Seconds for one request to Discord.
REQUEST_TIMEOUT = 30.0
#: Seconds for recording a command; retries in an outage take longer.
RECORD_TIMEOUT = 30.0
#: The maximum length of a message (Discord API reference, "Create Message").
MESSAGE_LENGTH = 2_000

#: Refused commands that are logged and recorded within a minute, of one user and of all; anybody can send them.
REFUSALS_PER_USER, REFUSALS_PER_MINUTE = 3, 10
#: The same within a day: over its retention, `ops.admin_actions` keeps room for what operators did.
REFUSALS_PER_DAY = 200
#: Seconds after which the number of the others is logged.
REFUSALS_INTERVAL = 60.0

REFUSAL = (
    "Only operators can use this command: the application's owner, its team, and the users in ADMIN_USER_IDS."
    " Administrators of a guild cannot, because it reaches the data of every guild."
)


class Operators:
    """Who may operate the bot: the application's owner or team and `user_ids`. Also tracks the running commands.

    Intervals are in seconds and may be changed at any time.
    """

    def __init__(
        self,
        bot: Guildbook,
        user_ids: frozenset[int],
        *,
        owners_ttl: float = OWNERS_TTL,
        edit_interval: float = EDIT_INTERVAL,
        reply_timeout: float = REPLY_TIMEOUT,
    ) -> None:
        self.owners_ttl: float = owners_ttl
        self.edit_interval: float = edit_interval
        self.reply_timeout: float = reply_timeout
        #: Which refused commands are logged and recorded.
        self.refusals: Refusals = Refusals()
        self._bot = bot
        self._user_ids = user_ids
        self._owners: frozenset[int] = frozenset()
        self._owners_fetched_at: float | None = None
        self._fetching: SingleFlight[None, frozenset[int]] = SingleFlight()
        self._running: set[asyncio.Task[None]] = set()

    async def includes(self, user_id: int) -> bool:
        """Return whether a user may operate the bot. Raises `GuildbookError` if Discord does not say who owns it."""
        if user_id in self._user_ids:
            return True
        return user_id in await self._fetch_owners()

    async def notify(self, text: str) -> None:
        """Send a direct message to every operator. A failure is logged: an operator may accept no messages."""
        try:
            user_ids = self._user_ids | await self._fetch_owners()
        except GuildbookError as exc:
            _log.warning("operators not notified: %s", exc)
            return
        for user_id in sorted(user_ids):
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT):
                    user = await self._bot.fetch_user(user_id)
                    await user.send(text[:MESSAGE_LENGTH])
            except (discord.DiscordException, OSError, TimeoutError) as exc:
                _log.warning("operator %s not notified: %r", user_id, exc)

    async def _fetch_owners(self) -> frozenset[int]:
        if self._owners_fetched_at is None or time.monotonic() - self._owners_fetched_at > self.owners_ttl:
            await self._fetching.run(None, self._ask_for_owners, self._keep_owners)
        return self._owners

    async def _ask_for_owners(self) -> frozenset[int]:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                return _owners(await self._bot.application_info())
        except (discord.DiscordException, OSError, TimeoutError) as exc:
            raise GuildbookError(f"cannot ask Discord who owns this application: {exc!r}") from exc

    def _keep_owners(self, owners: frozenset[int]) -> None:
        self._owners, self._owners_fetched_at = owners, time.monotonic()

    def track(self, task: asyncio.Task[None]) -> None:
        """Keep a running command until it ends; `stop` cancels it."""
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def wait_idle(self, timeout: float) -> None:
        """Wait up to `timeout` seconds until no command is running."""
        if self._running:
            await asyncio.wait(self._running, timeout=timeout)

    async def stop(self, timeout: float) -> None:
        """Cancel the running commands and wait up to `timeout` seconds for them to end."""
        await self.refusals.stop()
        tasks = {task for task in self._running if task is not asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)


class Refusals:
    """Decides which refused commands are logged and recorded: a few of each minute. The others are counted."""

    def __init__(
        self,
        *,
        per_user: int = REFUSALS_PER_USER,
        per_minute: int = REFUSALS_PER_MINUTE,
        per_day: int = REFUSALS_PER_DAY,
        interval: float = REFUSALS_INTERVAL,
    ) -> None:
        self.interval: float = interval
        self._minute = RateLimit(per_minute, 60.0, per_key=per_user)
        self._day = RateLimit(per_day, 86_400.0)
        self._reporting: asyncio.Task[None] | None = None

    def admits(self, user_id: int) -> bool:
        """Return whether to log and record one more refusal; otherwise their number is logged later."""
        if self._minute.admits(user_id) and self._day.admits():
            return True
        if self._reporting is None or self._reporting.done():
            self._reporting = asyncio.create_task(self._report_later(), name="refused commands")
        return False

    async def stop(self) -> None:
        """Log what was counted, and end."""
        reporting, self._reporting = self._reporting, None
        if reporting is not None and not reporting.done():
            await cancel_and_wait((reporting,))
            self._report()

    async def _report_later(self) -> None:
        await asyncio.sleep(self.interval)
        self._report()

    def _report(self) -> None:
        count = self._minute.take_refused() + self._day.take_refused()
        if count:
            commands = format_count(count, "more command")
            _log.warning("refused or could not check %s", commands, extra={"refused": count})


def _owners(application: discord.AppInfo) -> frozenset[int]:
    """Return the owner, or the team's owner and the members that accepted and are not read-only."""
    team = application.team
    if team is None:
        return frozenset((application.owner.id,))
    accepted = (
        member.id
        for member in team.members
        if member.membership_state is discord.TeamMembershipState.accepted
        and member.role is not discord.TeamMemberRole.read_only
    )
    return frozenset((*accepted, *([team.owner_id] if team.owner_id else [])))


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a command: text, and optionally an embed and a file."""

    #: Also recorded in `ops.admin_actions`.
    text: str
    embed: discord.Embed | None = None
    #: Name and content.
    file: tuple[str, bytes] | None = None


class Reply:
    """The reply to an operator's command, which is edited as the work progresses."""

    def __init__(self, interaction: discord.Interaction[Guildbook]) -> None:
        self._interaction = interaction
        self._bot = interaction.client
        self._edited_at = float("-inf")
        self._text = ""
        self._step: Step | None = None

    def step(self, step: Step) -> None:
        """Set the step to show with the next edit. Can be passed as a `Progress`."""
        self._step = step

    async def confirm(self, text: str, label: str) -> None:
        """Return once the operator has pressed the button named `label`. Raises `NotConfirmed`."""
        await self._bot.confirmations.ask(self._interaction, text[:MESSAGE_LENGTH], label)
        await self.show("Confirmed.")

    async def progress(self, text: str) -> None:
        """Show a text, unless the reply was edited within the edit interval."""
        if text != self._text and time.monotonic() - self._edited_at >= self._bot.operators.edit_interval:
            await self.show(text)

    async def show(self, text: str, answer: Answer | None = None) -> None:
        """Replace the reply's text and remove its buttons. A refusal by Discord is logged: the work continues."""
        self._edited_at, self._text = time.monotonic(), text
        attachments: dict[str, Any] = {}
        if answer is not None and answer.embed is not None:
            attachments["embed"] = answer.embed
        if answer is not None and answer.file is not None:
            name, content = answer.file
            attachments["attachments"] = [discord.File(io.BytesIO(content), name)]
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                await self._interaction.edit_original_response(content=text[:MESSAGE_LENGTH], view=None, **attachments)
        except (
            discord.DiscordException,
            OSError,
            TimeoutError,
            RuntimeError,
        ) as exc:  # the session is closed at a stop
            _log.warning("could not edit the reply to a command: %r", exc)

    async def show_steps(self) -> None:
        """Show each step as it comes, until cancelled."""
        while True:
            await asyncio.sleep(self._bot.operators.edit_interval)
            if self._step is not None:
                await self.progress(str(self._step))


Work = Callable[[Reply], Awaitable[str | Outcome | Answer]]


async def operate(interaction: discord.Interaction[Guildbook], command: str, work: Work, **arguments: Any) -> None:
    """Run an operator's command: defer, check the user, show what `work` returns, and record it.

    `arguments` are recorded in `ops.admin_actions`. The message of a `GuildbookError` is shown, any other error only by
    its type. Work that outlasts the reply continues and is recorded when it ends.
    """
    bot = interaction.client
    reply = Reply(interaction)
    deadline.lift()  # the action has its own
    try:
        await interaction.response.defer(ephemeral=True, thinking=True)
    except (discord.DiscordException, OSError) as exc:  # after 3 seconds Discord shows the operator a failure
        _log.warning("command not run, because it could not be deferred in time: /%s: %r", command, exc)
        return
    running = asyncio.create_task(_run(bot, interaction.user.id, command, work, reply, arguments), name=f"/{command}")
    bot.operators.track(running)
    steps = asyncio.create_task(reply.show_steps())
    done, _ = await asyncio.wait({running}, timeout=bot.operators.reply_timeout)
    steps.cancel()
    if not done:
        minutes = f"{bot.operators.reply_timeout / 60:g} minutes"
        await reply.show(
            f"Still running after {minutes}. The result will be in the log and in the table ops.admin_actions."
        )


async def _run(bot: Guildbook, user_id: int, command: str, work: Work, reply: Reply, arguments: dict[str, Any]) -> None:
    answer: Answer | None = None
    refusal = await _find_refusal(bot.operators, user_id)
    if refusal is not None and not bot.operators.refusals.admits(user_id):
        await reply.show(refusal)
        return
    if refusal is not None:
        text, result = refusal, "refused: not an operator" if refusal == REFUSAL else refusal
    else:
        try:
            async with asyncio.timeout(ACTION_TIMEOUT):
                answer = _to_answer(await work(reply))
            text = answer.text
        except NotConfirmed as exc:
            text = redact(f"{exc}.")
        except (GuildbookError, discord.DiscordException) as exc:
            text = redact(f"Failed: {exc}")
        except TimeoutError:
            text = f"Failed: not finished within {ACTION_TIMEOUT / 3600:g} hours"
        except asyncio.CancelledError:
            await _record(bot, command, arguments, "Interrupted: the bot was stopped before this was done", user_id)
            raise
        except Exception as exc:
            _log.exception("command failed: /%s", command)
            text = f"Failed: unexpected {type(exc).__name__}, see the log"
        result = text
    if not await _record(bot, command, arguments, result, user_id):
        text += "\n(Could not record this in the audit log.)"
    await reply.show(text, answer)


async def _find_refusal(operators: Operators, user_id: int) -> str | None:
    """Return why a user may not run commands; None if they may."""
    try:
        is_operator = await operators.includes(user_id)
    except GuildbookError as exc:
        return redact(f"Failed: {exc}")
    except Exception as exc:
        log_once(_log, ("owners", type(exc)), "could not find out who owns this application: %r", exc)
        return f"Failed: unexpected {type(exc).__name__}, see the log"
    if is_operator:
        return None
    metrics.refused_commands.inc()
    return REFUSAL


async def _record(bot: Guildbook, command: str, arguments: dict[str, Any], result: str, user_id: int) -> bool:
    """Log what a command did, record it, and return whether it could be recorded."""
    _log.info("/%s by user %s: %s", command, user_id, result)
    try:
        async with asyncio.timeout(RECORD_TIMEOUT):
            await record_action(bot.db, command, arguments, result, user_id=user_id)
    except (GuildbookError, TimeoutError) as exc:
        _log.error("could not record a command in ops.admin_actions: /%s by user %s: %r", command, user_id, exc)
        return False
    return True


def _to_answer(result: str | Outcome | Answer) -> Answer:
    if isinstance(result, Answer):
        return result
    if isinstance(result, str):
        return Answer(result)
    file = None if result.file is None else (result.file[0], result.file[1].encode())
    return Answer(redact(result.text), file=file)


def parse_guild_id(text: str) -> int:
    """Return a guild's id, or 0, from a text option: Discord's integers are too short. Raises `ValidationError`."""
    digits = text.strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20 and int(digits) < 2**63):
        raise ValidationError(
            f"{text[:50]!r} is not a guild id: expected digits (in Developer Mode, right-click the guild, Copy ID)"
        )
    return int(digits)


async def add_cog(bot: Guildbook, cog: commands.Cog) -> None:
    """Add a cog of operator commands to the guild ADMIN_GUILD_ID, or to direct messages if that is not set."""
    guild_id = bot.settings.admin_guild_id
    direct_messages = app_commands.AppCommandContext(guild=False, dm_channel=True, private_channel=False)
    for command in cog.get_app_commands():
        command.allowed_contexts = None if guild_id else direct_messages
    if guild_id:
        await bot.add_cog(cog, guild=discord.Object(guild_id))
    else:
        await bot.add_cog(cog)
