"""Random histories of two bots that share a store of backups, beside a model that knows what really happened."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

from pydantic import SecretStr

from tests.operations.backup.helpers import make_settings
from utils.exceptions import BackupError, UploadFailed
from utils.operations.action import Progress, ignore_progress
from utils.operations.backup.archive.manifest import Manifest, new_id
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.catalog.identity import Identity
from utils.operations.backup.catalog.keeping import find_pause, lacking_remotely, prune
from utils.operations.backup.catalog.retention import DROP_SHARE, RetentionRules
from utils.operations.backup.store import Remote

#: Steps of a history.
STEPS = 30
#: The store that both bots have.
BUCKET = "bucket"
ARCHIVE = b"PGDMP, or whatever"
SHA256 = hashlib.sha256(ARCHIVE).hexdigest()
START = datetime(2026, 6, 1, 12, tzinfo=UTC)
RULES = RetentionRules(1)


class MadeToFail(BackupError):
    """A store that is away, or refuses to be written to."""


class FlakyRemote(Remote):
    """A store that may refuse to be written to, or not answer at all."""

    refuses_writes = False
    is_away = False

    def _check(self, *, writes: bool) -> None:
        if self.is_away or (writes and self.refuses_writes):
            raise MadeToFail(self.name)

    async def names(self) -> dict[str, int]:
        self._check(writes=False)
        return await super().names()

    async def read(self, name: str, limit: int) -> bytes | None:
        self._check(writes=False)
        return await super().read(name, limit)

    async def write(self, name: str, content: bytes) -> None:
        self._check(writes=True)
        await super().write(name, content)

    async def upload(self, path: Path, name: str, progress: Progress = ignore_progress) -> None:
        self._check(writes=True)
        await super().upload(path, name, progress)

    async def delete(self, name: str) -> None:
        self._check(writes=True)
        await super().delete(name)


@dataclass
class Made:
    """A backup as the model knows it."""

    id: str
    guilds: int
    is_accepted: bool = False


@dataclass
class Bot:
    """One bot with its database, its disk, and the backups that were made of the database, oldest first."""

    application_id: int
    host: str
    directory: Path
    remote: FlakyRemote
    guilds: int = 8
    #: What its clock is wrong by.
    skew: timedelta = timedelta(0)
    made: list[Made] = field(default_factory=list)

    def catalog(self, now: datetime) -> BackupCatalog:
        """Return a catalog as the bot, or an operator in its shell, opens one."""
        identity = Identity(
            self.application_id if self.guilds else None, self.host, "guildbook", token_id=self.application_id
        )
        return BackupCatalog(
            make_settings(
                self.directory, backup_keep=1, backup_keep_daily=0, backup_keep_weekly=0, backup_keep_monthly=0
            ),
            remote=self.remote,
            identity=identity,
            clock=lambda: now + self.skew,
        )


class World:
    """Two bots, one store, and time."""

    def __init__(self, directory: Path, random: Random, *, same_address: bool) -> None:
        self.random = random
        self.now = START
        self.directory = directory
        url = SecretStr((directory / BUCKET).as_uri())
        hosts = ("db:5432", "db:5432" if same_address else "other:5432")
        self.bots = [
            Bot(number, host, directory / f"bot{number}", FlakyRemote(url))
            for number, host in enumerate(hosts, start=1)
        ]
        self.steps: list[str] = []
        self.directories = {BUCKET: directory / BUCKET} | {
            bot.directory.name: bot.directory / "backups" for bot in self.bots
        }

    def has(self, place: str, id: str) -> bool:
        """Return whether a backup is complete in a store."""
        directory = self.directories[place]
        return (directory / f"{id}.json").exists() and (directory / f"{id}.dump").exists()

    def must_exist(self, bot: Bot, place: str, had: Collection[str] = ()) -> set[str]:
        """Return what a store may not lose: a bot's newest good backup there, and the last one before a drop.

        `had`: backups that count as there.
        """
        good = [one for one in bot.made if self.has(place, one.id) or one.id in had]
        keep = {good[-1].id} if good else set()
        since = max((index for index, one in enumerate(bot.made) if one.is_accepted), default=0)
        intact: list[Made] = []
        for one in bot.made[since:]:
            if intact and one.guilds < max(it.guilds for it in intact) * DROP_SHARE:
                keep.add(intact[-1].id)
            else:
                intact.append(one)
        return {id for id in keep if self.has(place, id) or id in had}

    async def step(self, bot: Bot) -> None:
        """Let something happen to a bot."""
        steps: dict[Callable[[Bot], Any], int] = {
            self.create: 8, self.prune: 6, self.push: 1, self.grow: 2, self.lose: 2, self.accept: 1, self.restore: 3,
            self.jump: 1, self.kill: 1, self.lose_disk: 1,
        }  # fmt: skip
        [step] = self.random.choices(list(steps), list(steps.values()))
        self.now += timedelta(minutes=self.random.choice((1, 30, 60 * 5, 60 * 24)))
        bot.remote.is_away = self.random.random() < 0.15
        bot.remote.refuses_writes = self.random.random() < 0.4
        self.steps.append(f"{bot.application_id} {step.__name__}")
        await step(bot)

    async def create(self, bot: Bot) -> None:
        catalog = bot.catalog(self.now)
        if not bot.guilds:
            return  # `create` makes none of an empty database
        if bot.remote.is_away and not await catalog.local.names():
            return  # the order of backups is unknown if none of the former ones can be read
        await self._add(bot, catalog)

    async def _add(self, bot: Bot, catalog: BackupCatalog) -> None:
        now = catalog.clock()
        id = new_id(now)
        manifest = Manifest(
            id, now.isoformat(timespec="milliseconds"), "full", "scheduled", f"{id}.dump", len(ARCHIVE),
            SHA256, len(ARCHIVE), SHA256, None, "guildbook", "18.4", "18.4", "0001",
            {"public.guilds": bot.guilds, "public.members": bot.guilds * 100},
            application_id=bot.application_id,
            host=bot.host,
            ordered_at=(await catalog.order_after(now)).isoformat(timespec="milliseconds"),
        )  # fmt: skip
        await asyncio.to_thread(catalog.local.prepare)
        bot.made.append(Made(id, bot.guilds))
        try:
            with catalog.local.unfinished(manifest.file) as path:
                path.write_bytes(ARCHIVE)
                await catalog.add(path, manifest)
        except UploadFailed:
            pass

    async def prune(self, bot: Bot) -> None:
        with contextlib.suppress(MadeToFail):
            await prune(bot.catalog(self.now), RULES)

    async def push(self, bot: Bot) -> None:
        catalog = bot.catalog(self.now)
        with contextlib.suppress(MadeToFail):
            for id in lacking_remotely(catalog, await catalog.entries()):
                await catalog.push(id)

    async def grow(self, bot: Bot) -> None:
        bot.guilds += self.random.randint(1, 4)

    async def lose(self, bot: Bot) -> None:
        bot.guilds = self.random.choice((0, bot.guilds // 4, bot.guilds // 4))

    async def accept(self, bot: Bot) -> None:
        catalog = bot.catalog(self.now)
        pause = find_pause(await catalog.entries())
        if pause is None or bot.remote.is_away or bot.remote.refuses_writes:
            return
        await catalog.accept(pause.after.id)
        next(one for one in bot.made if one.id == pause.after.id).is_accepted = True

    async def restore(self, bot: Bot) -> None:
        """Restore the latest backup, as far as the stores answer."""
        entries = await bot.catalog(self.now).entries()
        here = {entry.id for entry in entries}
        expected = next((one for one in reversed(bot.made) if one.guilds and one.id in here), None)
        try:
            entry = await bot.catalog(self.now).find("latest")
        except BackupError:
            assert expected is None, "there is one"
            return
        assert expected is not None
        assert entry.id == expected.id, "the newest good one of this database"
        bot.guilds = expected.guilds

    async def jump(self, bot: Bot) -> None:
        bot.skew = timedelta(hours=self.random.choice((-24 * 400, -5, 0, 5, 24 * 400)))

    async def kill(self, bot: Bot) -> None:
        """Kill the process between the archive and its manifest, here or while it uploads."""
        id = new_id(self.now + bot.skew)
        where = self.random.choice((bot.directory / "backups", self.directory / BUCKET))
        where.mkdir(parents=True, exist_ok=True)
        (where / f"{id}.dump").write_bytes(ARCHIVE[:5])

    async def lose_disk(self, bot: Bot) -> None:
        """Start on a new machine: what was only on the old one's disk is gone, and nobody can help that."""
        for path in (bot.directory / "backups").glob("*"):
            path.unlink()
        bot.made = [one for one in bot.made if self.has(BUCKET, one.id)]


async def run_history(seed: int, steps: int = STEPS) -> list[str]:
    """Run one history, check after each step that no backup is gone that must not be, and return the steps."""
    random = Random(seed)
    with tempfile.TemporaryDirectory() as name:
        world = World(Path(name), random, same_address=bool(seed % 2))
        for _ in range(steps):
            before = [(bot, place, world.must_exist(bot, place)) for bot in world.bots for place in world.directories]
            await world.step(random.choice(world.bots))
            for bot, place, ids in before:
                if world.steps[-1] != f"{bot.application_id} lose_disk" or place == BUCKET:
                    gone = [id for id in ids & world.must_exist(bot, place, ids) if not world.has(place, id)]
                    assert not gone, f"{gone} of {bot.application_id} is gone from {place} after {world.steps}"
        return world.steps
