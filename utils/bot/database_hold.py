"""`DatabaseHold`: decides whether the database may be written to, and waits while it may not."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import aiohttp
import discord

from utils.bot.client import Guildbook
from utils.database import Pool
from utils.exceptions import BackupError, DatabaseError, DatabaseUnavailable, GuildbookError
from utils.mirror.discord import tap
from utils.operations import migrations
from utils.operations.action import record_action
from utils.operations.backup import recovery
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.recovery import Hold, restore_lost
from utils.operations.backup.restore.assessment import Assessment
from utils.service.lease import Lease, holder
from utils.settings import Settings

_log = logging.getLogger(__name__)

#: Seconds to ask Discord for the application.
REQUEST_SECONDS = 10.0
#: Seconds for an operator's command that has just restored the database to end and to answer.
ANSWER_SECONDS = 300.0


class DatabaseHold:
    """Holds a database that has lost what a backup of it has, until an operator restores it or begins anew.

    Parameters
    ----------
    interval: seconds between two looks at the database.
    search_interval: seconds between two searches for backups, while a store does not answer, or Discord does not say
        which application the token is of.
    repeat: seconds between two equal log lines.
    """

    def __init__(
        self,
        settings: Settings,
        pool: Pool,
        *,
        interval: float = 1.0,
        search_interval: float = 30.0,
        repeat: float = 600.0,
    ) -> None:
        self.interval: float = interval
        self.search_interval: float = search_interval
        self.repeat: float = repeat
        #: Why the database is held; None if it is not.
        self.current: Hold | None = None
        self._settings = settings
        self._pool = pool
        #: `time.monotonic()` of the beginning of the hold, of the last search for backups, and of the last log line.
        self._since = self._searched_at = self._logged_at = float("-inf")
        #: The application of the token; None before Discord was asked.
        self._application_id: int | None = None
        #: The backup that was restored without an operator, or could not be.
        self._recovered_id: str | None = None

    def __repr__(self) -> str:
        return f"<DatabaseHold current={self.current}>"

    def details(self) -> dict[str, Any]:
        """Return what GET /readyz shows of the hold; nothing if there is none."""
        if self.current is None:
            return {}
        return {"held": {"seconds": round(time.monotonic() - self._since), **self.current.details()}}

    async def wait_until_usable(self) -> None:
        """Return once the database may be written to, or be given its schema.

        Raises `DatabaseError` for errors that waiting does not mend, and discord.py's error for a wrong token.
        """
        while True:
            try:
                hold = await self._look()
                if hold is None:
                    return
                self._report()
                await self._recover(hold)
            except DatabaseUnavailable as error:
                self._log("waiting for the database: %s", error)
            await asyncio.sleep(self.interval)

    async def wait_with(self, bot: Guildbook, lease: Lease, running: asyncio.Task[None]) -> None:
        """Keep the bot connected and its events on disk while the database is held; return when it may start over.

        Returns at once if the database is not held, after giving up the lease if its table is missing. Also returns
        when the table is back with the lease in it, and when the bot has ended.
        """
        self._application_id = bot.application_id or self._application_id
        was_held = False
        notifying: asyncio.Task[None] | None = None
        while not running.done() and (lease.lost.is_set() or lease.table_missing.is_set()):
            try:
                hold = await self._look(was_in_use=True)
            except DatabaseError as error:
                self._log("the database cannot be assessed: %s", error)
                if lease.lost.is_set() and not was_held:
                    break  # the next start waits for the database
            else:
                if hold is None:
                    lease.give_up("the database was recreated, and no backup of it is known: beginning anew")
                    break
                bot.spool_events()
                self._report()
                if not was_held:
                    bot.is_held = was_held = True
                    notifying = asyncio.create_task(bot.operators.notify(f"{hold.line}."), name="notify operators")
                await self._recover(hold)
            await asyncio.wait({running}, timeout=self.interval)
        self.current = None
        bot.is_held = False
        if notifying is not None:
            notifying.cancel()
        if was_held:
            _log.info("the database is no longer held")
            await bot.operators.wait_idle(ANSWER_SECONDS)  # the command that restored it is about to answer

    async def is_needed(self) -> bool:
        """Return whether the database must be held."""
        return await self._look() is not None

    async def _look(self, *, was_in_use: bool = False) -> Hold | None:
        """Find out whether the database must be held. `was_in_use`: this process has used its tables."""
        loss = await recovery.find_loss(self._pool)
        now = time.monotonic()
        if loss is None and self.current is not None and await self._lacks_revisions():
            return self.current  # an operator's command makes the schema just now
        if loss is None:
            self.current = None
        elif self.current is None or (
            not self.current.is_of_application and now - self._searched_at > self.search_interval
        ):
            if self.current is None:
                self._since = now
            self._searched_at = now
            self.current = await self._search(loss)
            if self.current is None and was_in_use and not (loss.has_tables or self._settings.auto_migrate):
                self.current = Hold(loss.state, loss.reason, None, problem="AUTO_MIGRATE is off")
        return self.current

    async def _lacks_revisions(self) -> bool:
        """Whether the schema is incomplete, and this process may not complete it."""
        return not self._settings.auto_migrate and bool(await migrations.pending(self._pool))

    async def _recover(self, hold: Hold) -> None:
        """With RECOVER=auto, restore the backup of an empty database, once."""
        backup = hold.backup
        if self._settings.recover != "auto" or backup is None or backup.id == self._recovered_id:
            return
        if not (hold.is_of_application and hold.state == "empty"):
            return  # an operator must decide, or Discord say which application the token is of
        self._recovered_id = backup.id
        _log.warning("RECOVER=auto: restoring backup %s", backup.id)
        try:
            outcome = await restore_lost(
                self._pool, BackupCatalog(self._settings), hold, Lease(self._pool.target, holder())
            )
            if outcome is not None:
                _log.warning("RECOVER=auto: %s", outcome.text)
                await record_action(self._pool, "backup restore", {"by": "RECOVER=auto", "id": backup.id}, outcome.text)
        except DatabaseUnavailable:
            self._recovered_id = None
            raise
        except GuildbookError as error:
            _log.error("RECOVER=auto could not restore backup %s, an operator must: %s", backup.id, error)

    async def _search(self, loss: Assessment) -> Hold | None:
        try:
            return await recovery.find_hold(self._pool, BackupCatalog(self._settings), loss, self._fetch_application)
        except BackupError as error:
            return Hold(loss.state, loss.reason, None, problem=f"backups cannot be listed: {error}")

    def _report(self) -> None:
        if self.current is not None:
            self._log("%s", self.current.line)

    def _log(self, message: str, argument: object) -> None:
        now = time.monotonic()
        if now - self._logged_at >= self.repeat:
            self._logged_at = now
            _log.error(message, argument)

    async def _fetch_application(self) -> int | None:
        """Return the token's application; None if Discord does not answer."""
        token = self._settings.discord_token
        if self._application_id is None and token is not None:
            tap.set_api_base(self._settings.discord_api_base)
            try:
                async with asyncio.timeout(REQUEST_SECONDS), discord.Client(intents=discord.Intents.none()) as client:
                    await client.login(token.get_secret_value())
                    self._application_id = client.application_id
            except (discord.HTTPException, aiohttp.ClientError, OSError, TimeoutError) as error:
                _log.warning("Discord does not tell which application the token belongs to: %r", error)
        return self._application_id
